"""TensorRT 10 and 11: Jetson and servers, whose engines are built on the device that runs them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgemm.backends import _tensorrt
from edgemm.backends._tensorrt_counts import count
from edgemm.runtime.tensorrt import library
from edgemm.target import Target

TOOLS = ("tensorrt", "onnx")


def compile_component(
    onnx_file: Path, out: Path, shapes: _tensorrt.Profile, target: Target, cache: Mapping[str, str]
) -> dict[str, Any]:
    """The graph itself, linted, for the device to build from; with `compile: host`, the engine too.

    What comes back is what the graph asks for; what an engine makes of it is known where one is built.
    """
    if target.compile == "host":
        return _tensorrt.compile_engine(library(), onnx_file, out, shapes, target)
    model = _tensorrt.check(onnx_file, shapes, target)
    shutil.copyfile(onnx_file, out / onnx_file.name)
    return count(model, None)


def doctor() -> str:
    """What TensorRT can do on this machine; ToolchainError when it is absent."""
    return f"{library().__version__}: {_tensorrt.where_it_runs()}"
