"""One OpenVINO graph: how many threads it takes, and whose memory it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgemm.backends import openvino as backend
from edgemm.runtime.openvino import SMALL, Engine, compile_component
from edgemm.runtime.session import Directory
from edgemm.target import Target


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x + x of any length."""
    out = tmp_path_factory.mktemp("twice")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, "all"]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", ports[:1], ports[1:])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), out / "twice.onnx")
    backend.compile_component(out / "twice.onnx", out, {}, Target(name="t", backend="openvino"), {})
    return out


def engine(directory: Path, threads: int, streams: int, own: int | None = None) -> Engine:
    inputs, outputs = ([{"name": name, "shape": [1, "all"], "dtype": "float32"}] for name in ("x", "y"))
    spec: dict[str, Any] = {"name": "twice", "inputs": inputs, "outputs": outputs, "threads": own}
    settings = {"threads": threads, "precision": "f32", "streams": streams}
    return compile_component(Directory(directory), spec, settings)


@pytest.mark.parametrize(
    ("threads", "own", "streams", "taken"), [(2, None, 1, 2), (2, 1, 1, 1), (1, 2, 1, 1), (2, 1, 2, 2), (4, 1, 2, 2)]
)
def test_a_component_takes_as_many_threads_as_it_may(
    directory: Path, threads: int, own: int | None, streams: int, taken: int
) -> None:
    made = engine(directory, threads, streams, own)
    assert made.compiled.get_property("INFERENCE_NUM_THREADS") == taken
    assert made({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("length", [1, 5, SMALL // 4 + 1])
def test_what_was_given_before_is_neither_read_again_nor_written_to(directory: Path, length: int, streams: int) -> None:
    run = engine(directory, 2, streams)
    first, second = (np.full((1, length), value, np.float32) for value in (1, 3))
    for given, expected in ((first, 2), (second, 6), (first, 2), (first[:, :1], 2), (second, 6)):
        assert set(run({"x": given})["y"].ravel().tolist()) == {expected}
    assert (first == 1).all()
    assert (second == 3).all()
    chained = run({"x": run({"x": first})["y"]})["y"]  # its own buffer, which it writes to
    assert set(chained.ravel().tolist()) == {4}
