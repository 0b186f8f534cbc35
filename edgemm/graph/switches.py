"""A Q/DQ graph whose products take their activations rounded or not as an input says, so that one session tries all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgemm.graph import View, replace
from edgemm.graph.bypass import rounded

INPUT = "edgemm_rounded"  # bool[products]


def switchable(model: onnx.ModelProto, products: Sequence[str]) -> onnx.ModelProto:
    """A copy with the input INPUT, one value a product: its activations are rounded where it is true."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, view = copy.graph, View(copy)
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.BOOL, [len(products)]))
    nodes = []
    for node in graph.node:
        if node.name in products:
            at = products.index(node.name)
            for i, name in enumerate(node.input):
                if (source := rounded(view, name)) is not None:
                    index, switch, out = f"{node.name}/{i}/index", f"{node.name}/{i}/switch", f"{node.name}/{i}/either"
                    graph.initializer.append(numpy_helper.from_array(np.array(at, np.int64), index))
                    nodes.append(helper.make_node("Gather", [INPUT, index], [switch]))
                    nodes.append(helper.make_node("Where", [switch, name, source], [out]))
                    node.input[i] = out
        nodes.append(node)
    replace(graph.node, nodes)
    return copy
