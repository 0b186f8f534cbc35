"""Q/DQ as TensorRT takes it: symmetric INT8 around products with constant weights, and nowhere else.

A quantizer decides ranges, smoothing, biases and which products it keeps in float; where Q/DQ stands and how it is
written is decided here. Softmax, products of two activations, residual sums, LayerNormalization and biases stay in
float, so that attention stays one fused kernel.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgemm.graph import View, attribute, prune_dead, replace
from edgemm.graph.embeddings import table

SMALLEST = 16  # K and N from which INT8 has kernels that gain
HIGHEST = 127
SMALLEST_SCALE = np.float16(2**-20)  # still 16 steps above zero in float16
# What moves values and does not change them: a range found before one of these holds after it.
MOVES = {"Reshape", "Transpose", "Slice", "Gather", "Squeeze", "Unsqueeze", "Identity", "Split", "Expand", "Flatten"}


OFF_CENTRE = 0.03  # of half a range: how far its middle is from zero, from which INT8 is spent around the middle
CENTERED = "/centered"
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

    floats   the graph before quantizing: weights that were only rounded are taken from it, so that they are not
             rounded twice; smoothed ones are what INT8 left of them
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
    """The weights behind a DequantizeLinear: as they were in `before`, by the name of the node that takes them; as
    dequantized where some of them are further away than rounding and clipping go, a step."""
    dequantized, step = _dequantized(node, view)
    for taker in view.takers[node.output[0]]:
        source = nodes[taker.name].input[list(taker.input).index(node.output[0])] if taker.name in nodes else ""
        value = before.value(source)
        if value is None or value.shape != dequantized.shape:
            continue
        unrounded = np.asarray(value, np.float32)
        if (np.abs(unrounded - dequantized) <= 1.001 * step).all():
            return unrounded
    return dequantized


def products(model: onnx.ModelProto) -> dict[str, int]:
    """Name of each MatMul, Gemm and Conv that INT8 is for -> axis of its weights' output channels."""
    view = View(model)
    found = {}
    for node in model.graph.node:
        weight = view.constants.get(node.input[1]) if node.op_type in ("MatMul", "Gemm", "Conv") else None
        shape = tuple(weight.dims) if weight is not None else ()
        if node.op_type == "Conv" and len(shape) > 2:
            axis, group = 0, attribute(node, "group", 1)
            k, n = int(np.prod(shape[1:])), shape[0] // group
        elif node.op_type != "Conv" and len(shape) == 2 and not attribute(node, "transA", 0):
            axis = 1 - attribute(node, "transB", 0)
            k, n = shape[1 - axis], shape[axis]
        else:
            continue
        if min(k, n) >= SMALLEST:
            found[node.name] = axis
    return found


