"""device-report.json, schema 1: what device_runner.py measured, without a verdict. It comes from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.report.schema import BundleFile, Percentiles
from edgemm.yaml_files import Strict

Precision = Literal["fp16", "int8"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Milliseconds = Annotated[float, Field(gt=0)]
Clocks = dict[str, dict[str, int | str | None]]


class Measured(Strict):
    """NaN and infinity are no measurements."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class EngineFile(Measured):
    """One engine in the device's cache."""

    file: str
    sha256: Sha256
    size_bytes: int = Field(ge=1)


class Candidate(Measured):
    """The engine of one graph. `sqnr_db` of each output against FP32, None where it has NaN; `error` why it failed.

    build_s  of the build, also when the engine came from the cache; None where there is no engine
    """

    engine: EngineFile | None
    cached: bool
    build_s: float | None
    activation_bytes: int | None
    error: str | None
    sqnr_db: dict[str, float | None]
    passed: bool
    latency: Percentiles | None
    samples_ms: tuple[Milliseconds, ...]


class Speedup(Measured):
    p50: float
    ci95: tuple[float, float]


class DeviceComponent(Measured):
    """`shipped`: the candidate that the device keeps, and the `reason`; `int8_speedup` over FP16."""

    name: str
    shipped: Precision | None
    reason: str
    int8_speedup: Speedup | None
    candidates: dict[Precision, Candidate]


class Whole(Measured):
    """One input through all components."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    samples_ms: tuple[Milliseconds, ...] = Field(min_length=1)


class DeviceMemory(Measured):
    """MB (10^6 bytes) of a process that only runs the shipped engines; on an integrated GPU the two overlap."""

    host_peak_mb: float
    device_mb: float
    peak_mb: float


class Hardware(Measured):
    """What an engine is tied to; None where the system doesn't tell."""

    gpu: str
    compute_capability: str = Field(pattern=r"^\d+\.\d$")
    multiprocessors: int
    memory_bytes: int
    driver: int
    release: str | None
    tensorrt: str
    integrated: bool
    board: str | None


class Power(Measured):
    """nvpmodel's own words and the frequencies in /sys; None where there are none."""

    nvpmodel: str | None
    clocks_before: Clocks | None
    clocks_after: Clocks | None


class DeviceGate(Measured):
    name: str
    value: float | None
    limit: float
    held: bool | None


class DeviceReport(Measured):
    schema_: Literal[1] = Field(alias="schema")
    bundle: BundleFile
    model: str
    target: str
    runner_sha256: Sha256
    hardware: Hardware
    versions: dict[str, str]
    power: Power
    components: tuple[DeviceComponent, ...] = Field(min_length=1)
    whole: Whole | None
    memory: DeviceMemory | None
    gates: tuple[DeviceGate, ...]
    notes: tuple[str, ...]


def read_report(path: Path) -> DeviceReport:
    """A device-report.json that is whole; InputError says what in it is not."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"cannot read device report {path}: {e}", fix="give device_runner.py's report") from e
    return plugins.validate(DeviceReport, values, str(path))
