"""OpenVINO for x86: ONNX to IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgemm.errors import ToolchainError
from edgemm.target import Target

TOOLS = ("openvino",)


def compile_component(onnx_file: Path, out: Path, shapes: dict[str, list[int]]) -> None:
    """Convert one component to `out`/<name>.xml and .bin, weights at the precision that the graph has.

    shapes   fixed shape of each input by name; empty keeps them as exported
    """
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    model = ov.Core().read_model(str(onnx_file))  # not convert_model, which sends telemetry
    if shapes:
        model.reshape(shapes)
    ov.save_model(model, str(out / f"{onnx_file.stem}.xml"), compress_to_fp16=False)


def settings(target: Target) -> dict[str, Any]:
    """What the runtime needs to know of the target; see runtime/openvino.py."""
    return {"threads": target.threads, "precision": target.precision}


def doctor() -> str:
    """What OpenVINO can do on this machine; ToolchainError when it is absent."""
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return f"compiles and runs on this CPU: {', '.join(capabilities)}"
