"""SmoothQuant folded into LayerNorm: outliers of activations move into the weights of the products that read them.

x_j / s_j and s_j W_j give the same product, s_j = max|x_j|^alpha / max|W_j|^(1-alpha): Xiao et al., SmoothQuant, 2022.
The division costs nothing, as it goes into LayerNorm's gain and bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgemm.graph import View, attribute, prune_dead, replace

Samples = Sequence[Mapping[str, NDArray[Any]]]
Alpha = float | Literal["auto"]
OFF = -1.0
TRIED = (OFF, 0.35, 0.5, 0.65, 0.8)  # where alpha is "auto"
ROWS = 256  # of activations, that "auto" is judged on
SMALLEST = 1e-5  # of s


@dataclass(slots=True)
class Group:
    """A LayerNormalization and the products with constant weights that read it, or tokens chosen of it.

    products  each with the axis of its weights' input channels;  others  its other readers
    rows      float32[ROWS, C] of what it gives on calibration samples;  peak  float32[C] largest magnitudes
    """

    norm: onnx.NodeProto
    products: list[tuple[onnx.NodeProto, int]]
    others: list[onnx.NodeProto]
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    peak: NDArray[np.float32] = field(default_factory=lambda: np.zeros((), np.float32))

    def weights(self, view: View) -> list[NDArray[np.float32]]:
        """float32[C, N] of each product."""
        found = ((np.asarray(view.value(node.input[1]), np.float32), axis) for node, axis in self.products)
        return [w if axis == 0 else w.T for w, axis in found]


def smooth(
    model: onnx.ModelProto, samples: Samples, alpha: Alpha, layers: Mapping[str, float] | None = None
) -> onnx.ModelProto:
    """A copy of the float graph `model` that computes the same, its LayerNorms smoothed by `factors`.

    What reads a LayerNorm without being a product with constant weights gets its values multiplied back.
    """
    found = factors(model, samples, alpha, layers)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    view = View(copy)
    for group in _groups(copy, view):
        if (s := found.get(group.products[0][0].name)) is not None:
            _fold(copy, view, group, s)
    prune_dead(copy)
    return copy


def factors(
    model: onnx.ModelProto, samples: Samples, alpha: Alpha, layers: Mapping[str, float] | None = None
) -> dict[str, NDArray[np.float32]]:
    """s float32[C] by the names of the products whose activations are divided and whose weights are multiplied by it.

    alpha   of 0 to 1; -1 leaves a layer as it is; "auto" takes for each layer, of TRIED, what rounds its products least
    layers  alphas by the names of products; those that share a LayerNorm share the last one's
    """
    if alpha == OFF and not layers:
        return {}
    view = View(model)
    groups = _groups(model, view)
    _observe(model, groups, samples)
    found = {}
    for group in groups:
        names = [node.name for node, _ in group.products]
        wanted = next((a for n, a in reversed([*(layers or {}).items()]) if n in names), alpha)
        weights = group.weights(view)
        s = (
            best(np.concatenate(group.rows), group.peak, weights)
            if wanted == "auto"
            else scales(group.peak, weights, wanted)
        )
        if s is not None:
            found.update(dict.fromkeys(names, s))
    return found


def scales(
    peak: NDArray[np.float32], weights: Sequence[NDArray[np.float32]], alpha: float
) -> NDArray[np.float32] | None:
    """s float32[C] of activations whose channels reach `peak`, and weights float32[C, N]; None for off."""
    if alpha < 0:
        return None
    heaviest = np.max([np.abs(w).max(1) for w in weights], 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = peak**alpha / heaviest ** (1 - alpha)
    usable = (peak > 0) & (heaviest > 0) & np.isfinite(found)
    return np.where(usable, np.maximum(found, SMALLEST), 1).astype(np.float32)


def best(
    rows: NDArray[np.float32], peak: NDArray[np.float32], weights: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32] | None:
    """The s, of those of TRIED, with which INT8 changes the products of `rows` least; None for off."""
    errors = []
    factors = [scales(peak, weights, alpha) for alpha in TRIED]
    for s in factors:
        unit = np.ones_like(peak) if s is None else s
        smoothed = _rounded(rows / unit, np.array((peak / unit).max()))
        errors.append(
            sum(
                float(
                    np.square(rows @ w - smoothed @ _rounded(w * unit[:, None], np.abs(w * unit[:, None]).max(0))).sum()
                )
                for w in weights
            )
        )
    return factors[int(np.argmin(errors))]


def _rounded(values: NDArray[np.float32], magnitude: NDArray[np.float32]) -> NDArray[np.float32]:
    """INT8, symmetric, and back."""
    step = np.maximum(magnitude / 127, np.finfo(np.float32).tiny)
    return np.asarray(np.clip(np.rint(values / step), -127, 127) * step, np.float32)


def _groups(model: onnx.ModelProto, view: View) -> list[Group]:
    outputs = {o.name for o in model.graph.output}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in model.graph.value_info}
    found = []
    for norm in model.graph.node:
        if (
            norm.op_type != "LayerNormalization"
            or norm.output[0] in outputs
            or (gain := view.value(norm.input[1])) is None
        ):
            continue
        if gain.ndim != 1 or gain.dtype != np.float32 or (len(norm.input) > 2 and view.value(norm.input[2]) is None):
            continue
        group = Group(norm, [], [])
        _readers(norm.output[0], ranks.get(norm.output[0], 0), group, view, outputs)
        if group.products:
            found.append(group)
    return found


def _readers(name: str, rank: int, group: Group, view: View, outputs: set[str]) -> None:
    """Sort what reads `name` into `group`, through a choice of tokens that products alone read: a class token, mostly.

    rank   axes of the tensor; 0 where it is not known
    """
    for node in view.takers[name]:
        if (axis := _input_axis(node, name, view)) is not None:
            group.products.append((node, axis))
            continue
        picked = node.output[0]
        chooses = node.op_type == "Gather" and node.input[0] == name and 0 <= attribute(node, "axis", 0) < rank - 1
        takers = view.takers[picked] if chooses and picked not in outputs else []
        through = [(n, axis) for n in takers if (axis := _input_axis(n, picked, view)) is not None]
        if takers and len(through) == len(takers):
            group.products += through
        else:
            group.others.append(node)


def _input_axis(node: onnx.NodeProto, name: str, view: View) -> int | None:
    """The axis of the input channels in the constant matrix that a product multiplies `name` by; None for others."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[0] != name or attribute(node, "transA", 0):
        return None
    weight = view.constants.get(node.input[1])
    if weight is None or len(weight.dims) != 2 or weight.data_type != onnx.TensorProto.FLOAT:
        return None
    return attribute(node, "transB", 0)


