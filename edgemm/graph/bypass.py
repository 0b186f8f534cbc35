"""Products of a Q/DQ graph put back to float, to see what their INT8 costs."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from edgemm.graph import View

PRODUCTS = ("MatMul", "Gemm", "Conv")


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
