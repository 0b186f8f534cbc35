"""INT8 embedding tables: what is looked up is the row to half a step, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemm.graph.embeddings import int8_tables
from edgemm.runtime import onnxruntime


def graph(table: np.ndarray, axis: int = 0, *, tied: bool = False) -> onnx.ModelProto:
    """ids int64[B,T] -> rows of `table`, and their products with all rows when `tied`."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"], axis=axis)]
    outputs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["b", "t", "d"])]
    if tied:
        nodes += [
            helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
            helper.make_node("MatMul", ["rows", "head"], ["logits"]),
        ]
        outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", "v"]))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "t"])
    made = helper.make_graph(nodes, "g", [ids], outputs, [numpy_helper.from_array(table, "table")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto, ids: np.ndarray) -> dict[str, np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    component = {
        "name": "g",
        "inputs": [{"name": "ids", "dtype": "int64", "shape": ["b", "t"]}],
        "outputs": [{"name": o.name, "dtype": "float32", "shape": []} for o in model.graph.output],
    }
    return onnxruntime.compile_component({"g.onnx": model.SerializeToString()}, component, {"threads": 1})({"ids": ids})


def table(rows: int = 1024, width: int = 64) -> np.ndarray:
    """Rows of very different size, one of zeros."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, width)) * np.exp(rng.uniform(-9, 9, (rows, 1)))
    values[7] = 0
    return values.astype(np.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_right_to_half_a_step_of_their_own_scale(tied: bool) -> None:
    values, ids = table(), np.array([[0, 7, 1023], [5, 5, 9]])
    model = int8_tables(graph(values, tied=tied))
    rows = run(model, ids)["rows"]
    assert np.all(np.abs(rows - values[ids]) <= np.abs(values[ids]).max(-1, keepdims=True) / 127 * 0.501)
    assert not rows[0, 1].any()
    kept = {i.name: numpy_helper.to_array(i).dtype for i in model.graph.initializer}
    assert ("table" in kept) == tied
    assert list(kept.values()).count(np.dtype(np.int8)) == 1


@pytest.mark.parametrize(
    "model",
    [
        graph(table(), axis=1),
        graph(table(64, 64)),
        graph(np.arange(1 << 17, dtype=np.float32)),
    ],
    ids=["columns", "small", "a vector"],
)
def test_other_lookups_stay_as_they_are(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert int8_tables(model).SerializeToString() == before
