"""Verify: accuracy against the FP32 model, latency, memory and size against the FP32 graph; the verdict."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.data import is_random, split
from edgemm.host import host
from edgemm.levels import simulation, unmeasured
from edgemm.parity import judge, read_reference
from edgemm.recipe import Recipe
from edgemm.report.schema import (
    Accuracy,
    ComponentLatency,
    Latency,
    Memory,
    Percentiles,
    Pruning,
    Samples,
    Size,
    TargetReport,
)
from edgemm.runtime import measure
from edgemm.runtime.archive import pack
from edgemm.runtime.query import Encoded, Query, Tensors
from edgemm.runtime.session import Session, open_directory
from edgemm.target import Target
from edgemm.verdict import accuracy_gates, budget_gates, worst

LATENCY_INPUTS = 20
COMPONENT_INPUTS = 5


def verify(
    engine: Artifact,
    baseline: Artifact,
    source: Artifact,
    pruning: Pruning | None,
    recipe: Recipe,
    target: Target,
    runs: Path,
) -> Artifact:
    """Judge `engine` on `target` against `source` (accuracy) and `baseline` (latency, memory, size).

    baseline   the FP32 graph of the unpruned model in the same runtime, same threads
    The artifact holds target.json (report/schema.py: TargetReport without the bundle's path).
    """

    def make(out: Path) -> None:
        program = engine.json("program.json")
        _, samples = split(recipe, lambda: program)
        queries = [s.query for s in samples]
        reference = read_reference((source.path / "reference.npz").read_bytes())
        elsewhere = target.dialect == "tensorrt"
        session = simulation(engine, target) if elsewhere else open_directory(engine.path)
        notes = [f"pruned: {', '.join(f'{p.use} {p.values}' for p in recipe.prune)}"] if pruning else []
        for p in recipe.prune if pruning else ():
            if note := getattr(plugins.plugin("pruners", p.use), "note", None):
                notes.append(note(plugins.options("pruners", p.use, p.values, recipe.name), target))
        if not pruning:
            why = "the model came as a graph, and pruning needs torch modules"
            notes.append(f"nothing was pruned: {why if recipe.prune else 'the recipe has no pass for it'}")
        if is_random(recipe):
            accuracy: tuple[Accuracy, ...] = ()
            notes.append(f"accuracy was not measured: {recipe.data} is noise")
        else:
            log(f"verify {target.name}: accuracy on {len(samples)} samples")
            accuracy = judge(session.outputs(queries), reference, program, recipe)
        if elsewhere:
            gates = accuracy_gates(accuracy, recipe)
            report = unmeasured(engine, baseline, target, accuracy, gates, pruning, notes)
            (out / "target.json").write_text(report.model_dump_json(), encoding="utf-8")
            return
        log(f"verify {target.name}: latency and memory against the FP32 graph")
        fp32 = open_directory(baseline.path)
        latency = time_pair(fp32, session, queries[:LATENCY_INPUTS], recipe, target, source)
        memory = Memory(
            fp32_peak_mb=measure.peak_memory_mb(baseline.path, fp32.tensors(queries[0])),
            compressed_peak_mb=measure.peak_memory_mb(engine.path, session.tensors(queries[0])),
        )
        size = Size(fp32_bytes=component_bytes(baseline), compressed_bytes=component_bytes(engine))
        gates = [*accuracy_gates(accuracy, recipe), *budget_gates(target, latency, memory, size)]
        report = TargetReport(
            name=target.name,
            verdict=worst([g.verdict for g in gates]),
            accuracy=accuracy,
            latency=latency,
            memory=memory,
            size=size,
            pruning=pruning,
            gates=tuple(gates),
            bundle=None,
            notes=tuple(notes),
        )
        (out / "target.json").write_text(report.model_dump_json(), encoding="utf-8")

    return build(
        "verified",
        runs,
        parents=[engine, baseline, source],
        config={
            "verify": recipe.verify.model_dump(mode="json"),
            "random": is_random(recipe),
            "target": target.model_dump(mode="json"),
            "host": host(),
        },
        tools=("numpy", "easy-vqa"),
        make=make,
    )


def time_pair(
    fp32: Session, compressed: Session, queries: Sequence[Query], recipe: Recipe, target: Target, source: Artifact
) -> Latency:
    """Both models in ABBA blocks on the same inputs, whole and each component alone; torch beside them.

    Inputs are pre-processed beforehand, by each model's own program: pruning may have changed what it takes.
    """
    inputs = [(i, (fp32.tensors(q), q.text), (compressed.tensors(q), q.text)) for i, q in enumerate(queries)]
    a, b = measure.abba(
        lambda i: fp32.complete(*i[1]), lambda i: compressed.complete(*i[2]), inputs, recipe.verify.rounds
    )
    return Latency(
        fp32=percentiles(a),
        compressed=percentiles(b),
        speedup_p50=float(np.median(a) / np.median(b)),
        speedup_ci95=measure.ratio_interval(a, b, recipe.seed),
        baseline=f"FP32 graph in {target.backend}, precision f32, {target.threads} threads",
        threads=target.threads,
        torch_p50_ms=torch_p50_ms(source, [i[1] for i in inputs], target.threads),
        components=time_components(fp32, compressed, inputs, recipe),
        samples_ms=Samples(fp32=rounded(a), compressed=rounded(b)),
    )


def time_components(
    fp32: Session,
    compressed: Session,
    inputs: Sequence[tuple[int, tuple[Tensors, str | Encoded | None], tuple[Tensors, str | Encoded | None]]],
    recipe: Recipe,
) -> tuple[ComponentLatency, ...]:
    """Each component alone, on what it meets in its own model; a decoder over a whole text, by the token."""
    rows = inputs[:COMPONENT_INPUTS]
    of_fp32, of_compressed = alone(fp32, [r[1] for r in rows]), alone(compressed, [r[2] for r in rows])
    found = []
    for name, calls in of_fp32.items():
        pairs = list(zip(calls, of_compressed[name], strict=True))
        rounds = max(4, recipe.verify.rounds // 3)
        a, b = measure.abba(lambda p: p[0][0](), lambda p: p[1][0](), pairs, rounds)
        order = [pairs[i % measure.BLOCK % len(pairs)] for i in range(a.shape[1])]
        a, b = a / [p[0][1] for p in order], b / [p[1][1] for p in order]
        found.append(
            ComponentLatency(
                name=name,
                fp32_p50_ms=float(np.median(a)),
                compressed_p50_ms=float(np.median(b)),
                speedup_p50=float(np.median(a) / np.median(b)),
                speedup_ci95=measure.ratio_interval(a, b, recipe.seed),
            )
        )
    return tuple(found)


def alone(
    session: Session, rows: Sequence[tuple[Tensors, str | Encoded | None]]
) -> dict[str, list[tuple[Callable[[], object], int]]]:
    """What to call to run a component on what it meets in each row, and how many times that runs it."""
    calls: dict[str, list[tuple[Callable[[], object], int]]] = defaultdict(list)
    kept, session.exits = session.exits, {}
    for tensors, text in rows:
        met: list[tuple[str, Tensors]] = []
        session.observe = lambda name, given, met=met: met.append((name, given))
        session.complete(tensors, text)
        session.observe = None
        for name, given in met:
            if name != session.decoder:
                calls[name].append((partial(session.components[name], given), 1))
        if session.decoder:
            steps = sum(name == session.decoder for name, _ in met)
            calls[session.decoder].append((partial(session.generate, session.infer(tensors), text), steps))
    session.exits = kept
    return calls


def torch_p50_ms(
    source: Artifact, inputs: Sequence[tuple[Tensors, str | Encoded | None]], threads: int
) -> float | None:
    """Median of the FP32 model in torch, one input at a time; None for a model that came as a graph."""
    import torch

    from edgemm.models import find_family, is_torch, open_fp32, read_model

    directory = source.path / "model"
    if not is_torch(directory):
        return None
    family = find_family(directory)
    session = open_fp32(family, read_model(family, directory), directory)
    torch.set_num_threads(threads)
    times, _ = measure.abba(lambda row: session.complete(*row), lambda row: None, inputs, 2)
    return statistics.median(times.flat)


def component_bytes(engine: Artifact) -> int:
    """Bytes of the compiled components, without tokenizer and program.json; of XML those that a bundle holds.

    Weights count whole: of a checkpoint in half precision those in FP32 would deflate, too, to half of their size.
    """
    files = {n: f.size_bytes for n, f in engine.manifest.files.items() if n not in ("tokenizer.json", "program.json")}
    graphs = {n: len(pack(n, (engine.path / n).read_bytes()).data) for n in files if n.endswith(".xml")}
    return sum((files | graphs).values())


def percentiles(times: NDArray[np.float64]) -> Percentiles:
    p50, p90, p99 = (float(v) for v in np.percentile(times, [50, 90, 99]))
    return Percentiles(p50_ms=p50, p90_ms=p90, p99_ms=p99)


def rounded(times: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(t), 3) for t in times.flat)
