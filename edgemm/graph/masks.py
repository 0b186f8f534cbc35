"""The mask of attention with one head, spelled out for each query, so that TensorRT fuses that attention too."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper

from edgemm.graph import View, replace

Dims = list[int | str | None]


def spell_out_masks(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, in place: where [B,1,T,P] scores get a mask [B,1,1,P] added before a softmax, it becomes [B,1,T,P].

    TensorRT-RTX 1.7 makes one kernel of attention with such a mask over several heads, but not where the head axis is
    1, which pruning may leave, unless the mask has a row for each query.
    """
    view, shapes = View(model), _shapes(model)
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Add" and any(t.op_type == "Softmax" for t in view.takers[node.output[0]]):
            for i, (scores, mask) in enumerate((node.input, reversed(node.input))):
                if _repeats(shapes.get(scores, []), shapes.get(mask, [])):
                    size, whole = f"{node.name}/scores", f"{node.name}/mask"
                    nodes.append(helper.make_node("Shape", [scores], [size], f"{size}/Shape"))
                    nodes.append(helper.make_node("Expand", [mask, size], [whole], f"{whole}/Expand"))
                    node.input[1 - i] = whole
                    break
        nodes.append(node)
    replace(model.graph.node, nodes)
    return model


def _repeats(scores: Dims, mask: Dims) -> bool:
    return len(scores) == len(mask) == 4 and scores[1] == mask[1] == mask[2] == 1 and scores[2] != 1


def _shapes(model: onnx.ModelProto) -> Mapping[str, Dims]:
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        v.name: [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
