"""What report.json says of INT8: how it was found, what it costs and gains, what was proven of it."""

from __future__ import annotations

from typing import Literal

from edgemm.yaml_files import Strict

Smoothing = float | Literal["auto"]


class Trial(Strict):
    """One form of a component, on held-back calibration samples.

    smooth_quant, ranges  of its INT8;  int8  false where nothing is;  keep_float  what of it is not
    precision             of what is not INT8
    speedup               over FP32 in the same runtime, by processor time; None where the target is not timed here
    pareto                no other trial is as fast and as close to FP32;  chosen  what goes on
    """

    smooth_quant: Smoothing
    ranges: str
    sqnr_db: float
    int8: bool = True
    precision: str = "f32"
    keep_float: tuple[str, ...] = ()
    speedup: float | None = None
    pareto: bool = False
    chosen: bool = False


class Sensitivity(Strict):
    """What one product's INT8 costs and gains.

    gain_db    what the component's outputs gain when this product alone takes its activations unrounded
    alone_db   SQNR of the outputs when it alone takes them rounded
    saved_ms   its time in float less its time in INT8, on the target; None where that is not known
    """

    name: str
    gain_db: float
    alone_db: float | None = None
    saved_ms: float | None = None


class Tuned(Strict):
    """What edgemm/tuning.py chose for a component, and why.

    sqnr_db   of the component's outputs against FP32 on held-back calibration samples;  wanted_db  what was asked
    int8, precision, speedup   of the form that was chosen, see Trial
    """

    component: str
    wanted_db: float
    sqnr_db: float
    smooth_quant: Smoothing
    ranges: str
    keep_float: tuple[str, ...]
    trials: tuple[Trial, ...]
    sensitivity: tuple[Sensitivity, ...]
    int8: bool = True
    precision: str = "f32"
    speedup: float | None = None


class Settled(Strict):
    """Whether the ranges of a component's activations have settled: those of two halves of the samples, compared.

    tensors    activations that are INT8;  unsettled  those whose ranges differ by more than a quarter, the worst first
    """

    component: str
    samples: int
    tensors: int
    unsettled: tuple[str, ...]


class Saturation(Strict):
    """What was proven of a component's INT8 products on CPUs that add pairs of them in 16 bits (x86 without VNNI).

    isa        of the target, None: this machine's;  sixteen_bits  whether it is such a CPU
    proven     products that can't overflow whatever they are given
    unproven   the others, which such a CPU must not run, and one with VNNI may
    seven_bits, floats  what was changed for this target: weights of 7 bits; activations that are not rounded
    """

    component: str
    isa: str | None
    sixteen_bits: bool
    proven: tuple[str, ...]
    unproven: tuple[str, ...]
    seven_bits: tuple[str, ...]
    floats: tuple[str, ...]


class Share(Strict):
    """Of one component's FP32 time, by OpenVINO's counters, what is spent in products that are INT8 now.

    ceiling   1 / ((1 - share) + share / 4): the speed-up if INT8 took a quarter of FP32's time, and the rest all of it
    reached   speed-up measured, of this component alone; None where pruning has part in it
    """

    name: str
    fp32_ms: float
    share: float
    ceiling: float
    reached: float | None
