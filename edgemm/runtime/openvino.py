"""OpenVINO IR on the CPU: one compiled component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError, ToolchainError

Tensors = Mapping[str, Any]


def compile_component(
    files: Mapping[str, bytes], component: dict[str, Any], settings: dict[str, Any]
) -> Callable[[Tensors], dict[str, Any]]:
    """Compile `component` from its .xml and .bin; the returned call maps named inputs to named outputs.

    settings   threads; precision: INFERENCE_PRECISION_HINT of the float parts, if the component has none of its own.
               Left to itself the CPU plugin picks bf16 where the CPU has it, so it is always set.

    The returned arrays are the component's own buffers, valid until its next call; an array that it is given again
    is not read again. What the graph keeps from call to call (a decoder's cache) is returned as a Kept.
    """
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    core = ov.Core()
    xml, weights = (files[f"{component['name']}.{suffix}"] for suffix in ("xml", "bin"))
    try:
        model = core.read_model(xml, ov.Tensor(np.frombuffer(weights, np.uint8)))
    except RuntimeError as e:
        what = f"{component['name']}: OpenVINO can't load it: {' '.join(str(e).split())}"[:500]
        raise InputError(what, fix="run edgemm compress again, or pip install --upgrade openvino") from e
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": component.get("precision") or settings["precision"],
        "INFERENCE_NUM_THREADS": settings["threads"],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if model.get_sinks():
        # A decoder's time is that of reading its weights: quantizing one token's activations only costs.
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    request = core.compile_model(model, "CPU", options).create_infer_request()
    inputs, outputs = ([port["name"] for port in component[side]] for side in ("inputs", "outputs"))
    states = {state.name: state for state in request.query_state()}
    kept = {i: (o, Kept(states[i + o])) for i in inputs for o in outputs if i + o in states}
    computed = [name for name in outputs if name not in {o for o, _ in kept.values()}]
    bound: dict[str, tuple[Any, NDArray[Any]]] = {}  # what was given, and the memory that the engine reads

    def call(tensors: Tensors) -> dict[str, Any]:
        for name in inputs:
            value = tensors[name]
            if name in kept:
                if value is not kept[name][1]:
                    kept[name][1].state.state = ov.Tensor(np.ascontiguousarray(value))
            elif name not in bound or value is not bound[name][0]:
                # A view may be one of this engine's own buffers, which it writes to.
                bound[name] = value, np.ascontiguousarray(value) if value.base is None else np.array(value, order="C")
                request.set_tensor(name, ov.Tensor(bound[name][1], shared_memory=True))
        request.start_async()
        request.wait()
        return {name: request.get_tensor(name).data for name in computed} | dict(kept.values())

    return call


class Kept:
    """A tensor that stays in the engine: handed back in the next call it costs nothing; numpy can read it."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.state.state.data, dtype)

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        return np.asarray(self)[rows]
