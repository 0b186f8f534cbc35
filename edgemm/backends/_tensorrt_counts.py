"""What an engine really computes in INT8, and which attention it fused, from its layer table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of an engine: its kind, types of its inputs and constants, and the ONNX nodes that it computes."""

    kind: str
    inputs: frozenset[str]
    constants: frozenset[str]
    nodes: frozenset[str]


def count(model: Any, layers: Sequence[Row] | None) -> dict[str, int | str]:
    """Of the graph `model`: products that INT8 is for, and attention blocks; of those, how many the engine runs so.

    gemms            products with constant weights, K and N of 16 and more
    quantized_gemms  those of them whose weights come from a DequantizeLinear
    int8_gemms       those of them that the engine gives INT8 inputs and INT8 weights, or INT8 weights alone where only
                     the weights are quantized
    attention        softmaxes between two products
    fused_attention  those of them that are one layer with both products
    float32_nodes    nodes that FP16 could not hold
    layers           layers of the engine;  "unknown" for what the table does not tell
    """
    from edgemm.graph import View
    from edgemm.graph.lower import kept_in_float32
    from edgemm.graph.qdq import products

    view = View(model)
    wanted = {n.name: _reads_int8(n, view) for n in model.graph.node if _weights_are_int8(n, view)}
    blocks = [b for n in model.graph.node if n.op_type == "Softmax" and (b := _block(n, view))]
    found: dict[str, int | str] = {
        "gemms": len(wanted) + len(products(model)),
        "quantized_gemms": len(wanted),
        "attention": len(blocks),
        "float32_nodes": len(kept_in_float32(model)),
    }
    if layers is None:
        return {**found, "int8_gemms": "unknown", "fused_attention": "unknown", "layers": "unknown"}

    def in_int8(name: str, activations: bool) -> bool:
        return any(
            name in row.nodes and "Int8" in row.constants and ("Int8" in row.inputs or not activations)
            for row in layers
        )

    return {
        **found,
        "int8_gemms": sum(in_int8(name, activations) for name, activations in wanted.items()),
        "fused_attention": sum(any(block <= row.nodes for row in layers) for block in blocks),
        "layers": len(layers),
    }


def _weights_are_int8(node: Any, view: Any) -> bool:
    maker = view.made.get(node.input[1]) if node.op_type in ("MatMul", "Gemm", "Conv") else None
    return maker is not None and maker.op_type == "DequantizeLinear"


def _reads_int8(node: Any, view: Any) -> bool:
    maker = view.made.get(node.input[0])
    return maker is not None and maker.op_type == "DequantizeLinear"


def _block(softmax: Any, view: Any) -> set[str] | None:
    """Names of a softmax and the products before and after it; None where it is not attention."""
    at, before = softmax, None
    while before is None:
        makers = [view.made[name] for name in at.input if name in view.made]
        before = next((m for m in makers if m.op_type == "MatMul"), None)
        if before is None:
            following = [m for m in makers if m.op_type in ("Add", "Mul", "Div", "Where", "Cast", "Reshape")]
            if not following:
                return None
            at = following[-1] if at.op_type == "Where" else following[0]
    after = _product_after(softmax, view)
    return {before.name, softmax.name, after} if after else None


def _product_after(softmax: Any, view: Any) -> str | None:
    at = softmax
    for _ in range(4):  # a Cast, a Reshape, a Where that hides rows may stand between
        takers = [t for t in view.takers[at.output[0]] if t.op_type != "Shape"]
        if product := next((t for t in takers if t.op_type == "MatMul"), None):
            return str(product.name)
        if not takers:
            return None
        at = takers[-1]
    return None
