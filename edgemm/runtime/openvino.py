"""OpenVINO IR on the CPU: one compiled component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import ToolchainError

Tensors = Mapping[str, NDArray[Any]]


def compile_component(
    files: Mapping[str, bytes], component: dict[str, Any], settings: dict[str, Any]
) -> Callable[[Tensors], dict[str, NDArray[Any]]]:
    """Compile `component` from its .xml and .bin; the returned call maps named inputs to named outputs.

    settings   threads; precision: INFERENCE_PRECISION_HINT of the float parts. Left to itself the CPU
               plugin picks bf16 where the CPU has it, so it is always set.

    The returned arrays are the component's own buffers, valid until its next call.
    """
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    core = ov.Core()
    xml, weights = (files[f"{component['name']}.{suffix}"] for suffix in ("xml", "bin"))
    model = core.read_model(xml, ov.Tensor(np.frombuffer(weights, np.uint8)))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": settings["precision"],
            "INFERENCE_NUM_THREADS": settings["threads"],
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    inputs = [port["name"] for port in component["inputs"]]
    outputs = [port["name"] for port in component["outputs"]]

    def call(tensors: Tensors) -> dict[str, NDArray[Any]]:
        results = request.infer({n: tensors[n] for n in inputs}, share_inputs=True, share_outputs=True)
        return {n: results[n] for n in outputs}

    return call
