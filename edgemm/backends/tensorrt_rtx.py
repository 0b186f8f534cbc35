"""TensorRT-RTX for desktop GPUs: engines built ahead of time, in a machine that may have no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemm.backends import _tensorrt
from edgemm.runtime.tensorrt_rtx import library
from edgemm.target import RTX_SM, Target

TOOLS = ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings", "onnx")


def compile_component(
    onnx_file: Path, out: Path, shapes: _tensorrt.Profile, target: Target, cache: Mapping[str, str]
) -> dict[str, Any]:
    """Build `out`/<component>.<precision>.engine of <component>.<precision>.onnx; what the engine is made of."""
    return _tensorrt.compile_engine(library(), onnx_file, out, shapes, target)


def doctor() -> str:
    """What TensorRT-RTX can do on this machine; ToolchainError when it is absent."""
    trt = library()
    return (
        f"{trt.__version__}: builds for sm {', '.join(map(str, RTX_SM))} ahead of time (L2); "
        f"{_tensorrt.where_it_runs()}"
    )