def place(
    floats: onnx.ModelProto, ranges: Mapping[str, Range], largest: Mapping[str, float], weights: Collection[str]
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A float graph with named nodes -> the same with TensorRT's Q/DQ, and the names of the products that got it.

    ranges   see Calibrated; without any, weights alone become INT8
    weights  see Calibrated: a product of others stays in float
    largest  magnitude of each tensor on calibration samples, where the quantizer left no range
    One Q and one DQ an activation, shared by all that take it; weights are stored as INT8, per output channel, and
    embedding tables per row: lookup and DequantizeLinear are one kernel, and a table that is a product's weight, too,
    is there once, in float where the product is. A product whose input is always zero stays in float: TensorRT refuses
    a scale of zero.
    TensorRT takes no zero points, and what a GELU gives would use half of the levels. Where a range is off zero by
    OFF_CENTRE, its middle is taken off before rounding, and what the product makes of it is added after it.
    """
    model = onnx.ModelProto()
    model.CopyFrom(floats)
    view = View(model)
    axes = products(model)
    nodes: list[onnx.NodeProto] = []
    dequantized: dict[str, str] = {}
    placed = []
    floating = {node.input[1] for node in model.graph.node if node.name in axes} - {*weights}

    def stored(name: str, axis: int) -> str:
        if name not in dequantized:
            dequantized[name] = f"{name}/dequantized"
            nodes.append(_weight(name, axis, view, model))
        return dequantized[name]

    for node in model.graph.node:
        if table(node, view) is not None and node.input[0] not in floating:
            node.input[0] = stored(node.input[0], 0)
        elif node.name in axes and node.input[1] in weights:
            source, weight, axis = node.input[0], node.input[1], axes[node.name]
            low, high = _range(source, ranges, largest, view) if ranges else (0.0, 0.0)
            if high > low or not ranges:
                placed.append(node.name)
                node.input[1] = stored(weight, axis)
                if ranges:
                    middle, magnitude = _around(low, high, node.op_type != "Conv")  # a padded 0 must stay 0
                    taken = f"{source}{CENTERED}" if middle else source
                    if taken not in dequantized:
                        dequantized[taken] = f"{taken}/dequantized"
                        nodes += _activation(source, taken, magnitude, middle, model)
                    node.input[0] = dequantized[taken]
                    if middle:
                        nodes += [node, _put_back(node, weight, axis, middle, model)]
                        continue
        nodes.append(node)
    replace(model.graph.node, nodes)
    prune_dead(model)
    return model, tuple(placed)


def _range(name: str, ranges: Mapping[str, Range], largest: Mapping[str, float], view: View) -> Range:
    """The quantizer's range of a tensor, also through operators that only move values; else the one observed."""
    at = name
    while at not in ranges and at in view.made and view.made[at].op_type in MOVES:
        at = view.made[at].input[0]
    return ranges.get(at) or (-largest[name], largest[name])


def _around(low: float, high: float, centered: bool) -> tuple[float, float]:
    """What is taken off before rounding, and the magnitude of what is left.

    A whole number of steps, so that 0 stays a level, as with a zero point: half of what a GELU gives is next to it.
    """
    half = (high - low) / 2 * HIGHEST / (HIGHEST - 0.5)  # the middle moves by half a step
    step = float(half_scales(np.array(half)))
    middle = float(np.float16(step * np.rint((low + high) / 2 / step)))
    return (middle, half) if centered and abs(middle) > OFF_CENTRE * half else (0.0, max(high, -low))


def _activation(
    source: str, taken: str, magnitude: float, middle: float, model: onnx.ModelProto
) -> list[onnx.NodeProto]:
    """Q and DQ of `source`, or of `taken`, which is `source` without `middle`."""
    scale, zero, middle_of = f"{taken}/scale", f"{taken}/zero", f"{taken}/middle"
    model.graph.initializer.append(numpy_helper.from_array(half_scales(np.array(magnitude)), scale))
    model.graph.initializer.append(helper.make_tensor(zero, TensorProto.INT8, [], [0]))
    nodes = []
    if middle:
        model.graph.initializer.append(numpy_helper.from_array(np.array(middle, np.float32), middle_of))
        nodes.append(helper.make_node("Sub", [source, middle_of], [taken], f"{taken}/Sub"))
    rounded = f"{taken}/quantized"
    return [
        *nodes,
        helper.make_node("QuantizeLinear", [taken, scale, zero], [rounded], f"{taken}/Q"),
        helper.make_node("DequantizeLinear", [rounded, scale, zero], [f"{taken}/dequantized"], f"{taken}/DQ"),
    ]


def _put_back(node: onnx.NodeProto, weight: str, axis: int, middle: float, model: onnx.ModelProto) -> onnx.NodeProto:
    """Add what a MatMul or Gemm makes of `middle` in every channel, by the weights as they were stored."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith(f"{weight}/")}
    sums = stored[f"{weight}/int8"].sum(1 - axis, dtype=np.int64) * stored[f"{weight}/scale"].astype(np.float64)
    alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
    out, constant = node.output[0], f"{node.output[0]}/middle"
    model.graph.initializer.append(numpy_helper.from_array((alpha * middle * sums).astype(np.float32), constant))
    node.output[0] = f"{out}{CENTERED}"
    return helper.make_node("Add", [node.output[0], constant], [out], f"{node.name}/middle")


def _weight(name: str, axis: int, view: View, model: onnx.ModelProto) -> onnx.NodeProto:
    value = np.asarray(view.value(name), np.float32)
    others = tuple(i for i in range(value.ndim) if i != axis)
    scale = half_scales(np.abs(value).max(others))
    stored = np.rint(value / scale.reshape([-1 if i == axis else 1 for i in range(value.ndim)]))
    for part, array in (
        ("int8", stored.clip(-HIGHEST, HIGHEST).astype(np.int8)),
        ("scale", scale),
        ("zero", np.zeros(len(scale), np.int8)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(array, f"{name}/{part}"))
    inputs = [f"{name}/{part}" for part in ("int8", "scale", "zero")]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}/dequantized"], f"{name}/DQ", axis=axis)


def half_scales(magnitude: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scales that cover +-magnitude, rounded up to a float16 that is not zero, so that FP16 graphs round nothing."""
    wanted = np.asarray(magnitude, np.float32) / HIGHEST
    half = wanted.astype(np.float16)
    half = np.where(half.astype(np.float32) < wanted, np.nextafter(half, np.float16(np.inf)), half)
    return np.asarray(np.maximum(half, SMALLEST_SCALE), np.float32)
