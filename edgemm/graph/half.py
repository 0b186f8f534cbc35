"""FP16 graphs by types in the ONNX, for strongly typed networks: each node computes in float16 or stays in float32.

Inputs and outputs of the graph stay float32. What passes float16's range on calibration samples stays in float32,
and so does a constant that float16 would flush to zero (the epsilon of a decomposed LayerNormalization).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, defs, helper, numpy_helper, version_converter

from edgemm.errors import InputError
from edgemm.graph import View, name_nodes, opset, replace
from edgemm.graph.ranges import float_tensors

LIMIT = 65504 / 2  # float16's largest, with room for inputs that calibration did not show
TINY = float(np.finfo(np.float16).smallest_normal)
MASK = 1e8  # a constant from this magnitude stands for infinity
MASKED = 3e4  # softmax gives it zero, two of them still fit float16
CENTERED = "/centered"  # ends the names of what is off by a middle, see qdq.place
HALF_SCALES = 19  # opset from which Q and DQ take float16


def prepare(model: onnx.ModelProto, opset_max: int, where: str) -> onnx.ModelProto:
    """A copy of a float32 graph that `to_half` takes: named nodes, an opset with float16 Q/DQ, masks in range.

    opset_max   what the target's parser reads; 19 at least
    Raises InputError for a newer opset, for operators that are not ONNX's own, and for control flow, whose inner
    graphs are not converted.
    """
    if (version := opset(model)) > opset_max:
        raise InputError(
            f"{where}: opset {version}, and the target's parser reads {opset_max} at most",
            fix=f"export with opset {opset_max}: --set export.opset={opset_max}, or export the graph again",
        )
    if version == HALF_SCALES - 1:
        prepared = onnx.ModelProto()
        prepared.CopyFrom(model)  # 19 only adds to 18
        next(o for o in prepared.opset_import if o.domain in ("", "ai.onnx")).version = HALF_SCALES
    else:
        prepared = _converted(model, max(version, HALF_SCALES), where)
    name_nodes(prepared)
    for node in prepared.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise InputError(
                f"{where}: {node.name} is {node.op_type} of {node.domain}, which TensorRT does not know",
                fix="export the graph with ONNX's own operators, without ONNX Runtime's optimizer",
            )
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise InputError(
                f"{where}: {node.name} ({node.op_type}) holds a graph of its own, which is not lowered to FP16",
                fix="export the model without control flow",
            )
    for name, tensor in View(prepared).constants.items():
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and (far := np.isfinite(value) & (np.abs(value) >= MASK)).any():
            tensor.CopyFrom(numpy_helper.from_array(np.where(far, np.sign(value) * MASKED, value), name))
    return prepared


def _converted(model: onnx.ModelProto, version: int, where: str) -> onnx.ModelProto:
    """The graph in another opset, by ONNX's own converter."""
    try:
        return version_converter.convert_version(model, version)
    except RuntimeError as e:
        raise InputError(
            f"{where}: opset {opset(model)} can't be brought to {version}: {str(e)[:300]}",
            fix="export the graph with opset 18 to 20",
        ) from e


def to_half(model: onnx.ModelProto, largest: Mapping[str, float]) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A prepared graph, Q/DQ included, in float16, and the names of the nodes that stay in float32.

    largest   magnitude of each tensor on calibration samples
    """
    caster = Caster(model)
    wide = cancelling(model, caster.view)
    kept = tuple(n.name for n in model.graph.node if n.name in wide or not fits(n, caster.view, largest))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in caster.floats:
            continue  # an initializer from now on
        nodes += caster.lower(node, half=node.name not in kept)
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    nodes += caster.outputs([o.name for o in model.graph.output], nodes)
    replace(lowered.graph.node, nodes)
    used = {name for node in nodes for name in node.input}
    plain = [i for i in model.graph.initializer if i.name not in caster.floats]
    replace(lowered.graph.initializer, [i for i in (*plain, *caster.constants.values()) if i.name in used])
    del lowered.graph.value_info[:]
    return lowered, kept


def cancelling(model: onnx.ModelProto, view: View) -> set[str]:
    """Names of centered products (see qdq.place), their DQs, and the sums that put the middle back.

    Both are larger than their sum where a few activations are far off, and FP16 would keep their first bits alone.
    """
    names = set()
    for node in model.graph.node:
        if node.output[0].endswith(CENTERED) and node.op_type in ("MatMul", "Gemm"):
            takers = view.takers[node.output[0]]
            names |= {n.name for n in (node, *takers, *(view.made[i] for i in node.input[:2]))}
    return names


def fits(node: onnx.NodeProto, view: View, largest: Mapping[str, float]) -> bool:
    """Whether all that goes in and out of a node has float16's range."""
    for name in (*node.input, *node.output):
        if largest.get(name.removesuffix("/dequantized").removesuffix(CENTERED), 0.0) > LIMIT:
            return False
        value = view.value(name)
        if value is not None and value.dtype == np.float32 and not _fits(value, node):
            return False
    return True


