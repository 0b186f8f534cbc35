"""The reference model side by side: torch, ONNX Runtime, OpenVINO, INT8 alone, pruned, pruned + INT8.

"masked" has the heads that "pruned" removes, their weights zero: what zeros buy without smaller shapes.

    make bench                       all variants in turn in one process; ratios to the FP32 graph in OpenVINO
    .venv/bin/python tests/bench/compress.py --profile    where the milliseconds go, by kind of layer
    ... --recipe reasoner-pruned                          what that recipe prunes, against INT8 alone

Medians over interleaved rounds (A B C .. C B A); accuracy on the whole test split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgemm import console
from edgemm.artifact import Artifact, build
from edgemm.data import split
from edgemm.metrics import accuracy
from edgemm.models import find_family, read_model
from edgemm.recipe import Recipe, load_recipe
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import Session, open_directory
from edgemm.stages.compile import compile_engine
from edgemm.stages.export import export
from edgemm.stages.load import load
from edgemm.stages.prune import prune
from edgemm.stages.quantize import quantize
from edgemm.target import Target, load_target

ROUNDS, BLOCK, WARM_UP = 20, 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--recipe", default="reasoner")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "edgemm-bench")
    arguments = parser.parse_args()
    recipe, target = load_recipe(arguments.recipe), load_target("x86-openvino")
    runs: Path = arguments.runs
    source = load(recipe, runs)
    graphs = variants(source, recipe, target, runs)
    engines = {name: compile_engine(graph, target, "f32", runs) for name, graph in graphs.items()}
    if arguments.profile:
        for name in ("FP32", "pruned + INT8"):
            profile(name, engines[name])
    else:
        compare(source, graphs, engines, recipe, target.threads)


def variants(source: Artifact, recipe: Recipe, target: Target, runs: Path) -> dict[str, Artifact]:
    fp32 = export(source, recipe.export, runs)
    pruned = export(prune(source, recipe, runs), recipe.export, runs)
    return {
        "FP32": fp32,
        "INT8": quantize(fp32, recipe, target, runs),
        "masked": export(masked(source, recipe, runs), recipe.export, runs),
        "pruned": pruned,
        "pruned + INT8": quantize(pruned, recipe, target, runs),
    }


def masked(source: Artifact, recipe: Recipe, runs: Path) -> Artifact:
    """`source` with weights of 0 where `prune` removes heads."""
    layers = {x["name"]: x["kept"] for x in prune(source, recipe, runs).json("pruning.json")["layers"]}

    def make(out: Path) -> None:
        directory = source.path / "model"
        family = find_family(directory)
        model = read_model(family, directory)
        for block in family.attentions(model):
            gone = [h for h in range(block.heads) if h not in layers[block.name]]
            *inner, o = block.linears
            with torch.no_grad():
                for linear in inner:
                    linear.weight.unflatten(0, (block.heads, block.head_dim))[gone] = 0
                    linear.bias.unflatten(0, (block.heads, block.head_dim))[gone] = 0
                o.weight.unflatten(1, (block.heads, block.head_dim))[:, gone] = 0
        family.save(model, out / "model", directory)
        (out / "program.json").write_text(json.dumps(source.json("program.json")), encoding="utf-8")

    return build("pruned", runs, parents=[source], config={"masked": layers}, make=make)


def compare(
    source: Artifact, graphs: dict[str, Artifact], engines: dict[str, Artifact], recipe: Recipe, threads: int
) -> None:
    _, samples = split(recipe, dict)
    sessions = {f"OpenVINO {name}": open_directory(engine.path) for name, engine in engines.items()}
    bf16 = {"threads": threads, "precision": "bf16"}
    sessions["OpenVINO bf16"] = open_directory(engines["FP32"].path, settings=bf16)
    for name in ("FP32", "pruned + INT8"):
        sessions[f"ONNX Runtime {name}"] = open_directory(graphs[name].path, settings={"threads": threads})
    first = next(iter(sessions.values()))
    inputs = [first.tensors(s.query) for s in samples[:20]]
    calls: dict[str, Callable[[Tensors], Any]] = {name: session.infer for name, session in sessions.items()}
    calls["torch FP32"] = torch_call(source, threads)
    medians = {name: float(np.median(times)) for name, times in interleaved(calls, inputs).items()}
    targets = [s.label for s in samples]
    queries = [s.query for s in samples]
    right = {name: accuracy.values(s.outputs(queries), {}, targets) for name, s in sessions.items()}
    base = medians["OpenVINO FP32"]
    rows = (
        (name, f"{base / ms:.2f}x", f"{ms:.2f}", f"{right[name].mean():.4f}" if name in right else "")
        for name, ms in sorted(medians.items(), key=lambda item: -item[1])
    )
    console.table(f"one question, batch 1, {threads} threads", ("variant", "speed-up", "p50 ms here", "accuracy"), rows)


def torch_call(source: Artifact, threads: int) -> Callable[[Tensors], Any]:
    directory = source.path / "model"
    model = read_model(find_family(directory), directory)
    torch.set_num_threads(threads)

    @torch.inference_mode()
    def call(tensors: Tensors) -> Any:
        return model(**{name: torch.from_numpy(value) for name, value in tensors.items()})

    return call


def interleaved(calls: dict[str, Callable[[Tensors], Any]], inputs: list[Tensors]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)
    for call in calls.values():
        for i in range(WARM_UP):
            call(inputs[i % len(inputs)])
    for round_ in range(ROUNDS):
        for name in [*calls] if round_ % 2 == 0 else [*calls][::-1]:
            for i in range(BLOCK):
                begin = time.perf_counter()
                calls[name](inputs[(round_ * BLOCK + i) % len(inputs)])
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def profile(name: str, engine: Artifact) -> None:
    """Milliseconds by component and kind of layer, from OpenVINO's own counters, mean of 50 runs."""
    import openvino as ov

    session: Session = open_directory(engine.path)
    recipe = load_recipe("reasoner")
    samples = split(recipe, dict)[1][:50]
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, "PERF_COUNT": True}
    spent: dict[tuple[str, str, str], float] = defaultdict(float)
    requests = {
        name: core.compile_model(engine.path / f"{name}.xml", "CPU", settings).create_infer_request()
        for name in session.components
    }
    for sample in samples:
        known = session.infer(session.tensors(sample.query))
        for part, component in session.components.items():
            request = requests[part]
            request.infer({port["name"]: known[port["name"]] for port in component.spec["inputs"]})
            for row in request.profiling_info:
                key = (part, row.node_type, row.exec_type)
                spent[key] += row.real_time.total_seconds() * 1e3 / len(samples)
    rows = sorted(((*key, f"{ms:.3f}") for key, ms in spent.items() if ms > 0.01), key=lambda r: -float(r[3]))
    console.table(f"{name}: {sum(spent.values()):.2f} ms", ("component", "layer", "kernel", "ms"), rows)


if __name__ == "__main__":
    main()
