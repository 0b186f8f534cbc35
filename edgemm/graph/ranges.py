"""The largest value of each float tensor of a graph on calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

SUFFIX = "/largest"


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the float32 tensors: inputs, and outputs of nodes."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    return {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}


def largest(model: onnx.ModelProto, samples: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """Largest finite magnitude of each float32 tensor over `samples`, by name. Infinities are masks, and left out."""
    import onnxruntime as ort

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = sorted(float_tensors(model))
    graph = probe.graph
    del graph.output[:]
    graph.initializer.append(helper.make_tensor("zero" + SUFFIX, TensorProto.FLOAT, [], [0.0]))
    for name in names:
        finite, magnitude, masked = (f"{name}/{part}{SUFFIX}" for part in ("inf", "abs", "finite"))
        graph.node.extend(
            (
                helper.make_node("IsInf", [name], [finite]),
                helper.make_node("Abs", [name], [magnitude]),
                helper.make_node("Where", [finite, "zero" + SUFFIX, magnitude], [masked]),
                helper.make_node("ReduceMax", [masked], [name + SUFFIX], keepdims=0),
            )
        )
        graph.output.append(helper.make_tensor_value_info(name + SUFFIX, TensorProto.FLOAT, []))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in model.graph.input}
    found = np.zeros(len(names))
    for sample in samples:
        row = session.run(None, {n: v for n, v in sample.items() if n in wanted})
        found = np.maximum(found, np.array(row, np.float64))
    return dict(zip(names, found.tolist(), strict=True))
