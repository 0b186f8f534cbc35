"""What a target file (targets/*.yaml) may say: backend, hardware facts, budgets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from edgemm.plugins import validate
from edgemm.recipe import Strict, override, read_yaml


class Budgets(Strict):
    """Limits that are part of the verdict; null means no limit.

    min_speedup     p50 of the FP32 graph in the same runtime over p50 of the compressed one
    max_p50_ms      median latency of one input, all components
    max_peak_mb     peak resident memory of a process that runs only the runtime
    max_size_ratio  bytes of the compiled model over bytes of the compiled FP32 model
    """

    min_speedup: float | None = Field(None, gt=0)
    max_p50_ms: float | None = Field(None, gt=0)
    max_peak_mb: float | None = Field(None, gt=0)
    max_size_ratio: float | None = Field(None, gt=0)


class Target(Strict):
    """One kind of device.

    precision   of the float parts, f32 unless the target says otherwise
    static      compile for one input at a time, shorter ones padded to the longest: on a CPU, kernels of
                a known shape are faster (1.6x for the INT8 reference model). false keeps batch and lengths dynamic
    """

    schema_: Literal[1] = Field(1, alias="schema")
    name: str
    description: str = ""
    backend: str
    threads: int = Field(2, ge=1)
    precision: Literal["f32", "bf16", "f16"] = "f32"
    static: bool = True
    budgets: Budgets = Budgets()


def load_target(name: str, overrides: dict[str, Any] | None = None) -> Target:
    """A target by name (targets/NAME.yaml, shipped with the package) or file."""
    values, where = read_yaml("targets", name)
    return validate(Target, override(values, overrides or {}, where), where)
