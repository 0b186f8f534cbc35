"""Whisper tiny.en, an utterance of about 5 s to text: our bundle against its peers, in one interleaved run.

    .venv/bin/python tests/bench/whisper.py [BUNDLE] [--peers VENV] [--work DIR] [--rounds N]

Greedy, batch 1, 2 threads, from a 16 kHz WAV file to the text, features included, the same weights for all.
BUNDLE is what `edgemm compress CHECKPOINT --recipe whisper` made; without it the bench makes checkpoint, speech
and bundle in DIR, where a second run finds them again. `--rounds 0` times nothing and shows every peer's transcripts.

    transformers          WhisperForConditionalGeneration.generate, FP32
    faster-whisper        CTranslate2, compute_type int8, no timestamps, no fallback to other temperatures
    openvino-genai        WhisperPipeline on optimum-intel's export with INT8 weights, its default precision
    openvino-genai f32    the same with INFERENCE_PRECISION_HINT=f32
    edgemm                load_bundle(BUNDLE).run(audio=...)

All but transformers and edgemm come from a virtual environment of their own, as optimum-intel wants an older
transformers (and a torchvision that doesn't fit the CPU build of torch, and that nothing here needs):

    python3 -m venv .venv/peers
    .venv/peers/bin/pip install -c constraints.txt faster-whisper==1.2.1 optimum-intel==2.2.0 \
        openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0
    .venv/peers/bin/pip uninstall -y torchvision

A peer that isn't there is left out, and the reason is logged. Each peer is a process of its own (whisper_peer.py) that
blocks on its input while another one works. A round lets each peer transcribe all utterances, in the order
A B C .. C B A; before its turn the thread pools of the one before have time to fall asleep, and its first call is not
counted. Ratios are of medians; their 95 % intervals come from a bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from edgemm import console
from edgemm.errors import EdgemmError, ToolchainError
from edgemm.runtime.measure import ratio_interval
from tests.speech import ctranslate2_directory, utterances, whisper_checkpoint

THREADS, ROUNDS, SEED = 2, 20, 0
SPOKEN, TIMED, SECONDS = 200, 5, 5.0  # utterances made; how many of them are timed: the nearest to so many seconds
SAMPLING_RATE = 16_000
ASLEEP = 0.4  # s; OpenMP's threads spin for 0.2 s after work
QUIET = {"HF_HUB_OFFLINE": "1", "NNCF_CI": "1"}
FIX = "see the docstring of tests/bench/whisper.py"


class Peer:
    """A process that transcribes, see whisper_peer.py. ToolchainError with its last line when it ends."""

    def __init__(self, name: str, python: Path, model: Path) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        command: list[str | Path] = [python, Path(__file__).with_name("whisper_peer.py"), name, model, str(THREADS)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = subprocess.Popen(command, text=True, env=os.environ | QUIET, **pipes)
        self.version: str = self._answer()["version"]

    def transcribe(self, recording: Path) -> dict[str, Any]:
        """The text, and the ms from the file to it."""
        assert self._process.stdin
        self._process.stdin.write(f"{recording}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return dict(json.loads(line))
        self.close()
        raise ToolchainError(f"{self.name} ended: {self._last_words}", fix=FIX)

    def close(self) -> None:
        self._process.communicate()
        self._said.seek(0)
        lines = (self._said.read().strip() or "it said nothing").splitlines()
        self._last_words = next(line for line in lines[::-1] if not line.startswith(" "))
        self._said.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--peers", type=Path, default=Path(".venv/peers"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgemm-bench-whisper")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    work: Path = arguments.work
    here, there = Path(sys.executable), arguments.peers.absolute() / "bin" / "python"
    checkpoint = made(work / "checkpoint", whisper_checkpoint)
    speech = made(work / "speech", lambda out: utterances(out, SPOKEN, SEED)) / "manifest.jsonl"
    recordings = record(speech, work / "timed")
    peers: dict[str, tuple[Path, Callable[[], Path]]] = {
        "transformers": (here, lambda: checkpoint),
        "faster-whisper": (there, ctranslate2_directory),
        "openvino-genai f32": (there, lambda: exported(checkpoint, there, work / "openvino")),
        "openvino-genai": (there, lambda: exported(checkpoint, there, work / "openvino")),
        "edgemm": (here, lambda: arguments.bundle or compressed(checkpoint, speech, work / "out")),
    }
    with ExitStack() as stack:
        started = []
        for name, (python, model) in peers.items():
            try:
                if not python.exists():
                    raise ToolchainError(f"no {python}", fix=FIX)
                started.append(stack.enter_context(closing(Peer(name, python, model()))))
            except EdgemmError as e:
                console.log(f"without {name}: {e}")
        for recording, text in recordings.items():
            console.result(f"{recording.name}, {soundfile.info(recording).duration:.2f} s: {text}")
            for peer in started:
                console.result(f"  {peer.name + ':':20}{peer.transcribe(recording)['text'].strip()}")
        if arguments.rounds:
            report(started, interleaved(started, list(recordings), arguments.rounds))


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """The directory `path`, which `make` writes unless it is there; whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
            make(Path(unfinished) / path.name)
            (Path(unfinished) / path.name).rename(path)
    return path


