"""Sound to tensors: equal to transformers' extractors, and every broken input refused by an InputError."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from transformers import ClapFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from transformers.audio_utils import load_audio, mel_filter_bank

from edgemm.errors import InputError, ToolchainError
from edgemm.runtime import audio
from edgemm.runtime.audio import audio_to_features, filter_bank, log_mel, read_audio
from edgemm.runtime.inputs import AudioSpec

RECORDED = Path("/usr/share/asterisk/sounds/en_US_f_Allison/conf-invalid.wav")  # Debian: asterisk-core-sounds-en-wav
SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun."
WHISPER = {"n_fft": 400, "hop_length": 160, "n_mels": 80, "fmax": 8000.0}
CLAP = {"n_fft": 1024, "hop_length": 480, "n_mels": 64, "fmin": 50.0, "fmax": 14000.0, "log": "db"}
CLAP["layout"] = "channel_frames_mels"
# transformers' spectrogram in numpy, in float64 like ours; its torch version for Whisper rounds to float32 on the way
EXACT, TORCH = 1e-6, 2e-4
DECIBEL = 1e-4  # of 100


def speech(seconds: float, rate: int = 16_000, channels: int = 1, seed: int = 0) -> NDArray[np.float64]:
    """Voiced syllables with a gliding pitch, hisses and pauses -> float64[n] or [n,C] within -1..1."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(1.7 * t)) / rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 30) if k * 160 < rate / 2)
    syllables = np.clip(np.sin(2 * np.pi * 3.1 * t), 0, 1) ** 2
    hiss = rng.standard_normal(len(t)) * np.clip(np.sin(2 * np.pi * 1.3 * t + 2), 0, 1)
    mono = 0.25 * voice * syllables + 0.03 * hiss
    return mono if channels == 1 else np.stack([mono * (1 - 0.3 * c) for c in range(channels)], 1)


def encoded(samples: NDArray[Any], rate: int = 16_000, fmt: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=fmt, subtype=subtype)
    return buffer.getvalue()