def _fits(value: NDArray[np.generic], node: onnx.NodeProto) -> bool:
    magnitude = np.abs(value[np.isfinite(value)])
    highest = float(magnitude.max(initial=0.0))
    scale = node.op_type in ("QuantizeLinear", "DequantizeLinear")  # made to be exact in float16
    return highest <= LIMIT and (scale or highest == 0 or highest >= TINY)


class Caster:
    """Gives each node its inputs in the width that it computes in, with one Cast a tensor and width.

    floats     tensors that are float32 in the graph as it was
    constants  initializers made so far, by new name
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.view = View(model)
        self.version = opset(model)
        constants = {n for n, t in self.view.constants.items() if t.data_type == TensorProto.FLOAT}
        self.floats = float_tensors(model) | constants
        self.held: dict[str, int] = dict.fromkeys((i.name for i in model.graph.input), TensorProto.FLOAT)
        self.constants: dict[str, TensorProto] = {}
        self.cast: dict[tuple[str, int], str] = {}

    def lower(self, node: onnx.NodeProto, *, half: bool) -> list[onnx.NodeProto]:
        """The node in its width, after the Casts that it needs."""
        schema = defs.get_schema(node.op_type, self.version, node.domain)
        casts: list[onnx.NodeProto] = []
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name in self.floats and not (node.op_type == "Cast" and name in self.held):
                changed.input[i] = self._as(name, self._width(schema.inputs, i, half), casts)
        if half:
            _halve_attributes(changed)
        for i, name in enumerate(node.output):
            if name in self.floats:
                self.held[name] = self._width(schema.outputs, i, half)
        return [*casts, changed]

    def outputs(self, names: Sequence[str], nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Casts to the float32 outputs of the graph, whose makers in `nodes` get other names."""
        renamed = {n: f"{n}/half" for n in names if self.held.get(n) == TensorProto.FLOAT16}
        for node in nodes:
            for field in (node.input, node.output):
                replace(field, [renamed.get(n, n) for n in field])
        return [_cast(half, name, TensorProto.FLOAT) for name, half in renamed.items()]

    def _width(self, ports: Sequence[defs.OpSchema.FormalParameter], index: int, half: bool) -> int:
        port = ports[min(index, len(ports) - 1)]  # the last one may stand for many
        return TensorProto.FLOAT16 if half and "tensor(float16)" in port.types else TensorProto.FLOAT

    def _as(self, name: str, width: int, casts: list[onnx.NodeProto]) -> str:
        """The name under which tensor `name` is there in `width`, made when it is asked for first."""
        if (name, width) in self.cast:
            return self.cast[name, width]
        if name in self.view.constants:
            value = numpy_helper.to_array(self.view.constants[name])
            new = name if width == TensorProto.FLOAT else f"{name}/half"
            with np.errstate(under="ignore"):
                value = value.astype(np.float16) if width == TensorProto.FLOAT16 else value
            self.constants[new] = numpy_helper.from_array(value, new)
        elif self.held[name] == width:
            new = name
        else:
            new = f"{name}/{'half' if width == TensorProto.FLOAT16 else 'float'}"
            casts.append(_cast(name, new, width))
        self.cast[name, width] = new
        return new


def _cast(source: str, target: str, width: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}/Cast", to=width)


def _halve_attributes(node: onnx.NodeProto) -> None:
    """Make a node that types its own output give float16."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(value, attribute.t.name))
