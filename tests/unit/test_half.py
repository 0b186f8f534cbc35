"""FP16 by types: what overflows stays in FP32, inputs and outputs do too, and the rest is float16."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgemm.errors import InputError
from edgemm.graph import half, opset, qdq
from edgemm.graph.lower import kept_in_float32, lower
from edgemm.graph.ranges import largest

X = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
F16, F32 = TensorProto.FLOAT16, TensorProto.FLOAT


def model(nodes: list[onnx.NodeProto], version: int = 18, **constants: NDArray[Any]) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("x", F32, ["n", 32])]
    out = [helper.make_tensor_value_info("y", F32, ["rows", "columns"])]
    stored = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", ends, out, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10)


def halved(graph: onnx.ModelProto, x: NDArray[Any] = X) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, int]]:
    """The FP16 graph, the nodes kept in FP32, and the type of each tensor."""
    prepared = half.prepare(graph, 20, "g")
    made, kept = half.to_half(prepared, largest(prepared, [{"x": x}]))
    onnx.checker.check_model(made, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    return made, kept, types


def run(graph: onnx.ModelProto, x: NDArray[Any] = X) -> NDArray[Any]:
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def n(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], f"the_{kind}", **attributes)


def decomposed(gain: float) -> onnx.ModelProto:
    """LayerNormalization as older exporters write it: x^2 is what passes float16's range."""
    nodes = [
        n("Mul", "x g", "big"),
        n("ReduceMean", "big axes", "mean", keepdims=1),
        n("Sub", "big mean", "d"),
        n("Pow", "d two", "square"),
        helper.make_node("ReduceMean", ["square", "axes"], ["variance"], "variance", keepdims=1),
        n("Add", "variance eps", "v"),
        n("Sqrt", "v", "s"),
        n("Div", "d s", "y"),
    ]
    constants = {"g": gain, "two": 2.0, "eps": 1e-12}
    return model(nodes, axes=np.array([-1]), **{k: np.array(v, np.float32) for k, v in constants.items()})


def test_inputs_and_outputs_stay_float32_and_all_between_is_float16() -> None:
    nodes = [n("MatMul", "x w", "h"), n("LayerNormalization", "h g b", "l"), n("Softmax", "l", "y")]
    ones = np.ones(16, np.float32)
    graph = model(nodes, w=np.full((32, 16), 0.1, np.float32), g=ones, b=ones)
    made, kept, types = halved(graph)
    assert not kept
    assert (types["x"], types["y"]) == (F32, F32)
    assert {types[t] for t in ("x/half", "h", "l", "y/half")} == {F16}
    assert {i.data_type for i in made.graph.initializer} == {F16}
    assert [x.op_type for x in made.graph.node].count("LayerNormalization") == 1
    np.testing.assert_allclose(run(made), run(graph), atol=2e-3)


def test_what_overflows_on_calibration_data_stays_float32() -> None:
    graph = decomposed(1000.0)
    made, kept, types = halved(graph)
    assert {"the_Pow", "variance", "the_Add"} <= set(kept)
    assert "the_Mul" not in kept
    assert types["square"] == F32
    np.testing.assert_allclose(run(made), run(graph), atol=5e-3)


def test_a_product_and_the_middle_that_is_put_back_are_summed_in_float32() -> None:
    """An activation far off makes the middle large: in float16, what it gives would drown all other answers."""
    x = np.abs(X) / 1000
    x[:, 0] = 500
    weight = np.full((32, 16), 0.25, np.float32)
    nodes = [n("MatMul", "x w", "p"), n("Add", "p b", "y")]
    floats = half.prepare(model(nodes, w=weight, b=np.full(16, -125, np.float32)), 20, "g")
    placed, _ = qdq.place(floats, {"x": (0.0, 500.0)}, largest(floats, [{"x": x}]), {"w"})
    made, kept = half.to_half(placed, largest(floats, [{"x": x}]))
    onnx.checker.check_model(made, full_check=True)
    assert kept and "the_Add" not in kept
    np.testing.assert_allclose(run(made, x), run(placed, x), atol=0.1)
    assert np.abs(run(placed, x) - run(floats, x)).max() < 0.5


def test_an_epsilon_that_float16_flushes_to_zero_keeps_its_node() -> None:
    graph = decomposed(1.0)
    constant = np.ones((3, 32), np.float32)  # no variance at all: without epsilon 0 / 0
    made, kept, _ = halved(graph, constant)
    assert kept == ("the_Add",)
    assert np.isfinite(run(made, constant)).all()