def record(speech: Path, directory: Path) -> dict[Path, str]:
    """The utterances that are nearest to SECONDS, as WAV of SAMPLING_RATE -> their texts by file."""
    rows = [json.loads(line) for line in speech.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: abs(soundfile.info(speech.parent / row["audio"]).duration - SECONDS))
    directory.mkdir(parents=True, exist_ok=True)
    texts = {}
    for row in rows[:TIMED]:
        wave, rate = soundfile.read(speech.parent / row["audio"])
        path = directory / Path(row["audio"]).name
        soundfile.write(path, soxr.resample(wave, rate, SAMPLING_RATE), SAMPLING_RATE, subtype="PCM_16")
        texts[path] = row["transcript"]
    return texts


def exported(checkpoint: Path, python: Path, out: Path) -> Path:
    """OpenVINO IR with INT8 weights, tokenizer included, as optimum-intel makes it for openvino-genai."""
    options = ("--task", "automatic-speech-recognition-with-past", "--weight-format", "int8")
    optimum = (python.with_name("optimum-cli"), "export", "openvino", "--model", checkpoint)
    return made(out, lambda directory: run([*optimum, *options, directory]))


def compressed(checkpoint: Path, speech: Path, out: Path) -> Path:
    """The bundle that `edgemm compress` makes of the checkpoint, by a margin that so few utterances can prove."""
    wide = ("--set", "verify.margin=0.1")
    run(
        [
            sys.executable,
            "-m",
            "edgemm",
            "compress",
            checkpoint,
            "--recipe",
            "whisper",
            "--data",
            speech,
            "-o",
            out,
            *wide,
        ]
    )
    (bundle,) = out.glob("*/*.edgemm")
    return bundle


def run(command: Sequence[str | Path]) -> None:
    line = [str(part) for part in command]
    console.log(" ".join(line))
    try:
        subprocess.run(line, env=os.environ | QUIET, stdout=sys.stderr, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise ToolchainError(str(e), fix=FIX) from e


def interleaved(peers: list[Peer], recordings: list[Path], rounds: int) -> dict[str, NDArray[np.float64]]:
    """ms[rounds, recordings] of each peer."""
    times: dict[str, list[list[float]]] = {peer.name: [] for peer in peers}
    for round_ in console.progress(range(rounds), "rounds"):
        for peer in peers if round_ % 2 == 0 else peers[::-1]:
            time.sleep(ASLEEP)
            peer.transcribe(recordings[0])
            times[peer.name].append([peer.transcribe(recording)["ms"] for recording in recordings])
    return {name: np.array(ms) for name, ms in times.items()}


def report(peers: list[Peer], times: dict[str, NDArray[np.float64]]) -> None:
    """How many times longer than the last peer, which is edgemm if it runs, each one takes."""
    rows = []
    last = times[peers[-1].name]
    for peer in peers:
        ms = times[peer.name]
        low, high = ratio_interval(ms, last, SEED)
        ratio = np.median(ms) / np.median(last)
        rows.append((peer.name, peer.version, f"{np.median(ms):.1f}", f"{ratio:.2f}x", f"{low:.2f} to {high:.2f}"))
    title = f"an utterance of {SECONDS:.0f} s to text, {THREADS} threads, {len(last)} rounds"
    columns = ("peer", "version", "p50 ms here", f"times {peers[-1].name}", "95 % interval")
    console.table(title, columns, rows)


if __name__ == "__main__":
    main()
