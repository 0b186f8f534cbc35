"""ONNX Runtime on the CPU: the graph itself, its shapes fixed where the target is static."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgemm.errors import ToolchainError
from edgemm.target import Target

TOOLS = ("onnxruntime", "onnx")
ABSENT = "ONNX Runtime is not installed"
FIX = "pip install 'edgemm[onnxruntime]'"


def compile_component(
    onnx_file: Path, out: Path, shapes: Mapping[str, list[int | str]], target: Target, cache: Mapping[str, str]
) -> None:
    """Write `out`/<name>.onnx; ONNX Runtime optimizes it where it is loaded.

    shapes   shape of each input by name, with a name for an axis that stays dynamic; empty keeps all as exported
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  what compiles here must be able to run here
    except ImportError as e:
        raise ToolchainError(ABSENT, fix=FIX) from e
    model = onnx.load(onnx_file)
    for value in model.graph.input:
        for dim, axis in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, []), strict=False):
            if isinstance(axis, int):
                dim.dim_value = axis
    onnx.save(model, out / onnx_file.name)


def doctor() -> str:
    """What ONNX Runtime can do on this machine; ToolchainError when it is absent."""
    try:
        import onnxruntime
    except ImportError as e:
        raise ToolchainError(ABSENT, fix=FIX) from e
    return f"{onnxruntime.__version__}: compiles and runs on this CPU"
