"""TensorRT on a CUDA device: one engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from edgemm.errors import ToolchainError
from edgemm.runtime import _tensorrt


def library() -> ModuleType:
    try:
        import tensorrt as trt
    except ImportError as e:
        raise ToolchainError(
            "TensorRT is not installed: graphs for a Jetson are made, linted and simulated here (L1), and the engine "
            "is built on the device",
            fix="nothing for compile: on-device; for compile: host install TensorRT beside the GPU",
        ) from e
    return trt


def compile_component(
    files: Mapping[str, bytes], component: dict[str, Any], settings: dict[str, Any]
) -> _tensorrt.Engine:
    """Load `component` from its engine; `settings` are built into that."""
    del settings
    return _tensorrt.load(library(), files, component, _tensorrt.Cuda())
