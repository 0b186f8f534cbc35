"""The kernels of a decoder that keeps its caches, of layers of unlike heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgemm.backends import openvino as backend
from edgemm.kernels import kernels
from edgemm.runtime.session import Directory
from edgemm.target import Target

HEADS = {"key_1": 3, "key_10": 5}


def test_each_cache_gets_its_own_layer(tmp_path: Path) -> None:
    nodes, inputs, outputs = [], [], []
    for name, heads in HEADS.items():
        ports = {f"new_{name}": 1, name: "past"}
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, heads, t, 4]) for n, t in ports.items()]
        outputs.append(helper.make_tensor_value_info(f"next_{name}", TensorProto.FLOAT, [1, heads, "all", 4]))
        nodes.append(helper.make_node("Concat", [name, f"new_{name}"], [f"next_{name}"], name=f"join_{name}", axis=2))
        outputs.append(helper.make_tensor_value_info(f"sum_{name}", TensorProto.FLOAT, [1, heads, 4]))
        nodes.append(
            helper.make_node("ReduceSum", [f"next_{name}", "axes"], [f"sum_{name}"], name=f"sum_{name}", keepdims=0)
        )
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [2])
    graph = helper.make_graph(nodes, "d", inputs, outputs, [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "d.onnx")
    cache = {name: f"next_{name}" for name in HEADS}
    backend.compile_component(tmp_path / "d.onnx", tmp_path, {}, Target(name="t", backend="openvino"), cache)
    spec: dict[str, Any] = {"name": "d"}
    sample = {n: np.ones((1, h, t, 4), np.float32) for c, h in HEADS.items() for n, t in ((c, 2), (f"new_{c}", 1))}
    found = kernels(Directory(tmp_path), spec, {"threads": 1, "precision": "f32"}, [sample], model)
    assert sum(k.ms for k in found) > 0
