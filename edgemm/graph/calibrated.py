"""What a quantizer found, read from its Q/DQ graph: ranges, smoothing, biases, and weights not rounded twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgemm.graph import View, attribute, prune_dead, replace

FURTHEST = 1.25  # steps that rounding, clipping and an estimated factor move a weight
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a quantizer found, without its Q/DQ.

    model    the float graph, smoothed and with corrected biases
    ranges   lowest and highest value that each quantized activation's scale covers, by tensor; empty where only
             weights are INT8
    weights  names of the constants that were INT8
    """

    model: onnx.ModelProto
    ranges: dict[str, Range]
    weights: frozenset[str]


def strip(quantized: onnx.ModelProto, floats: onnx.ModelProto) -> Calibrated:
    """Take every Q/DQ pair out of a graph and keep the ranges; INT8 weights become float again.

    floats   the graph before quantizing: weights are taken from it, smoothed as those of `quantized` are, so that they
             are not rounded twice
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    view, before = View(model), View(floats)
    nodes = {node.name: node for node in floats.graph.node}
    renamed: dict[str, str] = {}
    ranges: dict[str, Range] = {}
    weights: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        quantize = view.made.get(node.input[0])
        if quantize is None:
            value = _unrounded(node, view, nodes, before)
            weight = numpy_helper.from_array(value, node.output[0])
            model.graph.initializer.append(weight)
            weights.add(weight.name)
            node.op_type = "Dead"
        else:
            source = quantize.input[0]
            renamed[node.output[0]] = source
            if source not in view.constants:
                low, high = _covered(quantize, view)
                before_low, before_high = ranges.get(source, (low, high))
                ranges[source] = min(low, before_low), max(high, before_high)
    replace(model.graph.node, [n for n in model.graph.node if n.op_type != "Dead"])
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    prune_dead(model)
    return Calibrated(model, ranges, frozenset(weights))


def _parameters(node: onnx.NodeProto, view: View) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
    """Scale and zero point of a Q or DQ node; the zero point is uint8 0 where there is none, as ONNX has it."""
    scale = view.value(node.input[1])
    zero = view.value(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
    assert scale is not None and zero is not None, f"{node.name}: scales that are computed"
    return np.asarray(scale, np.float32), np.asarray(zero)


def _covered(node: onnx.NodeProto, view: View) -> Range:
    scale, zero = _parameters(node, view)
    kind = np.iinfo(zero.dtype)
    offset = zero.astype(np.int64)
    lowest = kind.min + (kind.min < 0) * (offset == 0)  # symmetric INT8 uses -127 to 127
    return float(((lowest - offset) * scale).min()), float(((kind.max - offset) * scale).max())


def _dequantized(node: onnx.NodeProto, view: View) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The float value of a DequantizeLinear's constant, and the step between its levels, broadcast to it."""
    stored = view.value(node.input[0])
    assert stored is not None, f"{node.name}: its input is neither quantized nor constant"
    scale, zero = _parameters(node, view)
    if len(node.input) < 3:
        zero = zero.astype(stored.dtype)
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * stored.ndim
        shape[attribute(node, "axis", 1)] = scale.size
        scale = scale.reshape(shape)
        zero = zero.reshape(shape) if zero.size > 1 else zero  # NNCF writes one for all channels
    return ((stored.astype(np.int64) - zero.astype(np.int64)) * scale).astype(np.float32), np.abs(scale)


def _unrounded(
    node: onnx.NodeProto, view: View, nodes: Mapping[str, onnx.NodeProto], before: View
) -> NDArray[np.float32]:
    """The weights behind a DequantizeLinear: as they were in `before`, by the name of the node that takes them, times
    what smoothing gave each input channel; as dequantized where some of them are FURTHEST away."""
    dequantized, step = _dequantized(node, view)
    for taker in view.takers[node.output[0]]:
        source = nodes[taker.name].input[list(taker.input).index(node.output[0])] if taker.name in nodes else ""
        value = before.value(source)
        if value is None or value.shape != dequantized.shape:
            continue
        unrounded = _smoothed(np.asarray(value, np.float32), dequantized, step)
        if (np.abs(unrounded - dequantized) <= FURTHEST * step).all():
            return unrounded
    return dequantized


def _smoothed(
    value: NDArray[np.float32], rounded: NDArray[np.float32], step: NDArray[np.float32]
) -> NDArray[np.float32]:
    """`value`, [K,N] or [N,K], its K input channels times the factors that bring it closest to `rounded`, which has one
    step for each of N; as it is where factors explain no more of the difference than chance lets them."""
    if value.ndim != 2 or step.shape not in ((1, value.shape[1]), (value.shape[0], 1)):
        return value
    out = 1 if step.shape[0] == 1 else 0
    power = np.square(value, dtype=np.float64).sum(out, keepdims=True)
    factors = (value * rounded.astype(np.float64)).sum(out, keepdims=True) / np.maximum(
        power, np.finfo(np.float32).tiny
    )
    scaled = (value * factors).astype(np.float32)
    left, before = (float(np.square((v - rounded) / step).sum()) for v in (scaled, value))
    return value if left * (1 + 4 / value.shape[out]) >= before else scaled
