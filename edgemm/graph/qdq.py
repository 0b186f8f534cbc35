"""Q/DQ as TensorRT takes it: symmetric INT8 around products with constant weights, and nowhere else.

A quantizer decides ranges, smoothing, biases and which products it keeps in float; where Q/DQ stands and how it is
written is decided here. Softmax, products of two activations, residual sums, LayerNormalization and biases stay in
float, so that attention stays one fused kernel.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgemm.graph import View, attribute, prune_dead, replace
from edgemm.graph.calibrated import Range
from edgemm.graph.embeddings import table
from edgemm.graph.half import CENTERED

SMALLEST = 16  # K and N from which INT8 has kernels that gain
HIGHEST = 127
SMALLEST_SCALE = np.float16(2**-20)  # still 16 steps above zero in float16
# What moves values and does not change them: a range found before one of these holds after it.
MOVES = {"Reshape", "Transpose", "Slice", "Gather", "Squeeze", "Unsqueeze", "Identity", "Split", "Expand", "Flatten"}
OFF_CENTRE = 0.03  # of half a range: how far its middle is from zero, from which INT8 is spent around the middle


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
    is there once, in float where the product is, or where weights alone are INT8: TensorRT-RTX keeps it in FP16 then,
    so that rounding it saves nothing. A product whose input is always zero stays in float: TensorRT refuses a scale of
    zero.
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
    factors = {node.input[1] for node in model.graph.node if node.name in axes}
    floating = factors - {*weights}
    if not ranges:
        floating |= factors & {node.input[0] for node in model.graph.node if table(node, view) is not None}

    def stored(name: str, axis: int) -> str:
        if name not in dequantized:
            dequantized[name] = f"{name}/dequantized"
            nodes.append(_weight(name, axis, view, model))
        return dequantized[name]

    for node in model.graph.node:
        if table(node, view) is not None and node.input[0] not in floating:
            node.input[0] = stored(node.input[0], 0)
        elif node.name in axes and node.input[1] not in floating:
            source, weight, axis = node.input[0], node.input[1], axes[node.name]
            low, high = _range(source, ranges, largest, view) if ranges else (0.0, 0.0)
            if high > low or not ranges:
                placed.append(node.name)
                node.input[1] = stored(weight, axis)
                if ranges:
                    middle, step = _around(low, high, node.op_type != "Conv")  # a padded 0 must stay 0
                    taken = f"{source}{CENTERED}" if middle else source
                    if taken not in dequantized:
                        dequantized[taken] = f"{taken}/dequantized"
                        nodes += _activation(source, taken, step, middle, model)
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
    """What is taken off before rounding, and the scale of what is left.

    It is a whole number of steps, so that 0 stays a level, as with a zero point: half of what a GELU gives is next to
    it. Both are exact in float16: a tenth of a step more, for all of these, costs 4 dB.
    """
    if not centered or abs(low + high) <= OFF_CENTRE * (high - low):
        return 0.0, float(half_scales(np.array(max(high, -low))))
    sign = 1 if low + high > 0 else -1
    near, far = (-low, high) if sign > 0 else (high, -low)
    steps = np.arange(HIGHEST)
    fits = np.maximum(far / (HIGHEST + steps), near / (HIGHEST - steps))
    odd = steps // np.maximum(steps & -steps, 1)
    bits = 11 - np.ceil(np.log2(odd + 1))  # of the scale, so that the product has 11
    unit = 2.0 ** np.maximum(np.floor(np.log2(fits)) + 1 - bits, -24)
    scales = np.maximum(np.ceil(fits / unit) * unit, SMALLEST_SCALE)
    best = int(scales.argmin())
    return float(sign * steps[best] * scales[best]), float(scales[best])


def _activation(source: str, taken: str, step: float, middle: float, model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Q and DQ of `source`, or of `taken`, which is `source` without `middle`."""
    scale, zero, middle_of = f"{taken}/scale", f"{taken}/zero", f"{taken}/middle"
    model.graph.initializer.append(numpy_helper.from_array(np.array(step, np.float32), scale))
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
