"""Whether INT8 products can overflow where a CPU adds pairs of them in 16 bits: x86 without VNNI.

There `vpmaddubsw` multiplies unsigned activations (0 to 255; signed ones are moved up by 128) by signed weights and
adds the products of neighbouring channels in int16, which saturates. Weights are known: so is what pairs can reach.
https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgemm.graph import View, attribute
from edgemm.graph.bypass import bypass, quantized_products

LARGEST_ACTIVATION = 255
LOW, HIGH = -(1 << 15), (1 << 15) - 1


@dataclass(frozen=True, slots=True)
class Pair:
    """What a pair of products can add up to in one INT8 product of the graph; None for a product of two activations."""

    product: str
    least: int | None
    largest: int | None

    @property
    def proven(self) -> bool:
        """No activations whatever make it saturate."""
        if self.least is None or self.largest is None:
            return False
        return self.least >= LOW and self.largest <= HIGH


def extremes(weight: NDArray[np.int8], axis: int) -> tuple[int, int]:
    """Least and largest sum of a pair, over all activations. Pairs are neighbours along `axis`, the input channels."""
    rows = np.moveaxis(weight.astype(np.int64), axis, 0)
    if len(rows) % 2:
        rows = np.concatenate([rows, np.zeros_like(rows[:1])])
    pairs = rows.reshape(len(rows) // 2, 2, -1)
    least, largest = np.minimum(pairs, 0).sum(1).min(), np.maximum(pairs, 0).sum(1).max()
    return int(least) * LARGEST_ACTIVATION, int(largest) * LARGEST_ACTIVATION


def pairs(model: onnx.ModelProto) -> list[Pair]:
    """One for each product of a Q/DQ graph that takes a rounded activation, in graph order."""
    view, found = View(model), []
    nodes = {n.name: n for n in model.graph.node}
    for name in quantized_products(model):
        node = nodes[name]
        if (made := _weight(node, view)) is not None:
            stored = view.value(made.input[0])
            assert stored is not None
            found.append(Pair(name, *extremes(stored.astype(np.int8), _input_axis(node, stored.ndim))))
        elif not any(i in view.constants for i in node.input[:2]):
            found.append(Pair(name, None, None))
    return found


def unsaturated(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """A copy in which no pair can saturate, and the names of the products that were changed for it.

    First those whose weights have 7 bits now (half the levels, twice the scale), then products of two activations,
    which nothing bounds: their inputs are not rounded.
    """
    open_ = [p for p in pairs(model) if not p.proven]
    narrow = tuple(p.product for p in open_ if p.largest is not None)
    floats = tuple(p.product for p in open_ if p.largest is None)
    copy = bypass(model, floats)
    halve(copy, narrow)
    return copy, narrow, floats


def halve(model: onnx.ModelProto, products: Collection[str]) -> None:
    """In place: the INT8 weights of `products` at half their value and twice their scale: pairs stay in 16 bits."""
    view = View(model)
    made = [_weight(n, view) for n in model.graph.node if n.name in products]
    for dequantize in {id(m): m for m in made if m is not None}.values():
        stored, scale = (np.asarray(view.value(name)) for name in dequantize.input[:2])
        for name, value in (
            (dequantize.input[0], np.rint(stored / 2).astype(stored.dtype)),
            (dequantize.input[1], scale * np.float32(2)),
        ):
            view.constants[name].CopyFrom(numpy_helper.from_array(value, view.constants[name].name))


def _weight(node: onnx.NodeProto, view: View) -> onnx.NodeProto | None:
    """The DequantizeLinear that makes a product's weights of stored INT8."""
    for name in node.input[:2]:
        made = view.made.get(name)
        if made is not None and made.op_type == "DequantizeLinear" and made.input[0] in view.constants:
            return made
    return None


def _input_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv":
        return 1
    return 1 if attribute(node, "transB", 0) else rank - 2
