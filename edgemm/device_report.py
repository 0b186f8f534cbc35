"""What a device measured, joined to what was proven where its bundle was made: the verdict.

The limits are those of the bundle, never of the report; percentiles and the choice of engines are worked out anew
from the report's samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm import plugins
from edgemm.device import device_runner
from edgemm.device import files as device_files
from edgemm.errors import InputError
from edgemm.recheck import origin
from edgemm.report.device import Candidate, DeviceComponent, DeviceReport, read_report
from edgemm.report.schema import (
    Accuracy,
    BundleFile,
    ComponentLatency,
    Gate,
    Latency,
    Memory,
    Samples,
    Size,
    TargetReport,
)
from edgemm.runtime.bundle import read_bundle
from edgemm.stages.verify import percentiles
from edgemm.verdict import accuracy_gates, budget_gates, worst

NO_FP32 = "FP32 was not run on the device"
HAND_MADE = "run device_runner.py on the device again, and leave its report as it is"


def verify_device(path: Path, report: Path) -> TargetReport:
    """The verdict on a bundle by the device-report.json of the device that it was made for.

    Raises InputError when the report is damaged, or of another bundle.
    """
    bundle = read_bundle(path)
    measured = read_report(report)
    if "device/spec.json" not in bundle.files:
        raise InputError(f"{path} has no engines to build on a device", fix="edgemm verify BUNDLE, without a report")
    if measured.bundle.sha256 != bundle.sha256:
        raise InputError(
            f"{report} is of a bundle with SHA-256 {measured.bundle.sha256[:12]}, and {path} has {bundle.sha256[:12]}",
            fix="run device_runner.py on this very bundle",
        )
    spec = json.loads(bundle.files["device/spec.json"])
    if int(measured.hardware.compute_capability.replace(".", "")) not in spec["sm"]:
        raise InputError(
            f"{report} is of compute capability {measured.hardware.compute_capability}, and the bundle is for sm "
            f"{', '.join(map(str, spec['sm']))}",
            fix="run device_runner.py on the device that the bundle was made for",
        )
    if [c.name for c in measured.components] != list(spec["components"]):
        raise InputError(f"{report} has not the components {', '.join(spec['components'])}", fix=HAND_MADE)
    recipe, target = origin(bundle, path)
    accuracy = tuple(
        plugins.validate(Accuracy, row, f"{path}: certificate.accuracy")
        for row in bundle.manifest["certificate"].get("accuracy", ())
    )
    gates = [g for c in measured.components for g in component_gates(c, spec["components"][c.name], report)]
    size = Size(fp32_bytes=spec["fp32_bytes"], compressed_bytes=sum(engine_bytes(c) for c in measured.components))
    peak = measured.memory and measured.memory.peak_mb
    memory = None if peak is None else Memory(fp32_peak_mb=None, compressed_peak_mb=peak)
    latency = latency_of(measured)
    gates += [*accuracy_gates(accuracy, recipe), *budget_gates(target, latency, memory, size)]
    return TargetReport(
        name=target.name,
        verdict=worst([g.verdict for g in gates]),
        accuracy=accuracy,
        latency=latency,
        memory=memory,
        size=size,
        gates=tuple(gates),
        bundle=BundleFile(path=str(path), sha256=bundle.sha256),
        level="L3",
        level_asked=target.level,
        established=established(measured),
        notes=notes(measured),
    )


def component_gates(component: DeviceComponent, spec: Any, where: Path) -> list[Gate]:
    """A gate for each output of the engine that is shipped; one that fails where there is none.

    Raises InputError when the report's own figures would ship another candidate.
    """
    if component.candidates.keys() != spec["candidates"].keys():
        raise InputError(f"{where}: {component.name} has not the candidates of the bundle", fix=HAND_MADE)
    limits = {precision: spec["candidates"][precision]["min_sqnr_db"] for precision in component.candidates}
    passing = [p for p, c in component.candidates.items() if passes(c, limits[p])]
    speedup = None
    if len(passing) == 2:
        fp16, int8 = (in_rounds(component.candidates[p].samples_ms, where) for p in sorted(passing))
        speedup = device_runner.ratio_interval(fp16, int8)
    shipped, reason = device_runner.choose([str(p) for p in passing], speedup)
    if component.shipped != shipped:
        raise InputError(f"{where}: {component.name} ships {component.shipped}, but {reason}", fix=HAND_MADE)
    if component.shipped is None:
        why = "; ".join(f"{p}: {c.error}" for p, c in component.candidates.items())
        return [Gate(name=f"{component.name} engine", value=0, limit=1, unit="engines", verdict="FAIL", detail=why)]
    return [
        Gate(
            name=f"{component.name} {component.shipped} {output}",
            value=component.candidates[component.shipped].sqnr_db[output],
            limit=limit,
            unit="dB",
            verdict="PASS",
            detail="SQNR against FP32 on the device, at least",
        )
        for output, limit in limits[component.shipped].items()
    ]


def passes(candidate: Candidate, limits: dict[str, float]) -> bool:
    """Whether there is an engine that was timed and whose every output is near enough to FP32's."""
    found = {output: candidate.sqnr_db.get(output) for output in limits}
    near = all(db is not None and db >= limits[output] for output, db in found.items())
    return bool(candidate.engine and candidate.samples_ms and near)


def in_rounds(samples_ms: tuple[float, ...], where: Path) -> NDArray[np.float64]:
    """ms[rounds, samples of a round], as the runner measured them."""
    if len(samples_ms) % (2 * device_runner.BLOCK):
        raise InputError(f"{where}: {len(samples_ms)} latencies are no whole rounds", fix=HAND_MADE)
    return np.array(samples_ms).reshape(-1, 2 * device_runner.BLOCK)


def engine_bytes(component: DeviceComponent) -> int:
    engine = component.candidates[component.shipped].engine if component.shipped else None
    return engine.size_bytes if engine else 0


def latency_of(measured: DeviceReport) -> Latency | None:
    """Of one input through all components; None where the device could not measure that."""
    if measured.whole is None:
        return None
    rows = [(c.name, c.candidates[c.shipped].samples_ms) for c in measured.components if c.shipped]
    return Latency(
        fp32=None,
        compressed=percentiles(np.array(measured.whole.samples_ms)),
        speedup_p50=None,
        speedup_ci95=None,
        baseline=NO_FP32,
        threads=None,
        torch_p50_ms=None,
        components=tuple(
            ComponentLatency(
                name=name,
                fp32_p50_ms=None,
                compressed_p50_ms=float(np.median(samples)),
                speedup_p50=None,
                speedup_ci95=None,
            )
            for name, samples in rows
        ),
        samples_ms=Samples(fp32=(), compressed=measured.whole.samples_ms),
    )


def established(measured: DeviceReport) -> str:
    """What was established on the device, and what was not."""
    hardware, mode = measured.hardware, (measured.power.nvpmodel or "unknown").replace("\n", ", ")
    return (
        f"L3: measured on {hardware.board or hardware.gpu}, compute capability {hardware.compute_capability}, TensorRT "
        f"{hardware.tensorrt}, driver {hardware.driver}, power mode {mode}: latency, memory, and each engine's outputs "
        f"against FP32's on {device_files.CASES} inputs at most. Accuracy is that of the simulation, whose outputs the "
        f"engines come near to. Not established: the speed-up over FP32, for {NO_FP32}."
    )


def notes(measured: DeviceReport) -> tuple[str, ...]:
    """Which engines are kept, and what the runner had to say."""
    choices = (f"{c.name}: {c.shipped or 'no engine'}: {c.reason}" for c in measured.components)
    return (*choices, *measured.notes)