def _observe(model: onnx.ModelProto, groups: Sequence[Group], samples: Samples) -> None:
    """Fill in what each group gives on the samples."""
    import onnxruntime as ort

    if not groups:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = [g.norm.output[0] for g in groups]
    replace(probe.graph.output, [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {i.name for i in session.get_inputs()}
    most = max(1, ROWS // max(1, len(samples)))
    for sample in samples:
        for group, value in zip(
            groups, session.run(names, {n: v for n, v in sample.items() if n in inputs}), strict=True
        ):
            rows = value.reshape(-1, value.shape[-1])
            group.peak = np.maximum(group.peak, np.abs(rows).max(0))
            if len(group.rows) < ROWS:
                group.rows.append(rows[np.linspace(0, len(rows) - 1, most).astype(int)])


def _fold(model: onnx.ModelProto, view: View, group: Group, factors: NDArray[np.float32]) -> None:
    """Divide what the group's LayerNorm gives by `factors`, and multiply what reads it, in place."""
    name = group.norm.output[0]

    def stored(value: NDArray[Any], part: str) -> str:
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), f"{name}/{part}"))
        return f"{name}/{part}"

    for i, part in ((1, "gain"), (2, "bias")):
        if len(group.norm.input) > i and group.norm.input[i]:
            group.norm.input[i] = stored(np.asarray(view.value(group.norm.input[i])) / factors, part)
    for i, (node, axis) in enumerate(group.products):
        weight = np.asarray(view.value(node.input[1]))
        node.input[1] = stored(weight * (factors[:, None] if axis == 0 else factors[None, :]), f"weight_{i}")
    if group.others:
        back = helper.make_node("Mul", [name, stored(factors, "factors")], [f"{name}/unsmoothed"], f"{name}/unsmooth")
        at = next(i for i, n in enumerate(model.graph.node) if n is group.norm or n.output[0] == name)
        model.graph.node.insert(at + 1, back)
        for node in group.others:
            for i, given in enumerate(node.input):
                if given == name:
                    node.input[i] = f"{name}/unsmoothed"
