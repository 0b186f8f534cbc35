"""The largest value of each float tensor of a graph on calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

SUFFIX = "/largest"
TINY = float(np.finfo(np.float32).tiny)
APART = 0.25  # of the larger of two ranges


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the float32 tensors: inputs, and outputs of nodes."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    return {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}


def largest(model: onnx.ModelProto, samples: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """Largest finite magnitude of each float32 tensor over `samples`, by name. Infinities are masks, and left out."""
    found = _observe(model, sorted(float_tensors(model)), samples, masked=False)
    infinite = sorted(name for name, value in found.items() if not np.isfinite(value))
    return found | _observe(model, infinite, samples, masked=True)


def unsettled(
    model: onnx.ModelProto, first: Sequence[Mapping[str, NDArray[Any]]], second: Sequence[Mapping[str, NDArray[Any]]]
) -> tuple[int, tuple[str, ...]]:
    """Count of the activations that are rounded, and those whose ranges on two halves differ by more than APART."""
    constant = {i.name for i in model.graph.initializer}
    names = sorted({n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"} - constant)
    one, other = (_observe(model, names, half, masked=False) for half in (first, second))
    apart = {n: abs(one[n] - other[n]) / max(one[n], other[n], TINY) for n in names}
    return len(names), tuple(sorted((n for n in names if apart[n] > APART), key=lambda n: (-apart[n], n)))


def _observe(
    model: onnx.ModelProto, names: Sequence[str], samples: Sequence[Mapping[str, NDArray[Any]]], *, masked: bool
) -> dict[str, float]:
    """Largest magnitude of each of `names`. `masked`: infinities count as zero, which takes more time and memory."""
    import onnxruntime as ort

    if not names:
        return {}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    graph = probe.graph
    del graph.output[:]
    if masked:
        graph.initializer.append(helper.make_tensor("zero" + SUFFIX, TensorProto.FLOAT, [], [0.0]))
    for name in names:
        source = name
        if masked:
            infinite, source = f"{name}/inf{SUFFIX}", f"{name}/finite{SUFFIX}"
            graph.node.append(helper.make_node("IsInf", [name], [infinite]))
            graph.node.append(helper.make_node("Where", [infinite, "zero" + SUFFIX, name], [source]))
        for kind in ("ReduceMin", "ReduceMax"):
            output = f"{name}/{kind}{SUFFIX}"
            graph.node.append(helper.make_node(kind, [source], [output], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in model.graph.input}
    found = np.zeros(2 * len(names))
    for sample in samples:
        row = session.run(None, {n: v for n, v in sample.items() if n in wanted})
        found = np.maximum(found, np.abs(np.array(row, np.float64)))
    return dict(zip(names, found.reshape(-1, 2).max(1).tolist(), strict=True))
