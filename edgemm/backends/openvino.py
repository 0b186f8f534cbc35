"""OpenVINO for x86: ONNX to IR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgemm.errors import ToolchainError
from edgemm.target import Target

TOOLS = ("openvino",)


def compile_component(
    onnx_file: Path, out: Path, shapes: Mapping[str, list[int | str]], target: Target, cache: Mapping[str, str]
) -> None:
    """Convert one component to `out`/<name>.xml and .bin.

    shapes   shape of each input by name, with a name for an axis that stays dynamic; empty keeps all as exported
    cache    input -> the output that comes back as it in the next call: the graph keeps it (OpenVINO's variables)
    Where the target computes in bf16, which has fewer bits yet, float weights are stored in FP16, half the size.
    """
    try:
        import openvino as ov
        from openvino.passes import MakeStateful, Manager
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    model = ov.Core().read_model(str(onnx_file))  # not convert_model, which sends telemetry
    if shapes:
        model.reshape({n: [-1 if isinstance(axis, str) else axis for axis in shape] for n, shape in shapes.items()})
    if cache:
        passes = Manager()
        passes.register_pass(MakeStateful(dict(cache)))
        passes.run_passes(model)
    ov.save_model(model, str(out / f"{onnx_file.stem}.xml"), compress_to_fp16=target.precision == "bf16")


def doctor() -> str:
    """What OpenVINO can do on this machine; ToolchainError when it is absent."""
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return f"compiles and runs on this CPU: {', '.join(capabilities)}"
