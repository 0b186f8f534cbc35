"""Q/DQ around products by given scales: activations in uint8 with a zero point, weights in int8 per output channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgemm.graph import View, attribute, prune_dead, replace


@dataclass(frozen=True, slots=True)
class Scales:
    """Of one product: `activation` and its `zero` point in 0 to 255; `weight` float32[N], one an output channel."""

    activation: float
    zero: int
    weight: NDArray[np.float32]


def place(model: onnx.ModelProto, found: Mapping[str, Scales]) -> onnx.ModelProto:
    """A copy of a float graph in which the products named in `found` read INT8; weights are stored as INT8.

    Products that read one activation by the same scale share its Q and DQ.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    view = View(copy)
    nodes: list[onnx.NodeProto] = []
    made: dict[tuple[str, float, int], str] = {}

    def stored(name: str, value: NDArray[Any]) -> str:
        copy.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    for node in copy.graph.node:
        if node.name in found:
            scales = found[node.name]
            key = node.input[0], scales.activation, scales.zero
            if key not in made:
                made[key] = at = f"{key[0]}/affine_{len(made)}"
                pair = [
                    stored(f"{at}/scale", np.array(key[1], np.float32)),
                    stored(f"{at}/zero", np.array(key[2], np.uint8)),
                ]
                nodes.append(helper.make_node("QuantizeLinear", [key[0], *pair], [f"{at}/int8"], f"{at}/Q"))
                nodes.append(helper.make_node("DequantizeLinear", [f"{at}/int8", *pair], [at], f"{at}/DQ"))
            node.input[0] = made[key]
            nodes.append(_weight(node, scales.weight, view, stored))
            node.input[1] = nodes[-1].output[0]
        nodes.append(node)
    replace(copy.graph.node, nodes)
    prune_dead(copy)
    return copy


def _weight(
    node: onnx.NodeProto, scale: NDArray[np.float32], view: View, stored: Callable[[str, NDArray[Any]], str]
) -> onnx.NodeProto:
    """The DequantizeLinear of a product's constant weights."""
    value = np.asarray(view.value(node.input[1]), np.float32)
    axis = 0 if node.op_type == "Conv" else 1 - attribute(node, "transB", 0)
    shape = [-1 if i == axis else 1 for i in range(value.ndim)]
    rounded = np.clip(np.rint(value / scale.reshape(shape)), -128, 127).astype(np.int8)
    at = f"{node.name}/weight"
    parts = [
        stored(f"{at}/int8", rounded),
        stored(f"{at}/scale", scale),
        stored(f"{at}/zero", np.zeros(len(scale), np.int8)),
    ]
    return helper.make_node("DequantizeLinear", parts, [at], f"{at}/DQ", axis=axis)
