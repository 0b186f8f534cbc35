"""ONNX Runtime on the CPU: one component as it was exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError, ToolchainError


class Graph:
    """A loaded graph, which any number of threads may call at once: named inputs to named outputs."""

    def __init__(self, session: Any, component: dict[str, Any], failures: tuple[type[Exception], ...]) -> None:
        self.session, self.failures, self.name = session, failures, component["name"]
        self.inputs = {port["name"]: port["dtype"] for port in component["inputs"]}
        self.outputs = [port["name"] for port in component["outputs"]]

    def __call__(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            results = self.session.run(self.outputs, {n: np.asarray(tensors[n], d) for n, d in self.inputs.items()})
        except self.failures as e:
            raise InputError(f"{self.name}: ONNX Runtime can't run it: {e}", fix="see what its inputs may be") from e
        return dict(zip(self.outputs, results, strict=True))

    def another(self) -> Graph:
        return self


def compile_component(files: Mapping[str, bytes], component: dict[str, Any], settings: dict[str, Any]) -> Graph:
    """Load `component` from its .onnx.

    settings   threads; precision: f32 is all that its CPU kernels have
               qdq: "as written" computes Q and DQ in float, one by one, and fuses none into integer kernels

    Raises InputError in ONNX Runtime's words for a graph that it can't load or run.
    """
    try:
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_pybind11_state as errors
    except ImportError as e:
        raise ToolchainError("ONNX Runtime is not installed", fix="pip install 'edgemm[onnxruntime]'") from e
    name = component["name"]
    if (precision := settings.get("precision", "f32")) != "f32":
        raise InputError(f"precision = {precision}: ONNX Runtime's CPU kernels compute in f32", fix="precision: f32")
    failures = (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NotImplemented,
        errors.RuntimeException,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = min(settings["threads"], component.get("threads") or settings["threads"])
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads that idle take no core
    if settings.get("qdq") == "as written":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        # A Gemm made of MatMul and Add has no integer kernel without a bias in int32: such products ran in float.
        session = ort.InferenceSession(
            files[f"{name}.onnx"],
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["MatMulAddFusion"],
        )
    except failures as e:
        raise InputError(f"{name}: ONNX Runtime can't load it: {e}", fix="export it again, in FP32") from e
    return Graph(session, component, failures)
