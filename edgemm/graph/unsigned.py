"""Activations in uint8, as ONNX Runtime's kernels for x86 want them: of int8 ones they leave half in float."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from edgemm.graph import View


def unsigned_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, in place: int8 activations become uint8, their zero points 128 higher; weights stay int8."""
    view = View(model)
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        quantize = node if node.op_type == "QuantizeLinear" else view.made.get(node.input[0]) if node.input else None
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or quantize is None:
            continue
        if quantize.input[0] in view.constants or len(node.input) < 3:
            continue
        name = node.input[2]
        if name not in renamed:
            zero = view.value(name)
            if zero is None or zero.dtype != np.int8:
                continue
            renamed[name] = f"{name}/uint8"
            moved = (zero.astype(np.int16) + 128).astype(np.uint8)
            model.graph.initializer.append(numpy_helper.from_array(moved, renamed[name]))
        node.input[2] = renamed[name]
    del model.graph.value_info[:]  # what shape inference said of them
    return model
