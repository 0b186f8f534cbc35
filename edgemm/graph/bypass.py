"""Products of a Q/DQ graph put back to float, to see what their INT8 costs."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from edgemm.graph import View

PRODUCTS = ("MatMul", "Gemm", "Conv")


def quantized_products(model: onnx.ModelProto) -> list[str]:
    """Names of the products that take an activation which was rounded to INT8, in graph order."""
    view = View(model)
    return [n.name for n in model.graph.node if n.op_type in PRODUCTS and any(rounded(view, i) for i in n.input)]


def bypass(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy in which the products `names` take their activations unrounded; weights stay what INT8 left of them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    view = View(copy)
    for node in copy.graph.node:
        if node.name in names:
            for i, name in enumerate(node.input):
                if source := rounded(view, name):
                    node.input[i] = source
    return copy


def rounded(view: View, name: str) -> str | None:
    """The tensor that Q and DQ made `name` of; None for weights and what was not rounded."""
    dequantize = view.made.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = view.made.get(dequantize.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.input[0] in view.constants:
        return None
    return str(quantize.input[0])


def product_names(model: onnx.ModelProto) -> dict[str, str]:
    """Name under which a runtime may report a product -> the product: its own, and that of the bias added to it."""
    view, found = View(model), {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        found[node.name] = node.name
        for taker in view.takers[node.output[0]]:
            if taker.op_type == "Add" and any(i in view.constants for i in taker.input):
                found[taker.name] = node.name
    return found
