"""Passes on ONNX graphs, for stages and backends. Each takes a model and gives a new one, or facts about it."""

from __future__ import annotations

from ast import literal_eval
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


class View:
    """Who makes and who takes each tensor of a graph. Valid until the graph is changed.

    constants  initializers and outputs of Constant nodes by name, as read when asked for
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.made = {name: node for node in model.graph.node for name in node.output if name}
        self.takers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.takers[name].append(node)
        self.constants = {i.name: i for i in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def value(self, name: str) -> NDArray[np.generic] | None:
        """A constant's value; None for any other tensor."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def opset(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def prune_dead(model: onnx.ModelProto) -> None:
    """Drop, in place, nodes and initializers that no output needs; what shape inference said of tensors goes too."""
    wanted = {o.name for o in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    replace(model.graph.node, reversed(kept))
    replace(model.graph.initializer, [i for i in model.graph.initializer if i.name in wanted])
    del model.graph.value_info[:]


def replace(field: object, items: Iterable[object]) -> None:
    """Fill a repeated protobuf field anew."""
    items = list(items)
    del field[:]  # type: ignore[attr-defined]
    field.extend(items)  # type: ignore[attr-defined]


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own, in place."""
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}"
        seen.add(node.name)


def layer_of(node: onnx.NodeProto) -> str:
    """The dotted path of the torch module that a node was exported from; empty where the graph does not say.

    By the name of its weights first: a convolution that took in a batch norm says that it came from that.
    """
    if len(node.input) > 1 and node.input[1].endswith(".weight"):
        return str(node.input[1].removesuffix(".weight"))
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    return next((name for name in reversed(literal_eval(scopes)[:-1]) if name), "")


def matches(node: onnx.NodeProto, pattern: str) -> bool:
    """Whether a glob pattern means a node: by its name or its layer's; or it is its op type."""
    return node.op_type == pattern or fnmatchcase(node.name, pattern) or fnmatchcase(layer_of(node), pattern)
