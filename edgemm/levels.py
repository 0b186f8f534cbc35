"""What a run establishes of an engine that this host can build, or only prepare, and not run.

L0  the graph was linted for the target's parser
L1  its INT8 graph was simulated in ONNX Runtime on the CPU, and judged against the FP32 model
L2  its engine was built ahead of time
L3  it was measured on the device
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgemm.artifact import Artifact
from edgemm.report.schema import Accuracy, Gate, Layers, Pruning, Size, TargetReport, Verdict
from edgemm.runtime import onnxruntime
from edgemm.runtime.session import Directory, Session
from edgemm.target import Level, Target
from edgemm.verdict import budget_gates, worst

UNMEASURED: tuple[Verdict, str] = ("UNVERIFIED", "to be measured on the device")


class Graphs(Directory):
    """The files of an engine artifact, <component>.onnx standing for the graph of the preferred precision."""

    def __init__(self, engine: Artifact, precision: str) -> None:
        super().__init__(engine.path)
        self.precision = precision

    def __getitem__(self, name: str) -> bytes:
        return super().__getitem__(name.replace(".onnx", f".{self.precision}.onnx"))


def simulation(engine: Artifact, target: Target) -> Session:
    """The graph of the preferred precision in ONNX Runtime, its Q/DQ computed as written and not fused away."""
    files = Graphs(engine, precision_of(engine, target))
    settings = {"threads": target.threads, "qdq": "as written"}
    program = {**engine.json("program.json"), "backend": "onnxruntime"}
    return Session(files, program, str(engine.path), lambda spec: onnxruntime.compile_component(files, spec, settings))


def precision_of(engine: Artifact, target: Target) -> str:
    """The first of the target's precisions that was made; without a quantizer in the recipe that is not int8."""
    return next(p for p in target.precisions if any(n.endswith(f".{p}.onnx") for n in engine.manifest.files))


def unmeasured(
    engine: Artifact,
    baseline: Artifact,
    target: Target,
    accuracy: tuple[Accuracy, ...],
    gates: Sequence[Gate],
    pruning: Pruning | None,
    notes: Sequence[str],
) -> TargetReport:
    """The report of an engine that did not run: UNVERIFIED at best, latency and memory null.

    gates   of the accuracy in simulation
    """
    precision = precision_of(engine, target)
    built = sorted(n for n in engine.manifest.files if n.endswith(".engine"))
    level: Level = "L2" if built else "L1"
    if not accuracy:
        level = "L0"
    size = None
    if built:
        mine = [n for n in built if n.endswith(f".{precision}.engine")]
        size = Size(fp32_bytes=_bytes(baseline, ".engine"), compressed_bytes=_bytes(engine, *mine))
    all_gates = (*gates, *budget_gates(target, None, None, size, absent=UNMEASURED))
    return TargetReport(
        name=target.name,
        verdict=worst([*(g.verdict for g in all_gates), "UNVERIFIED"]),
        accuracy=accuracy,
        size=size,
        pruning=pruning,
        gates=all_gates,
        level=level,
        level_asked=target.level,
        established=sentence(target, precision, bool(accuracy), bool(built), engine.manifest.versions),
        layers=layers(engine),
        notes=tuple(notes),
    )


def sentence(target: Target, precision: str, judged: bool, built: bool, versions: dict[str, str]) -> str:
    """What was established, and what was not."""
    name = precision.upper()
    graphs = f"the graphs were linted for the ONNX parser of TensorRT (opset {target.opset_max} at most)"
    done = [f"L0: {graphs}"]
    if judged:
        done.append(f"L1: accuracy is that of the {name} graph simulated in ONNX Runtime on the CPU")
    if built:
        version = next((v for n, v in versions.items() if n.startswith("tensorrt") and v != "absent"), "")
        where = ", ".join(f"sm{s}" for s in target.sm)
        done.append(f"L2: engines were built ahead of time by {target.backend} {version} for {where}")
    missing = [] if judged else ["accuracy"]
    missing += [] if built else ["whether the engine builds on the device"]
    return (
        f"{'; '.join(done)}. Not established, for want of the device (L3): {', '.join(missing)}"
        f"{', ' if missing else ''}latency, memory, and that the engine's answers are the simulation's."
    )


def layers(engine: Artifact) -> tuple[Layers, ...]:
    """What each engine computes how."""
    rows: dict[str, dict[str, Any]] = engine.json("layers.json")
    return tuple(
        Layers(component=stem.rpartition(".")[0], precision=stem.rpartition(".")[2], **counts)
        for stem, counts in rows.items()
    )


def _bytes(artifact: Artifact, *suffixes: str) -> int:
    return sum(f.size_bytes for n, f in artifact.manifest.files.items() if n.endswith(suffixes))