def wav(rate: int, data: bytes, kind: int = 1, bits: int = 16, size: int | None = None) -> bytes:
    """A mono WAV file from its header and data, whatever they hold. kind: 1 integers, 3 floats."""
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, 1, rate, rate * bits // 8 & 0xFFFF_FFFF, bits // 8, bits)
    body = b"WAVE" + fmt + struct.pack("<4sI", b"data", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def whisper(pad: str = "silence", mask: str | None = None, **mel: Any) -> dict[str, Any]:
    spec = {"tensor": "input_features", "mask": mask, "sampling_rate": 16_000, "seconds": 30, "pad": pad}
    return AudioSpec.model_validate({**spec, "mel": {**WHISPER, **mel}}).model_dump()


def clap(pad: str = "repeat", **mel: Any) -> dict[str, Any]:
    spec = {"tensor": "input_features", "sampling_rate": 48_000, "seconds": 10, "pad": pad}
    return AudioSpec.model_validate({**spec, "mel": {**CLAP, **mel}}).model_dump()


def wav2vec2(seconds: float = 30, **fields: Any) -> dict[str, Any]:
    spec = {"tensor": "input_values", "mask": "attention_mask", "sampling_rate": 16_000, "seconds": seconds}
    return AudioSpec.model_validate({**spec, **fields}).model_dump()


def refused(content: Path | str | bytes, spec: dict[str, Any] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        audio_to_features(content, spec) if spec else read_audio(content, 16_000)
    assert caught.value.exit_code == 2
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was logged; each test begins as a process of its own."""
    lines: list[str] = []
    monkeypatch.setattr(audio, "log", lines.append)
    audio._say_resampled.cache_clear()
    yield lines
    audio._say_resampled.cache_clear()


@pytest.fixture(
    scope="module",
    params=["8k", "16k-float", "44k-stereo", "48k-stereo-float", "flac", "ogg", "mp3", "espeak", "recorded"],
)
def sound(request: pytest.FixtureRequest) -> bytes:
    """A file of some seconds of speech, from each kind of source."""
    if request.param == "recorded":
        if not RECORDED.is_file():
            pytest.skip("no recorded speech: apt-get install asterisk-core-sounds-en-wav")
        return RECORDED.read_bytes()
    if request.param == "espeak":
        if not shutil.which("espeak-ng"):
            pytest.skip("no speech synthesiser: apt-get install espeak-ng")
        return subprocess.run(["espeak-ng", "--stdout", SENTENCE], capture_output=True, check=True).stdout
    return {
        "8k": lambda: encoded(speech(3.21, 8_000), 8_000),
        "16k-float": lambda: encoded(speech(4.0), subtype="FLOAT"),
        "44k-stereo": lambda: encoded(speech(2.5, 44_100, 2), 44_100),
        "48k-stereo-float": lambda: encoded(speech(1.7, 48_000, 2), 48_000, subtype="FLOAT"),
        "flac": lambda: encoded(speech(2.0, 22_050, 2), 22_050, "FLAC", "PCM_24"),
        "ogg": lambda: encoded(speech(2.0, 32_000), 32_000, "OGG", "VORBIS"),
        "mp3": lambda: encoded(speech(2.0, 24_000), 24_000, "MP3"),
    }[request.param]()


# Reading


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_reading_is_equal_to_transformers(sound: bytes, rate: int, tmp_path: Path) -> None:
    path = tmp_path / "sound.bin"
    path.write_bytes(sound)
    samples = read_audio(sound, rate)
    assert (samples.dtype, samples.ndim) == (np.float32, 1)
    assert samples.flags.c_contiguous
    np.testing.assert_array_equal(samples, load_audio(str(path), rate, backend="soundfile"))
    for same in (path, str(path)):
        np.testing.assert_array_equal(read_audio(same, rate), samples)


@pytest.mark.parametrize(("subtype", "step"), [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("FLOAT", 0)])
def test_full_scale_is_one_in_every_sample_format(subtype: str, step: float) -> None:
    samples = np.array([0.0, 0.5, -0.5, 0.123, -1.0])
    read = read_audio(encoded(samples, subtype=subtype), 16_000)
    np.testing.assert_allclose(read, samples, rtol=0, atol=max(step, 1e-7))


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_mixed_to_their_mean(channels: int) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, (500, channels))
    read = read_audio(encoded(samples, subtype="DOUBLE"), 16_000)
    np.testing.assert_allclose(read, samples.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("source", [8_000, 11_025, 44_100, 48_000, 96_000])
def test_resampling_keeps_a_tone_and_its_length(source: int) -> None:
    n = 2 * source + 7
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(n) / source)
    read = read_audio(encoded(tone, source, subtype="FLOAT"), 16_000)
    assert len(read) == -(-n * 16_000 // source)
    inside = slice(2_000, 30_000)
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(read)) / 16_000)
    np.testing.assert_allclose(read[inside], expected[inside], rtol=0, atol=1e-3)


def test_resampling_is_said_once_for_each_rate(said: list[str]) -> None:
    for source in (8_000, 16_000, 8_000, 44_100, 44_100):
        read_audio(encoded(speech(0.1, source), source), 16_000)
    assert said == ["audio at 8000 Hz is resampled to 16000 Hz", "audio at 44100 Hz is resampled to 16000 Hz"]


@pytest.mark.parametrize("source", [8_000, 16_000, 48_000])
def test_one_sample_is_a_sound(source: int) -> None:
    assert len(read_audio(encoded(np.array([0.5]), source), 16_000)) == -(-16_000 // source)


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 0x8000_0000, 0x7FFF_F000])
def test_wav_from_a_pipe_is_taken_for_what_it_holds(size: int) -> None:
    """What ffmpeg, arecord, and sox and espeak-ng write where they can't go back to the header."""
    data = np.arange(1000, dtype="<i2").tobytes()
    assert len(read_audio(wav(16_000, data, size=size), 16_000)) == 1000


def test_wav_whose_writer_counted_the_first_eight_bytes_is_read() -> None:
    content = bytearray(wav(16_000, bytes(200)))
    content[4:8] = struct.pack("<I", len(content))
    assert len(read_audio(bytes(content), 16_000)) == 100
    content[4:8] = struct.pack("<I", len(content) + 1)
    assert f"{len(content)} of {len(content) + 9} bytes" in refused(bytes(content))


def test_mp3_with_a_title_in_front_is_read() -> None:
    content = encoded(speech(1), fmt="MP3")
    tag = b"ID3\x03\0\0\0\0\0\x14" + b"TIT2\0\0\0\x0a\0\0\0A sound.."
    np.testing.assert_array_equal(read_audio(tag + content, 16_000), read_audio(content, 16_000))


def test_libraries_are_imported_when_audio_comes_and_not_before() -> None:
    code = "import sys, edgemm.runtime.audio; print({'soundfile', 'soxr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("library", ["soundfile", "soxr"])
def test_absent_library_is_a_toolchain_error_with_the_command(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ToolchainError, match=r"pip install 'edgemm\[audio\]'") as caught:
        read_audio(wav(16_000, bytes(200)), 16_000)
    assert caught.value.exit_code == 3
    assert library in str(caught.value)


def test_absent_libsndfile_is_a_toolchain_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What soundfile raises on import where it comes without its library."""
    (tmp_path / "soundfile.py").write_text("raise OSError('sndfile library not found')\n")
    monkeypatch.delitem(sys.modules, "soundfile")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ToolchainError, match="sndfile library not found"):
        read_audio(wav(16_000, bytes(200)), 16_000)


# Features, against transformers


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize(("pad", "padding"), [("silence", "max_length"), ("none", "do_not_pad")])
def test_whisper_features_are_those_of_transformers(sound: bytes, mels: int, pad: str, padding: str) -> None:
    extractor = WhisperFeatureExtractor(feature_size=mels)
    samples = read_audio(sound, 16_000)
    made = audio_to_features(sound, whisper(pad, "mask", n_mels=mels))
    features = made["input_features"]
    theirs = extractor(samples, sampling_rate=16_000, padding=padding, return_attention_mask=True, return_tensors="np")
    assert (features.dtype, features.flags.c_contiguous) == (np.float32, True)
    assert features.shape == theirs["input_features"].shape
    np.testing.assert_allclose(features, theirs["input_features"], rtol=0, atol=TORCH)
    padded = np.pad(samples, (0, 480_000 - len(samples) if pad == "silence" else 0))
    exact = extractor._np_extract_fbank_features(padded[None], "cpu")
    np.testing.assert_allclose(features, exact, rtol=0, atol=EXACT)
    assert made["mask"].dtype == np.int64
    np.testing.assert_array_equal(made["mask"], theirs["attention_mask"])


@pytest.mark.parametrize(("seconds", "tail", "made"), [(1.5, 0.5, 2), (1.51, 0.5, 3), (2.0, 0.0, 2), (29.8, 0.5, 30)])
def test_a_tail_is_the_beginning_of_the_padding(seconds: float, tail: float, made: int) -> None:
    """Whole seconds, so that a device meets few shapes; never more than the model takes."""
    content = encoded(speech(seconds))
    short = audio_to_features(content, {**whisper(), "tail": tail})["input_features"]
    assert short.shape == (1, 80, 100 * made)
    whole = audio_to_features(content, whisper())["input_features"]
    clear = 100 * made if made == 30 else 100 * made - 2  # the last frames reflect the edge
    np.testing.assert_allclose(short[:, :, :clear], whole[:, :, :clear], rtol=0, atol=EXACT)


def test_clap_features_are_those_of_transformers(sound: bytes) -> None:
    extractor = ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc")
    theirs = extractor(read_audio(sound, 48_000), sampling_rate=48_000, return_tensors="np")["input_features"]
    features = audio_to_features(sound, clap())["input_features"]
    assert (features.dtype, features.shape) == (np.float32, (1, 1, 1001, 64))
    np.testing.assert_allclose(features, theirs, rtol=0, atol=DECIBEL)


@pytest.mark.parametrize(
    ("n", "pad"),
    [
        *((1, "repeat"), (68_571, "repeat"), (240_000, "repeat"), (240_001, "repeat"), (480_000, "repeat")),
        *((5_000, "silence"), (479_488, "silence"), (479_999, "silence")),
    ],
)
def test_clap_pads_any_length_as_transformers_does(n: int, pad: str) -> None:
    content = encoded(speech(10, 48_000)[-n:], 48_000)
    extractor = ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc")
    padding = {"repeat": "repeatpad", "silence": "pad"}[pad]
    theirs = extractor(read_audio(content, 48_000), sampling_rate=48_000, padding=padding, return_tensors="np")
    features = audio_to_features(content, clap(pad))["input_features"]
    np.testing.assert_allclose(features, theirs["input_features"], rtol=0, atol=DECIBEL)


def test_clap_with_fusion_has_four_times_the_features_of_its_other_filters() -> None:
    """What the family's graph repeats: for a sound that fits, the four channels are the same."""
    content = encoded(speech(3, 48_000), 48_000)
    extractor = ClapFeatureExtractor(frequency_min=50, truncation="fusion")
    theirs = extractor(read_audio(content, 48_000), sampling_rate=48_000, return_tensors="np")["input_features"]
    features = audio_to_features(content, clap(scale="htk", norm=None))["input_features"]
    assert theirs.shape == (1, 4, 1001, 64)
    np.testing.assert_allclose(np.repeat(features, 4, 1), theirs, rtol=0, atol=DECIBEL)


@pytest.mark.parametrize("normalize", [True, False])
def test_wav2vec2_values_are_those_of_transformers(sound: bytes, normalize: bool) -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    samples = read_audio(sound, 16_000)
    theirs = extractor(samples, sampling_rate=16_000, return_tensors="np")
    made = audio_to_features(sound, wav2vec2(normalize=normalize))
    assert made["input_values"].dtype == np.float32
    np.testing.assert_allclose(made["input_values"], theirs["input_values"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(made["attention_mask"], np.ones((1, len(samples))))
    if normalize:
        assert abs(made["input_values"].mean()) < 1e-4
        assert abs(made["input_values"].std() - 1) < 1e-3


@pytest.mark.parametrize("normalize", [True, False])
def test_padded_wav2vec2_values_and_mask_are_those_of_transformers(sound: bytes, normalize: bool) -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    theirs = extractor(
        read_audio(sound, 16_000), sampling_rate=16_000, padding="max_length", max_length=480_000, return_tensors="np"
    )
    made = audio_to_features(sound, wav2vec2(normalize=normalize, pad="silence"))
    np.testing.assert_allclose(made["input_values"], theirs["input_values"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(made["attention_mask"], theirs["attention_mask"])
    assert made["attention_mask"].dtype == np.int64


@pytest.mark.parametrize("n", [160, 161, 319, 320, 321, 16_000, 16_001, 16_159])
def test_whisper_mask_without_padding_has_a_one_for_each_frame(n: int) -> None:
    """As many as transformers has, also where the last hop is not whole."""
    content = encoded(speech(2)[:n])
    if n <= 200:  # too short to be reflected: transformers' torch version takes none either
        assert "fix: give at least 0.0126 s" in refused(content, whisper("none"))
        return
    theirs = WhisperFeatureExtractor()(
        read_audio(content, 16_000), sampling_rate=16_000, padding="do_not_pad", return_attention_mask=True
    )
    made = audio_to_features(content, whisper("none", "mask"))
    np.testing.assert_array_equal(made["mask"], np.asarray(theirs["attention_mask"]))
    assert made["mask"].shape[1] == made["input_features"].shape[2]


def test_no_mask_comes_where_none_is_named() -> None:
    assert list(audio_to_features(encoded(speech(1)), whisper())) == ["input_features"]
    assert list(audio_to_features(encoded(speech(1)), wav2vec2(mask=None))) == ["input_values"]


@pytest.mark.parametrize(
    ("rate", "mel"), [(16_000, {**WHISPER, "fmin": 0.0, "log": "whisper"}), (48_000, CLAP)], ids=["whisper", "clap"]
)
@pytest.mark.parametrize("heard", [1, 37, 200, 480, 1024, 5_000, 47_999, 47_488, 47_489, 47_520, 48_000])
def test_frames_of_silence_are_what_transforming_them_gives(heard: int, rate: int, mel: dict[str, Any]) -> None:
    """Loud enough that the last sample, at the faint edge of a window, is over the floor."""
    samples = np.zeros(48_000, np.float32)
    samples[:heard] = 1e4 * np.random.default_rng(0).uniform(0.5, 1, heard)
    spec = {"scale": "slaney", "norm": "slaney", **mel}
    skipped, all_frames = log_mel(samples, heard, rate, spec), log_mel(samples, 48_000, rate, spec)
    np.testing.assert_allclose(skipped, all_frames, rtol=0, atol=1e-6 if mel["log"] == "whisper" else 1e-5)
    untouched = (heard + mel["n_fft"]) // mel["hop_length"] + 1
    np.testing.assert_array_equal(skipped[untouched:], all_frames[untouched:])


def test_silence_alone_is_a_constant() -> None:
    """-10 is the logarithm of the floor of 1e-10."""
    quiet = encoded(np.zeros(1_000))
    np.testing.assert_array_equal(audio_to_features(quiet, whisper())["input_features"], np.float32((-10 + 4) / 4))
    np.testing.assert_array_equal(audio_to_features(quiet, clap())["input_features"], np.float32(-100))
    np.testing.assert_array_equal(audio_to_features(quiet, wav2vec2(normalize=True))["input_values"], 0)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize("norm", ["slaney", None])
@pytest.mark.parametrize(
    ("rate", "n_fft", "n_mels", "fmin", "fmax"),
    [
        (16_000, 400, 80, 0, 8000),
        (16_000, 400, 128, 0, 8000),
        (48_000, 1024, 64, 50, 14_000),
        (11_025, 513, 20, 0, 900),
    ],
)
def test_filter_bank_is_that_of_transformers(
    rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float, scale: str, norm: str | None
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filter has all zero values")
        theirs = mel_filter_bank(1 + n_fft // 2, n_mels, fmin, fmax, rate, norm, scale)
    np.testing.assert_allclose(filter_bank(rate, n_fft, n_mels, fmin, fmax, scale, norm), theirs, rtol=0, atol=1e-12)
    assert filter_bank(rate, n_fft, n_mels, fmin, fmax, scale, norm) is filter_bank(
        rate, n_fft, n_mels, fmin, fmax, scale, norm
    )


# Bad input


@pytest.mark.parametrize(("spec", "rate"), [(whisper(), 16_000), (clap(), 48_000), (wav2vec2(seconds=1.5), 16_000)])
def test_audio_as_long_as_the_model_takes_is_taken_and_longer_refused(spec: dict[str, Any], rate: int) -> None:
    longest = round(spec["seconds"] * rate)
    audio_to_features(encoded(np.zeros(longest), rate), spec)
    message = refused(encoded(np.zeros(longest + rate), rate), spec)
    assert f"lasts {spec['seconds'] + 1:.2f} s" in message
    assert f"at most {spec['seconds']:g} s" in message
    refused(encoded(np.zeros(longest + 1), rate), spec)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"not audio", b"RIFF", b"RIFF\4\0\0\0WAVE", b"\xff\xd8\xff\xe0", bytes(5000)]
)
def test_file_that_is_no_audio_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(content)
    assert str(path) in refused(path)
    assert "the audio" in refused(content)


@pytest.mark.parametrize("fmt", ["AIFF", "AU", "CAF", "RF64", "VOC", "W64", "NIST", "PAF", "SVX", "MAT5", "IRCAM"])
def test_audio_of_a_format_that_is_not_named_is_refused(fmt: str) -> None:
    assert "no WAV, FLAC, OGG or MP3 file" in refused(encoded(speech(0.1), fmt=fmt))


def test_absent_audio_and_directory_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "absent.wav", tmp_path, tmp_path / "file" / "x.wav"):
        assert str(path) in refused(path)
    assert "absent" in refused("absent\0.wav")


@pytest.mark.parametrize("suffix", [".raw", ".wav", ".vox", ""])
def test_name_of_a_file_decides_nothing(suffix: str, tmp_path: Path) -> None:
    """libsndfile would read .vox and .raw as samples without a header."""
    path = tmp_path / f"sound{suffix}"
    path.write_bytes(encoded(speech(0.5)))
    assert len(read_audio(path, 16_000)) == 8_000
    path.write_bytes(b"no header at all")
    refused(path)


@pytest.mark.parametrize(
    ("fmt", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16")],
)
def test_truncated_audio_is_refused_wherever_it_ends(fmt: str, subtype: str) -> None:
    content = encoded(speech(1), fmt=fmt, subtype=subtype)
    for size in [0, 1, 4, 8, 20, 44, len(content) - 9, *random.Random(0).sample(range(len(content) - 9), 40)]:
        refused(content[:size])


@pytest.mark.parametrize(("fmt", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_truncated_stream_is_taken_for_what_it_holds(fmt: str, subtype: str | None) -> None:
    content = encoded(speech(4), fmt=fmt, subtype=subtype)
    whole = read_audio(content, 16_000)
    half = read_audio(content[: len(content) // 2], 16_000)
    assert 0.2 * len(whole) < len(half) < 0.8 * len(whole)
    sure = len(half) - 4_000  # the last block, and what overlaps it, may differ
    np.testing.assert_allclose(half[:sure], whole[:sure], rtol=0, atol=1e-4)
    for size in random.Random(0).sample(range(300), 20):
        refused(content[:size])


@pytest.mark.parametrize(("fmt", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_audio_without_samples_is_refused(fmt: str, subtype: str) -> None:
    refused(encoded(np.zeros(0), fmt=fmt, subtype=subtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -3e38])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_samples_that_are_no_numbers_are_refused(value: float, place: int) -> None:
    samples = np.full((1000, 2), 0.1, "<f4")
    samples[place, 1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "holds a sample of" in refused(encoded(samples, 8_000, subtype="FLOAT"))


def test_integers_in_a_float_file_are_samples() -> None:
    samples = np.array([-(2.0**31), 2.0**31, 7], "<f4")
    np.testing.assert_array_equal(read_audio(encoded(samples, subtype="FLOAT"), 16_000), samples)


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2_000_000_000])
def test_rate_that_no_recorder_has_is_refused(rate: int) -> None:
    assert f"{rate} samples a second" in refused(wav(rate, bytes(2000)))


@pytest.mark.parametrize("claimed", [0, 48_001, 64_000_001, 2**36 - 1])
def test_flac_that_says_it_holds_what_it_does_not_is_refused(claimed: int) -> None:
    """2**36 - 1 samples would be 256 GiB; 0 means that the length is not known."""
    content = bytearray(encoded(speech(3), fmt="FLAC"))
    content[21:26] = ((content[21] & 0xF0) << 32 | claimed).to_bytes(5, "big")
    refused(bytes(content))


@pytest.mark.parametrize(("channels", "source", "most"), [(1, 16_000, 1000), (2, 16_000, 500), (2, 4_000, 250)])
def test_audio_over_the_limit_is_refused_before_it_is_decoded(
    channels: int, source: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is on what is decoded, and on what resampling makes of it."""
    monkeypatch.setattr(audio, "MAX_SAMPLES", 1000)
    kept = encoded(np.zeros((most, channels)), source, "FLAC")
    larger = encoded(np.zeros((most + 1, channels)), source, "FLAC")
    assert len(read_audio(kept, 16_000)) == most * 16_000 // source
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    assert f"{channels} x {most + 1} samples at {source} Hz: over 1000, " in refused(larger)


def test_file_over_the_limit_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "MAX_SAMPLES", 1000)
    assert "over 4000 bytes" in refused(bytes(4001))
    assert "over 4000 bytes" in refused("/dev/zero")


@pytest.mark.parametrize(
    ("fmt", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "MS_ADPCM"),
        ("FLAC", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
    ],
)
def test_damaged_audio_raises_nothing_but_an_input_error(
    fmt: str, subtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "MAX_SAMPLES", 1_000_000)
    content = encoded(speech(0.5, 24_000), 24_000, fmt, subtype)
    rng = random.Random(0)
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(min(len(damaged), rng.choice((60, 4000))))] = rng.randrange(256)
        try:
            samples = read_audio(bytes(damaged), 16_000)
        except InputError as e:
            assert "\n  fix: " in str(e)
        else:
            assert (samples.dtype, samples.ndim) == (np.float32, 1)
            assert np.isfinite(samples).all()


def test_a_short_recording_is_filled_up_with_silence() -> None:
    samples = speech(0.1)
    spec = AudioSpec(tensor="wave", sampling_rate=16_000, seconds=1, min_samples=2_000, pad_to=2_400).model_dump()
    wave = audio_to_features(encoded(samples), spec)["wave"]
    assert wave.shape == (1, 2_400)
    assert np.allclose(wave[0, :1_600], samples, atol=1e-4)
    assert not wave[0, 1_600:].any()
    assert audio_to_features(encoded(speech(0.5)), spec)["wave"].shape == (1, 8_000)
