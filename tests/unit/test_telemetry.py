"""Nothing about a user leaves the machine, and no id of it is kept, by our dependencies either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper

RUN = """
import sys, time
import edgemm.runtime.onnxruntime as runtime
port = {"name": "x", "dtype": "float32", "shape": [1]}
spec = {"name": "g", "inputs": [port], "outputs": [{**port, "name": "y"}]}
call = runtime.compile_component({"g.onnx": open(sys.argv[1], "rb").read()}, spec, {"threads": 1})
import numpy as np
assert call({"x": np.ones(1, np.float32)})["y"][0] == 1
time.sleep(1)
"""


def test_onnx_runtime_keeps_nothing_at_home(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "g.onnx")
    (home := tmp_path / "home").mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home)}
    command = [sys.executable, "-B", "-c", RUN, tmp_path / "g.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.rglob("*")) == []
