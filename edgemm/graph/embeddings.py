"""Embedding tables in INT8, a scale a row: rows are looked up first and dequantized afterwards."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgemm.graph import View, attribute

SMALLEST = 1 << 14  # values; smaller tables are not worth three more nodes


def table(node: onnx.NodeProto, view: View) -> NDArray[np.generic] | None:
    """The float32 [V,D] constant whose rows a node looks up, where INT8 is worth it; None for any other node."""
    value = view.value(node.input[0]) if node.op_type == "Gather" and attribute(node, "axis", 0) == 0 else None
    small = value is None or value.dtype != np.float32 or value.ndim != 2 or value.size < SMALLEST
    return None if small else value


def int8_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, in place: each Gather of rows of a float32 [V,D] constant becomes Gather of int8 -> Cast -> Mul.

    Symmetric, scale = largest magnitude of the row / 127. Quantizers leave tables alone, since what they hold is no
    activation; of a model of text they are up to half of the bytes. A table that others take too stays for them.
    """
    view = View(model)
    nodes = []
    for node in model.graph.node:
        if (rows := table(node, view)) is None:
            nodes.append(node)
            continue
        scale = np.maximum(np.abs(rows).max(1, keepdims=True), np.finfo(np.float32).tiny * 127) / np.float32(127)
        out = node.output[0]
        for part, value in (("int8", np.rint(rows / scale).astype(np.int8)), ("scale", scale)):
            model.graph.initializer.append(numpy_helper.from_array(value, f"{out}_table_{part}"))
            nodes.append(helper.make_node("Gather", [f"{out}_table_{part}", node.input[1]], [f"{out}_{part}"]))
        nodes += [
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out], name=node.name),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    taken = {name for node in nodes for name in node.input}
    for tensor in [i for i in model.graph.initializer if i.name not in taken]:
        model.graph.initializer.remove(tensor)
    return model
