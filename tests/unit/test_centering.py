"""Centred vocabularies: the same numbers in float, closer ones in INT8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemm.graph.centering import center_vocabulary
from edgemm.runtime import onnxruntime

TOKENS, WIDTH = 512, 16


def table() -> np.ndarray:
    """Rows that have most of their norm in common."""
    rng = np.random.default_rng(0)
    return (3 * rng.standard_normal(WIDTH) + 0.3 * rng.standard_normal((TOKENS, WIDTH))).astype(np.float32)


def graph(product: str, values: np.ndarray, *, tied: bool = True) -> onnx.ModelProto:
    """ids int64[B] -> their rows plus one, times all rows."""
    weights = "table" if tied else "head"
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Add", ["rows", "one"], ["states"]),
        helper.make_node("Gemm", ["states", weights, "bias"], ["logits"], transB=1)
        if product == "Gemm"
        else helper.make_node("MatMul", ["states", weights], ["logits"]),
    ]
    constants = {"table": values, "one": np.ones((1, WIDTH), np.float32), "bias": np.ones(len(values), np.float32)}
    if not tied:
        constants["head"] = values.T if product == "MatMul" else values
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", "n"]) for n in ("rows", "logits")],
        [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    ports = [{"name": o.name, "dtype": "float32", "shape": []} for o in model.graph.output]
    component = {"name": "g", "inputs": [{"name": "ids", "dtype": "int64", "shape": ["b"]}], "outputs": ports}
    call = onnxruntime.compile_component({"g.onnx": model.SerializeToString()}, component, {"threads": 1})
    return call({"ids": np.array([0, 7, TOKENS - 1])})


def rounded(model: onnx.ModelProto, name: str, axis: int) -> onnx.ModelProto:
    """INT8 weights, symmetric, a scale a token."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = numpy_helper.to_array(tensor)
            scale = np.abs(values).max(1 - axis, keepdims=True) / np.float32(127)
            tensor.CopyFrom(numpy_helper.from_array(np.rint(values / scale) * scale, name))
    return model


@pytest.mark.parametrize(("product", "tied"), [("Gemm", True), ("Gemm", False), ("MatMul", False)])
def test_the_numbers_are_the_same_and_int8_is_closer(product: str, tied: bool) -> None:
    name, axis = ("table" if tied else "head"), (0 if product == "Gemm" else 1)
    wanted = run(graph(product, table(), tied=tied))
    centered = run(center_vocabulary(graph(product, table(), tied=tied)))
    for key, value in wanted.items():
        np.testing.assert_allclose(centered[key], value, rtol=1e-5, atol=1e-4)

    def error(model: onnx.ModelProto) -> float:
        logits = run(rounded(model, name, axis))["logits"] - wanted["logits"]
        return float((logits - logits.mean(1, keepdims=True)).std())

    plain, closer = (
        error(m) for m in (graph(product, table(), tied=tied), center_vocabulary(graph(product, table(), tied=tied)))
    )
    assert closer < plain / 3


def test_other_products_stay_as_they_are() -> None:
    few = graph("Gemm", table()[: 7 * WIDTH])
    taken_otherwise = graph("Gemm", table())
    taken_otherwise.graph.node.append(helper.make_node("Identity", ["table"], ["copy"]))
    for model in (few, taken_otherwise):
        before = model.SerializeToString()
        assert center_vocabulary(model).SerializeToString() == before
