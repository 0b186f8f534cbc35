"""ONNX Runtime on the CPU: one component as it was exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import ToolchainError


def compile_component(
    files: Mapping[str, bytes], component: dict[str, Any], settings: dict[str, Any]
) -> Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """Load `component` from its .onnx; the returned call maps named inputs to named outputs.

    settings   threads; qdq: "as written" computes Q and DQ in float, one by one, and fuses none into integer kernels
    """
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise ToolchainError("ONNX Runtime is not installed", fix="pip install onnxruntime") from e
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    if settings.get("qdq") == "as written":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(files[f"{component['name']}.onnx"], options, providers=["CPUExecutionProvider"])
    inputs = [port["name"] for port in component["inputs"]]
    outputs = [port["name"] for port in component["outputs"]]

    def call(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        results = session.run(outputs, {n: np.asarray(tensors[n]) for n in inputs})
        return dict(zip(outputs, results, strict=True))

    return call
