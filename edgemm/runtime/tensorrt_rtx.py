"""TensorRT-RTX on a CUDA device: one engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from edgemm.errors import ToolchainError
from edgemm.runtime import _tensorrt


def library() -> ModuleType:
    try:
        import tensorrt_rtx_bindings as trt
    except ImportError as e:
        raise ToolchainError("TensorRT-RTX is not installed", fix="pip install 'edgemm[tensorrt-rtx]'") from e
    return trt


def compile_component(
    files: Mapping[str, bytes], component: dict[str, Any], settings: dict[str, Any]
) -> _tensorrt.Engine:
    """Load `component` from its engine; `settings` are built into that."""
    del settings
    return _tensorrt.load(library(), files, component, _tensorrt.Cuda())
