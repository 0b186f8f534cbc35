"""Products of a Q/DQ graph put back to float, to see what their INT8 costs."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from edgemm.graph import View

PRODUCTS = ("MatMul", "Gemm", "Conv")


def constant_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products whose weights are constants, in graph order."""
    view = View(model)
    return [n for n in model.graph.node if n.op_type in PRODUCTS and n.input[1] in view.constants]


def quantized_products(model: onnx.ModelProto) -> list[str]:
    """Names of the products that take an activation which was rounded to INT8, in graph order."""
    view = View(model)
    return [n.name for n in model.graph.node if n.op_type in PRODUCTS and any(_rounded(view, i) for i in n.input)]


def bypass(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy in which the products `names` take their activations unrounded; weights stay what INT8 left of them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    view = View(copy)
    for node in copy.graph.node:
        if node.name in names:
            for i, name in enumerate(node.input):
                if source := _rounded(view, name):
                    node.input[i] = source
    return copy


def _rounded(view: View, name: str) -> str | None:
    """The tensor that Q and DQ made `name` of; None for weights and what was not rounded."""
    dequantize = view.made.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = view.made.get(dequantize.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.input[0] in view.constants:
        return None
    return str(quantize.input[0])


def take_scales(model: onnx.ModelProto, other: onnx.ModelProto, names: Collection[str]) -> None:
    """Give the products `names` of `model`, in place, the scales and zero points of their activations in `other`.

    other   the same graph, quantized by another observer. What shares an activation shares its scale.
    """
    mine, theirs = View(model), View(other)
    nodes = {n.name: n for n in other.graph.node}
    constants = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.name not in names or node.name not in nodes:
            continue
        for own, foreign in zip(node.input, nodes[node.name].input, strict=True):
            if _rounded(mine, own) and _rounded(theirs, foreign):
                pair = mine.made[own], theirs.made[foreign]
                for i in (1, 2):
                    if len(pair[0].input) > i:
                        constants[pair[0].input[i]].CopyFrom(
                            _named(theirs.constants[pair[1].input[i]], pair[0].input[i])
                        )


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy
