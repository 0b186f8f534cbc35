"""Verify: accuracy against the FP32 model, latency, memory and size against the FP32 graph; the verdict.

Nothing here needs torch but the torch latency, so that a device can complete or repeat a check.
"""

from __future__ import annotations

import io
import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.data import is_random, split
from edgemm.errors import InputError, ToolchainError
from edgemm.levels import simulation, unmeasured
from edgemm.parity import judge, read_reference
from edgemm.recipe import Recipe
from edgemm.report.schema import (
    Accuracy,
    BundleFile,
    ComponentLatency,
    Gate,
    Latency,
    Memory,
    Percentiles,
    Pruning,
    Samples,
    Size,
    TargetReport,
)
from edgemm.runtime import measure
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.session import Query, Session, Tensors, open_directory
from edgemm.target import Target
from edgemm.verdict import at_least, at_most, worst

LATENCY_INPUTS = 20
COMPONENT_INPUTS = 5
GOLDEN_TOLERANCE = 0.05


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
        notes = []
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
        inputs = [(session.tensors(q), q.text) for q in queries[:LATENCY_INPUTS]]
        latency = time_pair(fp32, session, inputs, recipe, target, source)
        memory = Memory(
            fp32_peak_mb=measure.peak_memory_mb(baseline.path, inputs[0][0]),
            compressed_peak_mb=measure.peak_memory_mb(engine.path, inputs[0][0]),
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


def verify_bundle(bundle: Path, data: str | None = None) -> TargetReport:
    """Repeat a bundle's check on this machine: golden outputs, then accuracy against the FP32 outputs inside.

    data   another place of the data that the bundle was verified on; it must have the same samples
    Raises InputError when the samples here are not those that the FP32 outputs belong to, ToolchainError when only
    a device can tell: device_report.py judges what it says.
    """
    content = read_bundle(bundle)
    if "device/spec.json" in content.files:
        raise ToolchainError(
            f"the engines of {bundle} are built and checked on the device",
            fix="run device_runner.py there, then edgemm verify BUNDLE --device-report device-report.json",
        )
    session = Session(content.files, content.manifest["program"], str(bundle))
    provenance = content.manifest["provenance"]
    recipe = plugins.validate(Recipe, provenance.get("recipe"), f"{bundle}: provenance.recipe")
    target = plugins.validate(Target, provenance.get("target"), f"{bundle}: provenance.target")
    if data is not None:
        recipe = recipe.model_copy(update={"data": data})
    gates = [golden_gate(session, content.files)]
    notes = ["latency, memory and size are not measured: a bundle does not carry the FP32 graph"]
    accuracy: tuple[Accuracy, ...] = ()
    if is_random(recipe):
        notes.append(f"accuracy is not measured: {recipe.data} is noise")
    else:
        _, samples = split(recipe, lambda: session.program)
        reference = read_reference(content.files["check.npz"])
        if [(s.id, s.group) for s in samples] != list(zip(reference.ids, reference.groups, strict=True)):
            raise InputError(
                f"{recipe.data} is not the data that {bundle} was verified on",
                fix="leave out --data, or give that data",
            )
        log(f"verify {target.name}: accuracy on {len(samples)} samples")
        accuracy = judge(session.outputs([s.query for s in samples]), reference, session.program, recipe)
    gates += accuracy_gates(accuracy, recipe)
    return TargetReport(
        name=target.name,
        verdict=worst([g.verdict for g in gates]),
        accuracy=accuracy,
        latency=None,
        memory=None,
        size=None,
        pruning=None,
        gates=tuple(gates),
        bundle=BundleFile(path=str(bundle), sha256=content.sha256),
        notes=tuple(notes),
    )


def golden_gate(session: Session, files: Mapping[str, bytes]) -> Gate:
    """Largest difference to the expected outputs of the golden inputs, relative to the largest output.

    Where the output is a text, the share of its letters that differ.
    """
    worst_error = 0.0
    expected = np.load(io.BytesIO(files["golden/expected.npz"]))
    for i, case in enumerate(json.loads(files["golden/inputs.json"])):
        got = session.outputs([golden_query(case, i, files)])
        for name, value in got.items():
            want = expected[f"{i}.{name}"]
            if value.dtype.kind == "U":
                error = 1 - SequenceMatcher(None, str(want[0]), str(value[0])).ratio() if name == "text" else 0.0
            else:
                error = float(np.abs(value - want).max() / np.abs(want).max())
            worst_error = max(worst_error, error)
    return Gate(
        name="golden outputs",
        value=worst_error,
        limit=GOLDEN_TOLERANCE,
        unit="relative",
        verdict=at_most(worst_error, GOLDEN_TOLERANCE),
        detail="largest difference to the outputs on the machine that packed the bundle",
    )


def golden_query(case: dict[str, Any], index: int, files: Mapping[str, bytes]) -> Query:
    """A golden input; see stages/package.py."""
    boxes = case.get("boxes")
    tensors = {n: np.load(io.BytesIO(files[f"golden/{index}.{n}.npy"])) for n in case.get("tensors", ())}
    return Query(
        image=files[case["image"]] if "image" in case else None,
        text=case.get("text"),
        audio=files[case["audio"]] if "audio" in case else None,
        boxes=tuple(tuple(b) for b in boxes) if boxes else None,
        tensors=tensors or None,
    )


def time_pair(
    fp32: Session,
    compressed: Session,
    inputs: Sequence[tuple[Tensors, str | None]],
    recipe: Recipe,
    target: Target,
    source: Artifact,
) -> Latency:
    """Both models in ABBA blocks on the same inputs, whole and each component alone; torch beside them.

    inputs   pre-processed tensors of a sample, and its text for models that go on from it
    """

    def whole(session: Session) -> Callable[[tuple[Tensors, str | None]], object]:
        return lambda row: session.complete(*row)

    a, b = measure.abba(whole(fp32), whole(compressed), inputs, recipe.verify.rounds)
    return Latency(
        fp32=percentiles(a),
        compressed=percentiles(b),
        speedup_p50=float(np.median(a) / np.median(b)),
        speedup_ci95=measure.ratio_interval(a, b, recipe.seed),
        baseline=f"FP32 graph in {target.backend}, precision f32, {target.threads} threads",
        threads=target.threads,
        torch_p50_ms=torch_p50_ms(source, inputs, target.threads),
        components=time_components(fp32, compressed, inputs, recipe),
        samples_ms=Samples(fp32=rounded(a), compressed=rounded(b)),
    )


def time_components(
    fp32: Session, compressed: Session, inputs: Sequence[tuple[Tensors, str | None]], recipe: Recipe
) -> tuple[ComponentLatency, ...]:
    """Each component alone, on the inputs that it meets in the FP32 model."""
    met: dict[str, list[Tensors]] = defaultdict(list)
    fp32.observe = lambda name, tensors: met[name].append(tensors)
    for row in inputs[:COMPONENT_INPUTS]:
        fp32.complete(*row)
    fp32.observe = None
    rows = []
    for name, calls in met.items():
        step = max(1, len(calls) // LATENCY_INPUTS)
        pair = fp32.components[name][1], compressed.components[name][1]
        a, b = measure.abba(*pair, calls[::step][:LATENCY_INPUTS], max(4, recipe.verify.rounds // 3))
        rows.append(
            ComponentLatency(
                name=name,
                fp32_p50_ms=float(np.median(a)),
                compressed_p50_ms=float(np.median(b)),
                speedup_p50=float(np.median(a) / np.median(b)),
                speedup_ci95=measure.ratio_interval(a, b, recipe.seed),
            )
        )
    return tuple(rows)


def torch_p50_ms(source: Artifact, inputs: Sequence[tuple[Tensors, str | None]], threads: int) -> float | None:
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


def accuracy_gates(rows: Sequence[Accuracy], recipe: Recipe) -> list[Gate]:
    """A gate a metric; one that can't pass when there is none."""
    if not rows:
        detail = f"not measured: {recipe.data} is noise"
        return [
            Gate(
                name="accuracy", value=None, limit=recipe.verify.margin, unit="", verdict="INCONCLUSIVE", detail=detail
            )
        ]
    return [
        Gate(
            name=f"{row.metric} drop",
            value=row.drop_ci95_upper,
            limit=row.margin,
            unit=row.unit,
            verdict=row.verdict,
            detail=f"{row.fp32:.4f} to {row.compressed:.4f}, one-sided 95 % bound on the drop "
            f"{row.drop_ci95_upper:.4f}, n {row.n} (needs {row.n_required})",
        )
        for row in rows
    ]


def budget_gates(target: Target, latency: Latency | None, memory: Memory | None, size: Size) -> list[Gate]:
    """A gate a budget; one whose quantity was not measured can't pass."""
    budgets = target.budgets
    gates = []
    if (limit := budgets.min_speedup) is not None:
        verdict, detail, speedup = "INCONCLUSIVE", "FP32 was not run", None
        if latency and latency.speedup_ci95:
            low, high = latency.speedup_ci95
            verdict, detail = at_least(latency.speedup_ci95, limit), f"95 % interval {low:.2f} to {high:.2f}"
            speedup = latency.speedup_p50
        gates.append(Gate(name="speed-up p50", value=speedup, limit=limit, unit="x", verdict=verdict, detail=detail))
    for name, value, most, unit in (
        ("latency p50", latency.compressed.p50_ms if latency else None, budgets.max_p50_ms, "ms"),
        ("peak memory", memory.compressed_peak_mb if memory else None, budgets.max_peak_mb, "MB"),
        ("size ratio", size.compressed_bytes / size.fp32_bytes, budgets.max_size_ratio, "of FP32"),
    ):
        if most is not None:
            verdict, detail = ("INCONCLUSIVE", "not measured") if value is None else (at_most(value, most), "at most")
            gates.append(Gate(name=name, value=value, limit=most, unit=unit, verdict=verdict, detail=detail))
    return gates


def component_bytes(engine: Artifact) -> int:
    """Bytes of the compiled components, without tokenizer and program.json."""
    return sum(f.size_bytes for n, f in engine.manifest.files.items() if n not in ("tokenizer.json", "program.json"))


def percentiles(times: NDArray[np.float64]) -> Percentiles:
    p50, p90, p99 = (float(v) for v in np.percentile(times, [50, 90, 99]))
    return Percentiles(p50_ms=p50, p90_ms=p90, p99_ms=p99)


def rounded(times: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(t), 3) for t in times.flat)


def host() -> dict[str, str]:
    """What a measurement depends on: CPU model, processors, system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8")
        names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
        cpu = f"{names[0]} x{len(names)}" if names else cpu
    return {"cpu": cpu, "system": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
