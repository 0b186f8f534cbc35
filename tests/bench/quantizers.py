"""The quantizers side by side on one FP32 graph: size, accuracy, latency, time to quantize.

    .venv/bin/python tests/bench/quantizers.py reasoner      the reference model, unpruned, on its test split
    .venv/bin/python tests/bench/quantizers.py whisper       Whisper tiny.en on utterances that espeak-ng speaks

Each quantizer by its own defaults, on the same calibration samples of the train split; the test split only judges.
For Whisper they quantize the encoder, and NNCF the decoder's weights for all of them alike. Latency is a ratio to the
FP32 graph in the same runtime, medians over interleaved rounds (A B C .. C B A), a process a runtime.
What was made is kept in --runs, with the seconds that it took then: a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from edgemm import console
from edgemm.artifact import Artifact
from edgemm.data import split
from edgemm.parity import judge, read_reference
from edgemm.recipe import Recipe, load_recipe
from edgemm.runtime.session import Session, open_directory
from edgemm.stages.compile import compile_engine
from edgemm.stages.export import export
from edgemm.stages.load import load
from edgemm.stages.quantize import quantize
from edgemm.target import load_target
from tests.speech import utterances, whisper_checkpoint

ROUNDS, BLOCK, WARM_UP = 12, 5, 5
SPOKEN, CALIBRATION = 300, 64
OPENVINO: dict[str, dict[str, Any]] = {
    "nncf": {"use": "nncf"},
    "nncf, its own smoothing": {"use": "nncf", "smooth_quant": 0.5},
    "onnxruntime": {"use": "onnxruntime"},
    "neural_compressor": {"use": "neural_compressor"},
}
ONNXRUNTIME: dict[str, dict[str, Any]] = {
    "nncf": {"use": "nncf"},
    "onnxruntime": {"use": "onnxruntime"},
    "onnxruntime, dynamic": {"use": "onnxruntime", "dynamic": True, "smooth_quant": -1},
}
DECODER = {"decoder*": {"use": "nncf", "weight_only": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("reasoner", "whisper"), nargs="?", default="reasoner")
    parser.add_argument("--target", choices=("x86-openvino", "x86-onnxruntime"), default="x86-openvino")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "edgemm-bench-quantizers")
    parser.add_argument(
        "--step", choices=("quantize", "judge", "time"), help="only this one; all where it is not given"
    )
    parser.add_argument("--limit", type=int, help="judge on so many samples alone")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    found = Bench(arguments.model, arguments.target, arguments.runs, arguments.limit)
    rows = [found.sizes()]
    if arguments.step in (None, "judge"):
        rows.append(found.judged())
    if arguments.step in (None, "time"):
        rows.append(found.timed())
    columns = ("variant", *(name for row in rows for name in row["FP32"]))
    table = [(name, *(value for row in rows for value in row[name].values())) for name in rows[0]]
    console.table(f"{arguments.model} on {arguments.target}", columns, table)


class Bench:
    """The engines of all variants of one model on one target, FP32 first."""

    def __init__(self, model: str, target: str, runs: Path, limit: int | None) -> None:
        changes = {"quantize": None, "verify.limit": limit}
        recipe = whisper(runs, changes) if model == "whisper" else load_recipe("reasoner-int8", changes)
        self.recipe, self.target, self.runs = recipe, load_target(target), runs
        self.source = load(recipe, runs)
        graph = export(self.source, recipe.export, runs)
        self.seconds: dict[str, float] = {}
        made = {"FP32": graph}
        for name, values in (OPENVINO if target == "x86-openvino" else ONNXRUNTIME).items():
            components = DECODER if model == "whisper" else {}
            changed = load_changed(recipe, {**values, "components": components})
            made[name] = self.quantized(name, graph, changed)
        self.engines = {name: compile_engine(g, self.target, "f32", runs) for name, g in made.items()}

    def quantized(self, name: str, graph: Artifact, recipe: Recipe) -> Artifact:
        begin = time.perf_counter()
        made = quantize(graph, recipe, self.target, self.runs, self.source)
        kept = self.runs / f"{made.path.name}.seconds"
        if not kept.exists():
            kept.write_text(json.dumps(time.perf_counter() - begin), encoding="utf-8")
        self.seconds[name] = json.loads(kept.read_text(encoding="utf-8"))
        return made

    def sizes(self) -> dict[str, dict[str, str]]:
        """MB of each variant's components, and the seconds it took, calibration samples included."""
        found = {}
        for name, engine in self.engines.items():
            files = [f for f in engine.manifest.files if f.endswith((".bin", ".xml", ".onnx"))]
            size = sum(engine.manifest.files[f].size_bytes for f in files) / 1e6
            seconds = f"{self.seconds[name]:.0f}" if name in self.seconds else ""
            found[name] = {"MB": f"{size:.2f}", "s to quantize": seconds}
        return found

    def judged(self) -> dict[str, dict[str, str]]:
        """The metrics of the recipe, and flips against FP32, on the verification split."""
        reference = read_reference((self.source.path / "reference.npz").read_bytes())
        found = {}
        for name, engine in self.engines.items():
            program = engine.json("program.json")
            _, samples = split(self.recipe, lambda program=program: program)
            outputs = open_directory(engine.path).outputs([s.query for s in samples])
            rows = judge(outputs, reference, program, self.recipe)
            row = {r.metric: f"{r.compressed:.4f}" for r in rows}
            found[name] = {**row, "flips": f"{rows[0].flips:.4f}", "drop at most": f"{rows[0].drop_ci95_upper:.4f}"}
        return found

    def timed(self) -> dict[str, dict[str, str]]:
        """Speed-up at the median over FP32 in the same runtime."""
        _, samples = split(self.recipe, lambda: self.engines["FP32"].json("program.json"))
        sessions = {name: open_directory(engine.path) for name, engine in self.engines.items()}
        first = next(iter(sessions.values()))
        inputs = [(first.tensors(s.query), s.text) for s in samples[:10]]
        medians = {name: float(np.median(times)) for name, times in interleaved(sessions, inputs).items()}
        base = medians["FP32"]
        return {name: {"speed-up": f"{base / ms:.2f}x", "p50 ms here": f"{ms:.2f}"} for name, ms in medians.items()}


def load_changed(recipe: Recipe, quantize: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(mode="json", by_alias=True), "quantize": quantize})


def whisper(runs: Path, changes: dict[str, Any]) -> Recipe:
    """Whisper tiny.en as it is, and what espeak-ng speaks."""
    checkpoint, speech = runs / "whisper-tiny.en", runs / "speech"
    if not (checkpoint / "config.json").exists():
        whisper_checkpoint(checkpoint)
    if not (speech / "manifest.jsonl").exists():
        utterances(speech, SPOKEN, 0)
    values = {"model": str(checkpoint), "data": str(speech / "manifest.jsonl"), "calibration": CALIBRATION}
    return load_recipe("default", {**changes, **values})


def interleaved(sessions: dict[str, Session], inputs: list[tuple[Any, str | None]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)
    for session in sessions.values():
        for i in range(WARM_UP):
            session.complete(*inputs[i % len(inputs)])
    for round_ in range(ROUNDS):
        for name in [*sessions] if round_ % 2 == 0 else [*sessions][::-1]:
            for i in range(BLOCK):
                begin = time.perf_counter()
                sessions[name].complete(*inputs[(round_ * BLOCK + i) % len(inputs)])
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


if __name__ == "__main__":
    main()
