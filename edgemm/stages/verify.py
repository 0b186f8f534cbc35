"""Verify: accuracy against the FP32 model, latency, memory and size against the FP32 graph; the verdict.

Nothing here needs torch but the torch latency, so that a device can complete or repeat a check.
"""

from __future__ import annotations

import io
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.data import Sample, split
from edgemm.errors import InputError
from edgemm.recipe import Recipe, Verify
from edgemm.report.schema import (
    Accuracy,
    BundleFile,
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
from edgemm.verdict import at_least, at_most, compare, worst

LATENCY_INPUTS = 20
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
        _, samples = split(recipe.data, recipe.calibration, recipe.seed, recipe.verify.limit)
        reference = np.load(source.path / "reference.npz")
        session = open_directory(engine.path)
        log(f"verify {target.name}: accuracy on {len(samples)} samples")
        outputs = session.logits([Query(s.image, s.text) for s in samples])
        accuracy = judge(outputs, reference, recipe.verify, recipe.seed)
        log(f"verify {target.name}: latency and memory against the FP32 graph")
        latency = time_pair(open_directory(baseline.path), session, samples, recipe, target, source)
        memory = Memory(
            fp32_peak_mb=measure.peak_memory_mb(baseline.path), compressed_peak_mb=measure.peak_memory_mb(engine.path)
        )
        size = Size(fp32_bytes=component_bytes(baseline), compressed_bytes=component_bytes(engine))
        gates = (*accuracy_gates(accuracy), *budget_gates(target, latency, memory, size))
        report = TargetReport(
            name=target.name,
            verdict=worst([g.verdict for g in gates]),
            accuracy=accuracy,
            latency=latency,
            memory=memory,
            size=size,
            pruning=pruning,
            gates=gates,
            bundle=None,
        )
        (out / "target.json").write_text(report.model_dump_json(), encoding="utf-8")

    return build(
        "verified",
        runs,
        parents=[engine, baseline, source],
        config={
            "verify": recipe.verify.model_dump(mode="json"),
            "target": target.model_dump(mode="json"),
            "host": host(),
        },
        tools=("numpy", "easy-vqa"),
        make=make,
    )


def verify_bundle(bundle: Path, data: str | None = None) -> TargetReport:
    """Repeat a bundle's check on this machine: golden outputs, then accuracy against the FP32 outputs inside.

    data   another data set than the one the bundle was verified on; it must have the same samples
    Raises InputError when the samples here are not those that the FP32 outputs belong to.
    """
    content = read_bundle(bundle)
    session = Session(content.files, content.manifest["program"], str(bundle))
    provenance = content.manifest["provenance"]
    recipe = plugins.validate(Recipe, provenance.get("recipe"), f"{bundle}: provenance.recipe")
    target = plugins.validate(Target, provenance.get("target"), f"{bundle}: provenance.target")
    golden = golden_gate(session, content.files)
    _, samples = split(data or recipe.data, recipe.calibration, recipe.seed, recipe.verify.limit)
    reference = np.load(io.BytesIO(content.files["check.npz"]))
    if [s.id for s in samples] != reference["ids"].tolist():
        raise InputError(f"{data or recipe.data} is not the data that {bundle} was verified on", fix="leave out --data")
    log(f"verify {target.name}: accuracy on {len(samples)} samples")
    outputs = session.logits([Query(s.image, s.text) for s in samples])
    accuracy = judge(outputs, reference, recipe.verify, recipe.seed)
    gates = (golden, *accuracy_gates(accuracy))
    return TargetReport(
        name=target.name,
        verdict=worst([g.verdict for g in gates]),
        accuracy=accuracy,
        latency=None,
        memory=None,
        size=None,
        pruning=None,
        gates=gates,
        bundle=BundleFile(path=str(bundle), sha256=content.sha256),
        notes=("latency, memory and size are not measured: a bundle does not carry the FP32 graph",),
    )


def golden_gate(session: Session, files: Mapping[str, bytes]) -> Gate:
    """Largest difference to the expected outputs of the golden inputs, relative to the largest output."""
    worst_error = 0.0
    for case in json.loads(files["golden/expected.json"]):
        answer = session.run(image=files[case["image"]], text=case["text"])
        expected = np.array(case["logits"])
        worst_error = max(worst_error, float(np.abs(answer.logits - expected).max() / np.abs(expected).max()))
    return Gate(
        name="golden outputs",
        value=worst_error,
        limit=GOLDEN_TOLERANCE,
        unit="relative",
        verdict=at_most(worst_error, GOLDEN_TOLERANCE),
        detail="largest difference to the outputs on the machine that packed the bundle",
    )


def judge(
    outputs: NDArray[Any], recorded: Mapping[str, NDArray[Any]], recipe: Verify, seed: int
) -> tuple[Accuracy, ...]:
    """Every metric of the recipe with its verdict.

    outputs   float32[n,A] of the compressed model
    recorded  logits float32[n,A] of the FP32 model; labels, groups [n]; see stages/load.py
    """
    reference, labels, groups = recorded["logits"], recorded["labels"], recorded["groups"]
    if not np.isfinite(outputs).all():
        raise InputError(f"the compressed model gives {outputs[~np.isfinite(outputs)][0]}", fix="quantize less of it")
    noise = float(((outputs - reference) ** 2).sum())
    sqnr_db = 10 * float(np.log10(float((reference**2).sum()) / noise)) if noise else 200.0
    rows = []
    for limit in recipe.metrics:
        metric = plugins.plugin("metrics", limit.use)
        before, after = metric.values(reference, reference, labels), metric.values(outputs, reference, labels)
        paired = compare(before, after, groups, margin=limit.margin, seed=seed, resamples=recipe.resamples)
        rows.append(
            Accuracy(
                metric=limit.use,
                unit=metric.UNIT,
                n=paired.n,
                clusters=paired.clusters,
                n_required=paired.n_required,
                fp32=float(before.mean()),
                compressed=float(after.mean()),
                drop=paired.drop,
                drop_ci95_upper=paired.upper,
                margin=limit.margin,
                flips=float((outputs.argmax(1) != reference.argmax(1)).mean()),
                sqnr_db=sqnr_db,
                verdict=paired.verdict,
            )
        )
    return tuple(rows)


def time_pair(
    fp32: Session, compressed: Session, samples: Sequence[Sample], recipe: Recipe, target: Target, source: Artifact
) -> Latency:
    """Both models in ABBA blocks on the same inputs; torch beside them."""
    inputs: list[Tensors] = [
        {**compressed.image_tensors(s.image), **compressed.text_tensors(s.text)} for s in samples[:LATENCY_INPUTS]
    ]
    a, b = measure.abba(fp32.infer, compressed.infer, inputs, recipe.verify.rounds)
    return Latency(
        fp32=percentiles(a),
        compressed=percentiles(b),
        speedup_p50=float(np.median(a) / np.median(b)),
        speedup_ci95=measure.ratio_interval(a, b, recipe.seed),
        baseline=f"FP32 graph in {target.backend}, precision {target.precision}, {target.threads} threads",
        threads=target.threads,
        torch_p50_ms=torch_p50_ms(source, inputs, target.threads),
        samples_ms=Samples(fp32=rounded(a), compressed=rounded(b)),
    )


def torch_p50_ms(source: Artifact, inputs: Sequence[Tensors], threads: int) -> float:
    """Median of the FP32 model in torch, one input at a time."""
    import torch

    from edgemm.models import find_family, read_model

    directory = source.path / "model"
    model = read_model(find_family(directory), directory)
    torch.set_num_threads(threads)
    tensors = [{n: torch.from_numpy(v) for n, v in row.items()} for row in inputs]
    with torch.inference_mode():
        times, _ = measure.abba(lambda row: model(**row), lambda row: None, tensors, 2)
    return statistics.median(times.flat)


def accuracy_gates(rows: Sequence[Accuracy]) -> list[Gate]:
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


def budget_gates(target: Target, latency: Latency, memory: Memory, size: Size) -> list[Gate]:
    budgets = target.budgets
    low, high = latency.speedup_ci95
    gates = []
    if (limit := budgets.min_speedup) is not None:
        verdict, detail = at_least(latency.speedup_ci95, limit), f"95 % interval {low:.2f} to {high:.2f}"
        speedup = latency.speedup_p50
        gates.append(Gate(name="speed-up p50", value=speedup, limit=limit, unit="x", verdict=verdict, detail=detail))
    for name, value, most, unit in (
        ("latency p50", latency.compressed.p50_ms, budgets.max_p50_ms, "ms"),
        ("peak memory", memory.compressed_peak_mb, budgets.max_peak_mb, "MB"),
        ("size ratio", size.compressed_bytes / size.fp32_bytes, budgets.max_size_ratio, "of FP32"),
    ):
        if most is not None:
            verdict = at_most(value, most)
            gates.append(Gate(name=name, value=value, limit=most, unit=unit, verdict=verdict, detail="at most"))
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