@pytest.mark.parametrize("masked", [-3.4028235e38, -1e9])
def test_a_mask_constant_does_not_pull_attention_into_float32(masked: float) -> None:
    nodes = [n("Where", "c x m", "w"), n("Softmax", "w", "y", axis=-1)]
    keep = np.arange(32) < 20
    graph = model(nodes, c=keep, m=np.float32(masked))
    made, kept, _ = halved(graph)
    assert not kept
    got = run(made)
    assert not got[:, ~keep].any()
    np.testing.assert_allclose(got, run(graph), atol=1e-3)


def test_a_large_constant_that_is_no_mask_keeps_its_node() -> None:
    graph = model([n("Mul", "x big", "m"), n("Mul", "m small", "y")], big=np.float32(1e6), small=np.float32(1e-3))
    graph.graph.node[1].name = "second"
    made, kept, _ = halved(graph)
    assert set(kept) == {"the_Mul", "second"}
    np.testing.assert_allclose(run(made), run(graph), rtol=1e-3)


def test_explicit_casts_and_nodes_that_type_their_output_follow() -> None:
    nodes = [
        n("Shape", "x", "s"),
        n("ConstantOfShape", "s", "ones", value=numpy_helper.from_array(np.ones(1, np.float32))),
        n("Greater", "x zero", "above"),
        n("Cast", "above", "f", to=F32),
        helper.make_node("Constant", [], ["c"], "the_Constant", value=numpy_helper.from_array(np.float32(0.5))),
        helper.make_node("Add", ["ones", "f"], ["a"], "a"),
        helper.make_node("Mul", ["a", "c"], ["y"], "b"),
    ]
    graph = model(nodes, zero=np.float32(0))
    made, kept, types = halved(graph)
    assert not kept
    assert {types[t] for t in ("ones", "f", "a")} == {F16}
    np.testing.assert_array_equal(run(made), run(graph))


def test_an_input_that_an_operator_takes_in_float32_alone_stays_so() -> None:
    nodes = [
        n("Unsqueeze", "x axes", "u"),
        n("Resize", "u  scales", "r", mode="nearest"),
        n("Squeeze", "r axes", "y"),
    ]
    nodes[1] = helper.make_node("Resize", ["u", "", "scales"], ["r"], "the_Resize", mode="nearest")
    graph = model(nodes, axes=np.array([0, 1]), scales=np.array([1, 1, 1, 2], np.float32))
    made, kept, types = halved(graph)
    assert not kept
    assert types["r"] == F16
    np.testing.assert_allclose(run(made), run(graph), atol=2e-3)


@pytest.mark.parametrize(("version", "expected"), [(17, 19), (18, 19), (20, 20)])
def test_the_opset_is_one_with_float16_scales(version: int, expected: int) -> None:
    graph = model([n("Relu", "x", "y")], version)
    assert opset(half.prepare(graph, 20, "g")) == expected


def test_a_newer_opset_than_the_target_reads_is_refused() -> None:
    with pytest.raises(InputError, match=r"encoder: opset 21, and the target's parser reads 20 at most\n  fix: export"):
        half.prepare(model([n("Relu", "x", "y")], 21), 20, "encoder")


def test_control_flow_is_refused_by_name() -> None:
    value = helper.make_tensor_value_info("z", F32, None)
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "branch", [], [value])
    node = helper.make_node("If", ["c"], ["y"], "the_If", then_branch=branch, else_branch=branch)
    with pytest.raises(InputError, match="the_If"):
        half.prepare(model([node], c=np.array(True)), 20, "g")


def test_an_operator_that_is_not_onnxs_own_is_refused_by_name() -> None:
    graph = model([helper.make_node("FusedMatMul", ["x", "w"], ["y"], "fused", domain="com.microsoft")], w=X)
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(InputError, match=r"fused is FusedMatMul of com\.microsoft"):
        half.prepare(graph, 20, "g")


def test_an_opset_that_cannot_be_converted_is_named() -> None:
    graph = model([n("Affine", "x", "y", alpha=1.0, beta=1.0)], 6)
    with pytest.raises(InputError, match=r"g: opset 6 can't be brought to 19: .*\n  fix: export"):
        half.prepare(graph, 20, "g")


def test_lowering_names_what_stays_in_float32_and_leaves_the_model_as_it_was() -> None:
    graph = decomposed(1000.0)
    before = graph.SerializeToString()
    made = lower(graph, None, [{"x": X}], 20, "g")
    assert list(made) == ["fp16"]
    assert "the_Pow" in kept_in_float32(made["fp16"])
    assert graph.SerializeToString() == before
    assert made["fp16"].SerializeToString() == lower(graph, None, [{"x": X}], 20, "g")["fp16"].SerializeToString()
