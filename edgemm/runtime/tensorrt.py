"""TensorRT on a CUDA device: one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from edgemm.errors import ToolchainError
from edgemm.runtime import _tensorrt


def compile_component(
    files: Mapping[str, bytes], component: dict[str, Any], settings: dict[str, Any]
) -> Callable[[_tensorrt.Tensors], dict[str, NDArray[Any]]]:
    """Load `component` from its engine; the returned call maps named inputs to named outputs.

    settings   of the program; an engine has them built in
    """
    del settings
    try:
        import tensorrt as trt
    except ImportError as e:
        raise ToolchainError(
            "TensorRT is not installed", fix="nothing for a Jetson but JetPack; elsewhere pip install tensorrt"
        ) from e
    return _tensorrt.load(trt, _tensorrt.engine_of(files, component["name"]), component, _tensorrt.Cuda())
