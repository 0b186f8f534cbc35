"""The material of the Whisper tests: real weights in transformers' form, speech with its text, recorded prompts."""

from __future__ import annotations

import json
import random
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgemm.errors import InputError, ToolchainError
from tests.speech import (
    VOICES,
    ctranslate2_directory,
    read_ctranslate2,
    recorded_speech,
    sentences,
    utterances,
    whisper_checkpoint,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        ctranslate2_directory()
    except ToolchainError as e:
        pytest.skip(str(e))
    return whisper_checkpoint(tmp_path_factory.mktemp("whisper") / "tiny.en")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return utterances(tmp_path_factory.mktemp("speech") / "a", 60, seed=3)
    except ToolchainError as e:
        pytest.skip(str(e))


def rows(manifest: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def test_the_weights_are_those_of_ctranslate2(checkpoint: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    state = WhisperForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    arrays = read_ctranslate2(ctranslate2_directory() / "model.bin")
    fused = arrays["decoder/layer_2/attention/linear_1/weight"]  # keys, then values
    for i, part in enumerate("kv"):
        weight = state[f"model.decoder.layers.2.encoder_attn.{part}_proj.weight"].numpy()
        np.testing.assert_array_equal(weight, fused[384 * i : 384 * (i + 1)])
    biases = [a for name, a in arrays.items() if name.endswith("self_attention/linear_0/bias")]
    assert len(biases) == 8
    assert not any(bias[384:768].any() for bias in biases), "the keys' bias, which transformers hasn't, is no zero"


def test_generation_needs_no_more_than_the_checkpoint_says(checkpoint: Path, manifest: Path) -> None:
    import soundfile
    import soxr
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = WhisperProcessor.from_pretrained(checkpoint)
    row = next(r for r in rows(manifest) if r["voice"] == "en-us+m5")
    samples, rate = soundfile.read(manifest.parent / row["audio"], dtype="float32")
    features = processor(soxr.resample(samples, rate, 16_000), sampling_rate=16_000, return_tensors="pt")
    ids = model.generate(features.input_features)[0]
    heard = processor.decode(ids, skip_special_tokens=True).lower().strip(" .").split()
    spoken = row["transcript"].lower().strip(" .").split()
    assert len(set(heard) & set(spoken)) >= 0.7 * len(set(spoken)), (heard, spoken)
    config = json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8"))
    assert config["is_multilingual"] is False
    assert config["no_timestamps_token_id"] == 50362
    assert config["decoder_start_token_id"] == 50257
    assert config["max_length"] == 448
    assert len(config["suppress_tokens"]) == 90
    assert config["begin_suppress_tokens"] == [220, 50256]


def test_whisper_writes_from_its_bundle_without_torch(
    edgemm, device, checkpoint: Path, manifest: Path, tmp_path
) -> None:
    """Few utterances prove no point of WER: the margin is wide here, and make bench-whisper has hundreds."""
    few = manifest.with_name("few.jsonl")
    chosen = [
        r for split, n in (("train", 4), ("test", 8)) for r in [r for r in rows(manifest) if r["split"] == split][:n]
    ]
    few.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    wide = ("--set", "verify.margin=0.9", "--set", "verify.rounds=4", "--set", "target.budgets.min_speedup=null")
    done = edgemm("compress", checkpoint, "--data", few, "-o", tmp_path / "out", "--json", *wide)
    assert done.returncode == 0, done.stderr
    (target,) = json.loads(done.stdout)["targets"]
    assert [row["name"] for row in target["latency"]["components"]] == ["audio_encoder", "decoder"]
    (wer,) = target["accuracy"]
    assert (wer["metric"], wer["n"]) == ("wer", 8)
    bundle = tmp_path / "out" / "x86-openvino" / f"{checkpoint.name}-x86-openvino.edgemm"
    said = chosen[-1]
    done = device("run", bundle, "--audio", manifest.parent / said["audio"], "--json")
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout)["answer"].lower().strip(" .").split()
    spoken = said["transcript"].lower().strip(" .").split()
    assert len(set(heard) & set(spoken)) >= 0.7 * len(set(spoken)), (heard, spoken)
    done = device("verify", bundle)
    assert done.returncode == 2
    assert "was verified on 'few.jsonl', which is not here" in done.stderr
    assert device("verify", bundle, "--data", few).returncode == 0


def test_sentences_are_many_different_and_without_numerals() -> None:
    texts = [text for _, text in sentences(random.Random(0))]
    assert len(set(texts)) == len(texts) >= 600
    assert len({line for line, _ in sentences(random.Random(0))}) == 179
    assert {len(text.split()) for text in texts} <= set(range(4, 17))
    assert not any(c.isdigit() or c in "{|}" for text in texts for c in text)


def test_utterances_are_the_same_for_a_seed(manifest: Path, tmp_path: Path) -> None:
    again, other = utterances(tmp_path / "b", 60, seed=3), utterances(tmp_path / "c", 60, seed=4)
    assert again.read_bytes() == manifest.read_bytes() != other.read_bytes()
    for row in rows(manifest):
        assert (manifest.parent / row["audio"]).read_bytes() == (again.parent / row["audio"]).read_bytes()


def test_utterances_are_recordings_of_every_voice_in_both_splits(manifest: Path) -> None:
    found = rows(manifest)
    assert {row["voice"] for row in found} == set(VOICES)
    assert {row["split"] for row in found} == {"train", "test"}
    for row in found:
        with wave.open(str(manifest.parent / row["audio"])) as recording:
            assert recording.getparams()[:3] == (1, 2, 22_050)
            assert 1 < recording.getnframes() / 22_050 < 15


@pytest.fixture
def espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in espeak-ng's place."""

    def install(script: str) -> None:
        (tmp_path / "espeak-ng").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "espeak-ng").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    return install


def test_every_voice_sounds_different(manifest: Path) -> None:
    """espeak-ng exits 0 when it doesn't know a variant, and reads with the plain voice."""
    command = ["espeak-ng", "--stdout", "Close the door.", "-v"]
    assert len({subprocess.run([*command, v], capture_output=True, check=True).stdout for v in VOICES}) == len(VOICES)


def test_no_line_is_in_both_splits(tmp_path: Path, espeak: Callable[[str], None]) -> None:
    """A sentence of the calibration set has no sibling, with one word changed, in the verification set."""
    espeak("exit 0")
    line_of = {text: line for line, text in sentences(random.Random(0))}
    found = rows(utterances(tmp_path / "many", 600, seed=0))
    lines = {split: {line_of[r["transcript"]] for r in found if r["split"] == split} for split in ("train", "test")}
    assert len(lines["train"]) == 60
    assert len(lines["test"]) == 119
    assert not lines["train"] & lines["test"]


def test_a_failure_of_espeak_is_told(tmp_path: Path, espeak: Callable[[str], None]) -> None:
    espeak("echo no such voice >&2; exit 3")
    with pytest.raises(ToolchainError, match=r"(?s)espeak-ng -v en-.*no such voice.*fix: apt-get install espeak-ng"):
        utterances(tmp_path / "out", 2, seed=0)


def test_more_utterances_than_sentences_are_refused(tmp_path: Path, espeak: Callable[[str], None]) -> None:
    espeak("exit 0")
    with pytest.raises(InputError, match=r"5000 utterances: too many\n  fix: sentences.txt makes \d+ different"):
        utterances(tmp_path / "out", 5000, seed=0)
    assert not (tmp_path / "out").exists()


def test_without_espeak_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="fix: apt-get install espeak-ng"):
        utterances(tmp_path / "out", 1, seed=0)


def test_recorded_prompts_are_8_khz_speech() -> None:
    try:
        prompts = recorded_speech()
    except ToolchainError as e:
        pytest.skip(str(e))
    assert len(set(prompts)) == 40
    for prompt in prompts:
        with wave.open(str(prompt)) as recording:
            assert recording.getparams()[:3] == (1, 2, 8_000)
            assert 2 <= recording.getnframes() / 8_000 <= 15
            frames = np.frombuffer(recording.readframes(80_000), np.int16)
        assert np.abs(frames).max() > 1_000, f"{prompt} is silent"


def test_without_the_prompts_the_error_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"has 0 recorded prompts.*\n  fix: apt-get install asterisk-core-sounds"):
        recorded_speech(directory=tmp_path)
