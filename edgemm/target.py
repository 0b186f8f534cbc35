"""What a target file (targets/*.yaml) may say: backend, hardware facts, budgets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from edgemm.errors import InputError
from edgemm.host import Isa
from edgemm.plugins import validate
from edgemm.yaml_files import Strict, override, read_yaml

Level = Literal["L0", "L1", "L2", "L3"]
RTX_SM = (75, 80, 86, 89, 120, 121)  # what TensorRT-RTX 1.7 compiles for ahead of time
NO_FP8 = {72: "Xavier", 75: "Turing", 80: "Ampere", 86: "Ampere", 87: "Jetson Orin"}


class Budgets(Strict):
    """Limits that are part of the verdict; null means no limit.

    min_speedup     p50 of the FP32 graph in the same runtime over p50 of the compressed one
    max_p50_ms      median latency of one input, all components
    max_peak_mb     peak resident memory of a process that runs only the runtime
    max_size_ratio  bytes of the compiled model over bytes of the compiled FP32 model; of XML as a bundle holds it
    """

    min_speedup: float | None = Field(None, gt=0)
    max_p50_ms: float | None = Field(None, gt=0)
    max_peak_mb: float | None = Field(None, gt=0)
    max_size_ratio: float | None = Field(None, gt=0)


class Target(Strict):
    """One kind of device. The fields from `compile` on are TensorRT's.

    precision   of the float parts, f32 unless the target says otherwise; f16 for TensorRT
    static      compile for one input at a time, shorter ones padded to the longest: on a CPU, kernels of
                a known shape are faster (1.6x for the INT8 reference model). false keeps batch and lengths dynamic
    isa         instruction set for INT8 on an x86 device; null: this machine's. avx2 and avx512 have no VNNI, and get
                weights of 7 bits wherever 8 can't be proven not to overflow
    compile     host: the engine is built here; on-device: an engine of TensorRT runs where it was built alone
    sm          compute capabilities of the GPUs, 87 for 8.7
    jetpack, tensorrt   versions on the device
    opset_max   newest ONNX opset that the device's parser reads
    precisions  graphs that are made, in order of preference; the device keeps the fastest one that is right
    sparsity    2:4: the device's builder may use sparse kernels, for weights that `nm_sparsity` made so; FP16 alone
    shapes      [min, opt, max] of a dynamic axis by name, for the optimization profile; an axis that is not named
                gets its whole range, tuned for the largest, and `batch` one input at a time
    memory_mb   scratch memory that a layer may take, MiB;  power_mode  nvpmodel mode that is measured in
    level       what must be established for exit 0: L0 linted, L1 accuracy in simulation, L2 built, L3 measured
    """

    schema_: Literal[1] = Field(1, alias="schema")
    name: str
    description: str = ""
    backend: str
    threads: int = Field(2, ge=1)
    precision: Literal["f32", "bf16", "f16"] = "f32"
    static: bool = True
    isa: Isa | None = None
    compile: Literal["host", "on-device"] = "host"
    sm: tuple[int, ...] = ()
    jetpack: str | None = None
    tensorrt: str | None = None
    opset_max: int = Field(20, ge=19)
    precisions: tuple[Literal["int8", "fp16", "fp8"], ...] = ()
    sparsity: Literal["2:4"] | None = None
    shapes: dict[str, tuple[int, int, int]] = Field({})
    memory_mb: int | None = Field(None, ge=1)
    power_mode: str | None = None
    level: Level = "L3"
    budgets: Budgets = Budgets()

    @property
    def dialect(self) -> Literal["openvino", "onnxruntime", "tensorrt"]:
        """How Q/DQ must be written."""
        if self.backend == "onnxruntime":
            return "onnxruntime"
        return "tensorrt" if self.backend in ("tensorrt", "tensorrt_rtx") else "openvino"


def load_target(name: str, overrides: dict[str, Any] | None = None) -> Target:
    """A target by name (targets/NAME.yaml, shipped with the package) or file."""
    values, where = read_yaml("targets", name)
    target = validate(Target, override(values, overrides or {}, where), where)
    if (refusal := _refusal(target)) is not None:
        what, fix = refusal
        raise InputError(f"{where}: {what}", fix=fix)
    return target


def _refusal(target: Target) -> tuple[str, str] | None:
    """What of a target can't be, with the reason, and what to write instead."""
    if target.dialect != "tensorrt":
        fields = ("compile", "sm", "jetpack", "tensorrt", "precisions", "sparsity", "shapes")
        given = [f for f in fields if getattr(target, f) != Target.model_fields[f].default]
        if given:
            return f"{min(given)} means nothing to backend {target.backend}", f"leave {min(given)} out"
        if target.backend == "onnxruntime" and target.precision != "f32":
            return f"precision = {target.precision}: ONNX Runtime's CPU kernels compute in f32", "precision: f32"
        return None
    for axis, sizes in target.shapes.items():
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            return f"shapes.{axis} = {list(sizes)} is not min <= opt <= max", "give three sizes in order"
    if not target.sm:
        return "sm = []: no GPU is named", "give its compute capability, 87 for Jetson Orin"
    if target.isa:
        return f"isa = {target.isa}: a TensorRT target multiplies on the GPU", "leave isa out"
    if target.precision != "f16":
        return f"precision = {target.precision}: TensorRT graphs have an FP16 base", "precision: f16"
    if target.backend == "tensorrt_rtx":
        if unknown := sorted(set(target.sm) - set(RTX_SM)):
            return (
                f"sm = {unknown[0]}: TensorRT-RTX compiles for {', '.join(map(str, RTX_SM))}, and no Jetson is one",
                "backend: tensorrt and compile: on-device for a Jetson",
            )
        if target.compile == "on-device":
            return "compile = on-device: TensorRT-RTX builds ahead of time", "compile: host"
    if target.tensorrt and target.backend == "tensorrt" and int(target.tensorrt.partition(".")[0]) < 10:
        return (
            f"tensorrt = {target.tensorrt}: strongly typed INT8 graphs need TensorRT 10",
            "JetPack 6.1 or newer has it",
        )
    return _unsupported(target)


def _unsupported(target: Target) -> tuple[str, str] | None:
    """The combinations of precision, sparsity and hardware that don't exist, or gain nothing."""
    if "fp8" in target.precisions:
        without = [f"sm {s} ({NO_FP8[s]})" for s in target.sm if s in NO_FP8]
        reason = f"{without[0]} has no FP8 units" if without else "edgemm makes INT8 and FP16 graphs, and no FP8"
        return f"precisions: fp8: {reason}", "precisions: [int8, fp16]"
    if "fp16" not in target.precisions:
        return f"precisions = {list(target.precisions)}: FP16 is what INT8 must beat", "precisions: [int8, fp16]"
    if target.sparsity and "int8" in target.precisions:
        return (
            f"sparsity = {target.sparsity} with INT8: TensorRT picks no sparse kernels for graphs with Q/DQ "
            "(NVIDIA/TensorRT issue 4694)",
            "leave sparsity out; pruned attention heads make the INT8 products themselves smaller",
        )
    if target.sparsity and target.backend == "tensorrt_rtx":
        return f"sparsity = {target.sparsity}: TensorRT-RTX takes the flag and does nothing", "leave sparsity out"
    if target.sparsity and (before := [s for s in target.sm if s < 80]):
        return f"sparsity = {target.sparsity}: sm {before[0]} has no sparse tensor cores", "sm 80 or newer has them"
    return None
