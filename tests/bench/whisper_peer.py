"""One way of turning speech into text, in a process of its own: tests/bench/whisper.py starts one for each peer.

    PYTHON tests/bench/whisper_peer.py PEER MODEL THREADS

Any interpreter that has the peer's library will do; nothing of edgemm is imported for another peer. Says
{"version": ...} on stdout when ready, then answers each path of a 16 kHz mono 16-bit WAV on stdin with
{"text": ..., "ms": ...}: the time from the file to the text, features included. Blocks on stdin in between.
"""

from __future__ import annotations

import json
import os
import sys
import time
import wave
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Transcribe = Callable[[str], str]


def samples(path: str) -> Any:
    """float32[T] in -1..1"""
    with wave.open(path) as recording:
        return np.frombuffer(recording.readframes(recording.getnframes()), np.int16).astype(np.float32) / 32768


def transformers(model: str, threads: int) -> Transcribe:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    torch.set_num_threads(threads)
    processor = WhisperProcessor.from_pretrained(model)
    network = WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def transcribe(path: str) -> str:
        features = processor(samples(path), sampling_rate=16_000, return_tensors="pt").input_features
        return processor.decode(network.generate(features, num_beams=1, do_sample=False)[0], skip_special_tokens=True)

    return transcribe


def faster_whisper(model: str, threads: int) -> Transcribe:
    from faster_whisper import WhisperModel

    network = WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=threads)
    greedy = {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False, "without_timestamps": True}

    def transcribe(path: str) -> str:
        segments, _ = network.transcribe(samples(path), language="en", vad_filter=False, **greedy)
        return "".join(segment.text for segment in segments)

    return transcribe


def openvino_genai(model: str, threads: int, **settings: str) -> Transcribe:
    from openvino_genai import WhisperPipeline

    pipeline = WhisperPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads, **settings)
    return lambda path: pipeline.generate(samples(path).tolist()).texts[0]


def openvino_genai_f32(model: str, threads: int) -> Transcribe:
    return openvino_genai(model, threads, INFERENCE_PRECISION_HINT="f32")


def edgemm(model: str, threads: int) -> Transcribe:
    """`threads` must be those that the bundle was made for."""
    from edgemm import load_bundle

    session = load_bundle(model)
    assert session.program["settings"]["threads"] == threads, session.program["settings"]
    return lambda path: session.run(audio=Path(path)).answer or ""


PEERS: dict[str, tuple[str, Callable[[str, int], Transcribe]]] = {
    "transformers": ("transformers", transformers),
    "faster-whisper": ("faster-whisper", faster_whisper),
    "openvino-genai f32": ("openvino-genai", openvino_genai_f32),
    "openvino-genai": ("openvino-genai", openvino_genai),
    "edgemm": ("edgemm", edgemm),
}


def main() -> None:
    peer, model, threads = sys.argv[1:]
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)  # what libraries print is no answer
        library, load = PEERS[peer]
        transcribe = load(model, int(threads))
        out.write(json.dumps({"version": version(library)}) + "\n")
        for line in sys.stdin:
            begin = time.perf_counter()
            text = transcribe(line.rstrip("\n"))
            out.write(json.dumps({"ms": (time.perf_counter() - begin) * 1e3, "text": text}) + "\n")


if __name__ == "__main__":
    main()
