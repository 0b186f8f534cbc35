"""The mean row of a vocabulary's table kept in float, so that INT8 is spent on what tells one token from another."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemm.graph import View, attribute, replace

TALL = 8  # times as many tokens as channels, from which a product's weights are a vocabulary's
LAST = "last_axis"


def center_vocabulary(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, in place: x W^T becomes x (W - m)^T + x m^T for each tall constant W [V,D] of a product, m its mean row.

    Rows of such tables have much in common (in Whisper tiny.en nine tenths of their norm), which moves all logits alike
    and sets the scale of INT8: logits are 10 dB closer without it. Rows looked up in the same table get m added.
    """
    view = View(model)
    tables = {n.input[1]: axis for n in model.graph.node if (axis := _vocabulary_axis(view, n)) is not None}
    centered = {name: axis for name, axis in tables.items() if _fits(view, name, axis)}
    if not centered:
        return model
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        name = node.input[1] if _vocabulary_axis(view, node) is not None else node.input[0] if node.input else ""
        if name not in centered:
            continue
        out, mean = node.output[0], f"{name}_mean"
        node.output[0] = f"{out}_centered"
        if node.op_type == "Gather":
            nodes.append(helper.make_node("Add", [f"{out}_centered", mean], [out]))
            continue
        nodes += [
            helper.make_node("Mul", [node.input[0], mean], [f"{out}_weighted"]),
            helper.make_node("ReduceSum", [f"{out}_weighted", LAST], [f"{out}_common"], keepdims=1),
            helper.make_node("Add", [f"{out}_centered", f"{out}_common"], [out]),
        ]
    replace(model.graph.node, nodes)
    means = [numpy_helper.from_array(np.array([-1]), LAST)]
    for tensor in model.graph.initializer:
        if (axis := centered.get(tensor.name)) is not None:
            table = numpy_helper.to_array(tensor)
            mean = table.mean(axis, keepdims=True)
            means.append(numpy_helper.from_array(mean.reshape(-1), f"{tensor.name}_mean"))
            tensor.CopyFrom(numpy_helper.from_array(table - mean, tensor.name))
    model.graph.initializer.extend(means)
    return model


def _vocabulary_axis(view: View, node: onnx.NodeProto) -> int | None:
    """The axis of the tokens in a product's constant matrix, 0 or 1; None where it is no product or not tall."""
    if node.op_type not in ("Gemm", "MatMul") or (matrix := view.value(node.input[1])) is None or matrix.ndim != 2:
        return None
    axis = 0 if attribute(node, "transB", 0) else 1
    return axis if matrix.shape[axis] >= TALL * matrix.shape[1 - axis] else None


def _fits(view: View, name: str, axis: int) -> bool:
    """Whether `name` is an initializer that only products take, all the same way, and lookups of its tokens."""
    return name in {i.name for i in view.graph.initializer} and all(
        (n.input[0] == name and n.op_type == "Gather" and attribute(n, "axis", 0) == axis == 0)
        or (n.input[0] != name and n.input[1] == name and _vocabulary_axis(view, n) == axis)
        for n in view.takers[name]
    )
