"""Sound files to tensors by the bundle's own data: numpy, soundfile and soxr, no transformers."""

from __future__ import annotations

import io
import math
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from edgemm.console import log
from edgemm.errors import InputError, ToolchainError

MAX_SAMPLES = 64_000_000  # of all channels: 11 minutes of stereo at 48 kHz
BEGINNINGS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff")  # libsndfile reads twenty formats more: ways in
STREAMED = 0x7FFF_0000  # from here on a WAV file's size is what programs write that don't know it yet
RATES = (1_000, 1_000_000)  # Hz
FLOOR = 1e-10  # the least power that a logarithm is taken of
BLOCK = 256  # frames transformed at a time: they fit the cache


def read_audio(audio: Path | str | bytes, rate: int) -> NDArray[np.float32]:
    """Decode WAV, FLAC, OGG or MP3, mix to mono, resample -> float32[n], full scale 1.

    rate   samples a second that come out; a file at another rate is resampled, said once a process for each

    Equal to transformers' load_audio with soundfile. WAV and FLAC that end before their header says are refused.
    OGG and MP3 are taken for what they hold, as is WAV from a pipe, which doesn't say how long it is; MP3 of variable
    bit rate without a Xing header may lose its end, whose place libsndfile guesses.
    Raises InputError for audio that is missing, broken, empty, of another format, of over 64 million samples or
    with samples that are no numbers; ToolchainError without soundfile and soxr.
    """
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as e:  # OSError: soundfile is there, its libsndfile is not
        raise ToolchainError(f"audio needs soundfile and soxr: {e}", fix="pip install 'edgemm[audio]'") from e
    name = _name(audio)
    try:
        with soundfile.SoundFile(io.BytesIO(_content(audio))) as opened:
            source, length, channels = opened.samplerate, opened.frames, opened.channels
            if not RATES[0] <= source <= RATES[1]:
                raise InputError(f"{name} has {source} samples a second", fix="give 1,000 to 1,000,000: write it again")
            if length * max(channels, rate / source) > MAX_SAMPLES:
                raise InputError(
                    f"{name} says that it has {channels} x {length} samples at {source} Hz: over {MAX_SAMPLES}, "
                    f"as it is or at {rate} Hz",
                    fix="cut it to what the model takes; if it is not that long, convert it to WAV",
                )
            samples = opened.read(length, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as e:
        raise InputError(f"cannot read {name}: {e.error_string}", fix="give a whole WAV, FLAC, OGG or MP3 file") from e
    if not len(samples):
        raise InputError(f"{name} holds no samples", fix="give audio of at least one sample")
    peak = max(samples.max(), -samples.min())
    if not peak < 1 << 32:  # nor is NaN; the full scale of 32-bit integers in a float file is
        raise InputError(f"{name} holds a sample of {peak}", fix="write it again, with samples between -1 and 1")
    mono: NDArray[np.float32] = samples.mean(axis=1)
    if source != rate:
        _say_resampled(source, rate)
        count = -(-len(mono) * rate // source)
        mono = soxr.resample(mono, source, rate)  # soxr may leave the last one out
        mono = np.pad(mono, (0, count - len(mono)))
    return mono


def _content(audio: Path | str | bytes) -> bytes:
    """The whole file; InputError when it is missing, huge, of another format, or WAV that is cut short."""
    name = _name(audio)
    try:
        with io.BytesIO(audio) if isinstance(audio, bytes) else Path(audio).open("rb") as file:
            content = file.read(4 * MAX_SAMPLES + 1)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise InputError(f"cannot read {name}: {e}", fix="give a WAV, FLAC, OGG or MP3 file") from e
    if len(content) > 4 * MAX_SAMPLES:
        raise InputError(f"{name} has over {4 * MAX_SAMPLES} bytes", fix="cut it to what the model takes")
    if not content.startswith(BEGINNINGS):
        raise InputError(
            f"{name} is no WAV, FLAC, OGG or MP3 file: it begins {content[:12]!r}", fix="convert it to one of them"
        )
    if content.startswith(b"RIFF") and len(content) >= 8:
        size = struct.unpack("<I", content[4:8])[0]  # of what follows these 8 bytes; some programs count them too
        if len(content) < size < STREAMED:
            raise InputError(f"{name} is cut short: {len(content)} of {size + 8} bytes", fix="give the whole file")
    return content


def _name(audio: Path | str | bytes) -> str:
    return "the audio" if isinstance(audio, bytes) else str(audio)


@cache
def _say_resampled(source: int, rate: int) -> None:
    log(f"audio at {source} Hz is resampled to {rate} Hz")


def audio_to_features(audio: Path | str | bytes, spec: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """One sound file as the model's tensors, by an AudioSpec of inputs.py.

    spec["tensor"]  float32[1,n] the waveform, or by `mel` its spectrogram, float32[1,M,T] or float32[1,1,T,M]
    spec["mask"]    int64[1,n] or int64[1,T]: 1 where the input is, 0 where it was padded

    Raises InputError for audio that read_audio refuses, that lasts over `seconds`, or is too short for a frame.
    """
    rate, mel = spec["sampling_rate"], spec["mel"]
    samples = read_audio(audio, rate)
    longest = round(spec["seconds"] * rate)
    if len(samples) > longest:
        raise InputError(
            f"{_name(audio)} lasts {len(samples) / rate:.2f} s",
            fix=f"the model takes at most {spec['seconds']:g} s: cut it",
        )
    if spec["normalize"]:
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    if spec["pad"] == "repeat":
        samples = np.tile(samples, longest // len(samples))
    heard = len(samples)
    if spec["tail"] is not None:
        longest = min(longest, math.ceil(heard / rate + spec["tail"]) * rate)
    if spec["pad"] != "none":
        samples = np.pad(samples, (0, longest - heard))
    samples = np.pad(samples, (0, max(0, spec["pad_to"] - len(samples))))
    shortest = spec["min_samples"] if mel is None else max(mel["hop_length"], mel["n_fft"] // 2 + 1)
    if len(samples) < shortest:
        raise InputError(
            f"{_name(audio)} lasts {len(samples) / rate:.4f} s", fix=f"give at least {shortest / rate:.4f} s"
        )
    if mel is None:
        features, steps, hop = samples, len(samples), 1
    else:
        hop = mel["hop_length"]
        frames = log_mel(samples, heard, rate, mel)
        steps = len(frames)
        features = np.ascontiguousarray(frames.T) if mel["layout"] == "mels_frames" else frames[None]
    tensors: dict[str, NDArray[Any]] = {spec["tensor"]: features[None]}
    if spec["mask"]:
        tensors[spec["mask"]] = (np.arange(steps) * hop < heard).astype(np.int64)[None]
    return tensors


def log_mel(samples: NDArray[np.float32], heard: int, rate: int, mel: dict[str, Any]) -> NDArray[np.float32]:
    """Logarithm of the power in each mel band, frame by frame -> float32[T,M].

    samples  float32[n], n > n_fft / 2
    heard    samples from here on are zeros: a frame that sees no others has a constant value and is not transformed

    As spectrogram(power=2, center=True, pad_mode="reflect") of transformers, whose WhisperFeatureExtractor leaves
    the last frame out.
    """
    n_fft, half, hop = mel["n_fft"], mel["n_fft"] // 2, mel["hop_length"]
    whisper = mel["log"] == "whisper"
    frames = sliding_window_view(np.pad(samples, half, mode="reflect"), n_fft)[::hop]
    count = len(frames) - whisper
    seen = min(count, (heard + half) // hop + 1)
    hann = np.hanning(n_fft + 1)[:-1]
    bank = filter_bank(rate, n_fft, mel["n_mels"], mel["fmin"], mel["fmax"], mel["scale"], mel["norm"])
    logs = np.full((count, mel["n_mels"]), np.log10(FLOOR), np.float32)
    for start in range(0, seen, BLOCK):
        spectrum = np.fft.rfft(frames[start : min(start + BLOCK, seen)] * hann)
        # No BLAS: after a product its threads spin for some 30 ms, on the cores where the engine's should run.
        power = np.einsum("tf,fm->tm", spectrum.real**2 + spectrum.imag**2, bank)
        logs[start : start + len(power)] = np.log10(np.maximum(power, FLOOR))
    return (np.maximum(logs, logs.max() - 8) + 4) / 4 if whisper else 10 * logs


@cache
def filter_bank(
    rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float, scale: str, norm: str | None
) -> NDArray[np.float64]:
    """Triangular filters, evenly spaced in mel -> float64[n_fft // 2 + 1, M]. As librosa.filters.mel."""
    low, high = _mels(np.array([fmin, fmax]), scale)
    edges = _hertz(np.linspace(low, high, n_mels + 2), scale)
    slopes = edges - np.linspace(0, rate // 2, n_fft // 2 + 1)[:, None]
    widths = np.diff(edges)
    bank = np.maximum(0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    return bank * (2 / (edges[2:] - edges[:-2])) if norm == "slaney" else bank


def _mels(hertz: NDArray[np.float64], scale: str) -> NDArray[np.float64]:
    """Slaney's scale is linear up to 1 kHz = 15 mel, from there on 27 mel a factor of 6.4."""
    if scale == "htk":
        return 2595 * np.log10(1 + hertz / 700)
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 / np.log(6.4) * np.log(np.maximum(hertz, 1000) / 1000))


def _hertz(mels: NDArray[np.float64], scale: str) -> NDArray[np.float64]:
    if scale == "htk":
        return 700 * (10 ** (mels / 2595) - 1)
    return np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(np.log(6.4) / 27 * (mels - 15)))
