"""TensorRT's Q/DQ: where it stands, and that it computes what a plain reference computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgemm.graph import name_nodes, qdq
from edgemm.graph.calibrated import strip
from edgemm.graph.ranges import largest

RNG = np.random.default_rng(0)
W = RNG.standard_normal((32, 32)).astype(np.float32)
B = RNG.standard_normal(32).astype(np.float32)
X = RNG.standard_normal((4, 8, 32)).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto], shape: tuple[str, ...] | None = None, **constants: NDArray[Any]
) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 32])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    stored = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    made = helper.make_model(
        helper.make_graph(nodes, "g", ends, out, stored), opset_imports=[helper.make_opsetid("", 19)], ir_version=10
    )
    name_nodes(made)
    return made


def attention() -> onnx.ModelProto:
    """LayerNormalization, q, k and v of one tensor, softmax, output product, residual sum, a product too small."""
    n = helper.make_node
    nodes = [
        n("LayerNormalization", ["x", "gain", "b"], ["h"]),
        n("MatMul", ["h", "wq"], ["q"]),
        n("MatMul", ["h", "wk"], ["k"]),
        n("MatMul", ["h", "wv"], ["v0"]),
        n("Add", ["v0", "b"], ["v"]),
        n("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        n("MatMul", ["q", "kt"], ["scores"]),
        n("Softmax", ["scores"], ["p"], axis=-1),
        n("MatMul", ["p", "v"], ["c"]),
        n("Transpose", ["c"], ["c1"], perm=[0, 2, 1]),
        n("Transpose", ["c1"], ["c2"], perm=[0, 2, 1]),
        n("MatMul", ["c2", "wo"], ["o"]),
        n("Add", ["x", "o"], ["r"]),
        n("MatMul", ["r", "head"], ["y"]),
    ]
    weights = {k: RNG.standard_normal((32, 32)).astype(np.float32) for k in ("wq", "wk", "wv", "wo")}
    head = RNG.standard_normal((32, 4)).astype(np.float32)
    return model(nodes, ("n", "t", "k"), gain=np.ones(32, np.float32), b=B, head=head, **weights)


def constants(graph: onnx.ModelProto) -> set[str]:
    return {i.name for i in graph.graph.initializer}


def run(graph: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def rounded(x: NDArray[Any], scale: NDArray[Any]) -> NDArray[Any]:
    """INT8 and back, as the ONNX specification has it."""
    return np.clip(np.rint(x / scale), -128, 127) * scale


def test_q_dq_stands_at_products_with_constant_weights_alone() -> None:
    graph = attention()
    placed, names = qdq.place(graph, {"h": (-3.0, 3.0)}, largest(graph, [{"x": X}]), constants(graph))
    onnx.checker.check_model(placed, full_check=True)
    view = {o: n for n in placed.graph.node for o in n.output}
    quantized = {n.name: [view[i].op_type for i in n.input if i in view] for n in placed.graph.node}
    assert len(names) == 4
    assert all(quantized[name] == ["DequantizeLinear"] * 2 for name in names)
    for kind in ("Softmax", "Add", "LayerNormalization", "Transpose"):
        for node in placed.graph.node:
            if node.op_type == kind:
                assert "DequantizeLinear" not in quantized[node.name], node.name
    assert Counter(n.op_type for n in placed.graph.node)["QuantizeLinear"] == 2, "one for q, k and v, one for o"
    assert Counter(n.op_type for n in placed.graph.node)["LayerNormalization"] == 1


def test_everything_is_symmetric_int8_and_weights_have_a_scale_a_channel() -> None:
    graph = attention()
    placed, _ = qdq.place(graph, {"h": (-3.0, 3.0)}, largest(graph, [{"x": X}]), constants(graph))
    stored = {i.name: numpy_helper.to_array(i) for i in placed.graph.initializer}
    for node in placed.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert stored[node.input[2]].dtype == np.int8
            assert not stored[node.input[2]].any()
            assert (stored[node.input[1]] > 0).all()
            if node.input[0] in stored:
                assert stored[node.input[0]].dtype == np.int8
                assert stored[node.input[1]].shape == (32,)
    assert not [n for n, v in stored.items() if n in ("wq", "wk", "wv", "wo")], "FP32 weights stay behind"


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm, transposed"])
def test_a_product_equals_the_plain_reference(kind: str) -> None:
    n = helper.make_node
    if kind == "MatMul":
        graph = model([n("MatMul", ["x", "w"], ["y"])], w=W)
    else:
        flat = n("Reshape", ["x", "s"], ["f"])
        weight = W if kind == "Gemm" else np.ascontiguousarray(W.T)
        gemm = n("Gemm", ["f", "w", "b"], ["y"], transB=int(kind != "Gemm"))
        graph = model([flat, gemm], w=weight, b=B, s=np.array([-1, 32]))
    magnitude = 2.5
    placed, (name,) = qdq.place(graph, {"x": (-magnitude, magnitude)}, largest(graph, [{"x": X}]), constants(graph))
    assert name
    step = qdq.half_scales(np.array(magnitude))
    weights = qdq.half_scales(np.abs(W).max(0))
    expected = rounded(X, step) @ rounded(W, weights) + (0 if kind == "MatMul" else B)
    np.testing.assert_allclose(run(placed, X).reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_equals_the_plain_reference_and_a_depthwise_one_stays_in_float() -> None:
    n = helper.make_node
    kernel = RNG.standard_normal((32, 8, 3)).astype(np.float32)
    deep = RNG.standard_normal((32, 1, 3)).astype(np.float32)
    nodes = [n("Conv", ["x", "k"], ["c"], pads=[1, 1]), n("Conv", ["c", "d"], ["y"], pads=[1, 1], group=32)]
    graph = model(nodes, k=kernel, d=deep)
    placed, names = qdq.place(graph, {"x": (-3.0, 3.0)}, largest(graph, [{"x": X}]), constants(graph))
    assert len(names) == 1
    scales = qdq.half_scales(np.abs(kernel).max((1, 2)))[:, None, None]
    reference = model(nodes, k=rounded(kernel, scales).astype(np.float32), d=deep)
    expected = run(reference, rounded(X, qdq.half_scales(np.array(3.0))).astype(np.float32))
    np.testing.assert_allclose(run(placed, X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("zero", "scale", "covered"),
    [
        (np.int8(0), 0.1, (-12.7, 12.7)),
        (np.uint8(0), 0.1, (0, 25.5)),
        (np.uint8(128), 0.1, (-12.8, 12.7)),
        (np.int8(-100), 0.1, (-2.8, 22.7)),
    ],
)
def test_a_quantizers_range_is_read_from_its_scale_and_zero_point(
    zero: Any, scale: float, covered: tuple[float, float]
) -> None:
    n = helper.make_node
    nodes = [
        n("QuantizeLinear", ["x", "s", "z"], ["q"]),
        n("DequantizeLinear", ["q", "s", "z"], ["d"]),
        n("DequantizeLinear", ["w8", "ws", "wz"], ["w"], axis=1),
        n("MatMul", ["d", "w"], ["y"]),
    ]
    scales = (np.abs(W).max(0) / 127).astype(np.float32)
    stored = np.rint(W / scales).astype(np.int8)
    weights = {"w8": stored, "ws": scales, "wz": np.zeros(32 if zero else (), np.int8)}
    quantized = model(nodes, s=np.float32(scale), z=np.asarray(zero), **weights)
    calibrated = strip(quantized, model([n("MatMul", ["x", "v"], ["y"])], v=np.ones_like(W)))
    assert len(calibrated.weights) == 1
    assert calibrated.ranges == {"x": pytest.approx(covered, rel=1e-6)}
    assert [x.op_type for x in calibrated.model.graph.node] == ["MatMul"]
    (weight,) = calibrated.model.graph.initializer
    np.testing.assert_allclose(numpy_helper.to_array(weight), stored * scales, rtol=1e-6)


def test_a_range_holds_behind_what_only_moves_values_and_else_the_observed_one_is_taken() -> None:
    n = helper.make_node
    nodes = [
        n("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        n("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
        n("MatMul", ["u", "w"], ["m"]),
        n("Relu", ["m"], ["r"]),
        n("MatMul", ["r", "w2"], ["y"]),
    ]
    graph = model(nodes, w=W, w2=W.copy())
    found = largest(graph, [{"x": X}])
    placed, names = qdq.place(graph, {"x": (-2.0, 2.0)}, found, constants(graph))
    stored = {i.name: numpy_helper.to_array(i) for i in placed.graph.initializer}
    assert len(names) == 2
    assert stored["u/scale"] == qdq.half_scales(np.array(2.0))
    assert stored["r/scale"] == qdq.half_scales(np.array(found["r"]))


def test_without_ranges_weights_alone_are_int8() -> None:
    graph = attention()
    placed, names = qdq.place(graph, {}, largest(graph, [{"x": X}]), constants(graph))
    kinds = Counter(n.op_type for n in placed.graph.node)
    assert (len(names), kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (4, 0, 4)


def test_a_table_that_is_a_products_weight_too_is_stored_once_and_in_float_with_it() -> None:
    n = helper.make_node
    nodes = [n("Gather", ["table", "ids"], ["e"]), n("Gemm", ["e", "table"], ["y"], transB=1)]
    weight = np.random.default_rng(0).standard_normal((2048, 32)).astype(np.float32)
    graph = model(nodes, ("n", "v"), table=weight, ids=np.arange(3, dtype=np.int64))
    placed, names = qdq.place(graph, {"e": (-3.0, 3.0)}, {}, {"table"})
    onnx.checker.check_model(placed, full_check=True)
    assert len(names) == 1
    dequantize = next(node for node in placed.graph.node if node.output[0] == "table/dequantized")
    assert {node.op_type for node in placed.graph.node if dequantize.output[0] in node.input} == {"Gather", "Gemm"}
    assert [i.dims for i in placed.graph.initializer if len(i.dims) == 2] == [[2048, 32]]
    for float_ones in (qdq.place(graph, {"e": (-3.0, 3.0)}, {}, frozenset()), qdq.place(graph, {}, {}, {"table"})):
        assert not float_ones[1] and not any(node.op_type == "DequantizeLinear" for node in float_ones[0].graph.node)


def test_what_the_quantizer_kept_in_float_stays_so() -> None:
    graph = attention()
    all_of_them = constants(graph)
    _, names = qdq.place(graph, {"h": (-3.0, 3.0)}, largest(graph, [{"x": X}]), all_of_them)
    kept = next(n for n in graph.graph.node if n.name == names[0])
    placed, fewer = qdq.place(graph, {"h": (-3.0, 3.0)}, largest(graph, [{"x": X}]), all_of_them - {kept.input[1]})
    assert set(names) - set(fewer) == {kept.name}
    assert kept in placed.graph.node


def test_a_product_whose_input_is_always_zero_stays_in_float() -> None:
    n = helper.make_node
    nodes = [
        n("Mul", ["x", "o"], ["m"]),
        n("MatMul", ["m", "w"], ["y0"]),
        n("MatMul", ["x", "w"], ["y1"]),
        n("Add", ["y0", "y1"], ["y"]),
    ]
    graph = model(nodes, o=np.zeros(1, np.float32), w=W)
    _, names = qdq.place(graph, {"x": (-2.0, 2.0)}, largest(graph, [{"x": X}]), constants(graph))
    assert len(names) == 1


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 0.7, 3.14, 500.0])
def test_scales_are_float16_numbers_that_cover_the_range(magnitude: float) -> None:
    scale = qdq.half_scales(np.array(magnitude))
    assert float(np.float16(scale)) == float(scale) > 0
    assert 127 * float(scale) >= magnitude


def test_infinities_are_no_magnitude() -> None:
    n = helper.make_node
    nodes = [n("Where", ["c", "i", "x"], ["w"]), n("Softmax", ["w"], ["y"], axis=-1)]
    mask = np.zeros((8, 32), bool)
    mask[0, 0] = True
    found = largest(model(nodes, c=mask, i=np.float32(-np.inf)), [{"x": X}])
    assert found["w"] == pytest.approx(np.abs(X[:, ~mask]).max())


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_a_range_off_zero_is_rounded_around_its_middle(kind: str) -> None:
    """As with a zero point: all 255 levels are spent on the range, and the product is the plain reference's."""
    n = helper.make_node
    x = np.maximum(X, -0.2)
    nodes = [n("Reshape", ["x", "s"], ["f"]), n("Gemm", ["f", "w", "b"], ["y"], transB=1, alpha=0.5)]
    weight = np.ascontiguousarray(W.T)
    if kind == "MatMul":
        nodes, weight = [n("MatMul", ["x", "w"], ["p"]), n("Add", ["p", "b"], ["y"])], W
    graph = model(nodes, ("n", "t", "k") if kind == "MatMul" else ("n", "k"), w=weight, b=B, s=np.array([-1, 32]))
    placed, _ = qdq.place(graph, {"x": (-0.2, 3.8)}, largest(graph, [{"x": x}]), constants(graph))
    onnx.checker.check_model(placed, full_check=True)
    stored = {i.name: numpy_helper.to_array(i) for i in placed.graph.initializer}
    (quantize,) = [m for m in placed.graph.node if m.op_type == "QuantizeLinear"]
    middle = stored["x/centered/middle" if kind == "MatMul" else "f/centered/middle"]
    assert middle == pytest.approx(1.8, abs=4 / 100)
    assert stored[quantize.input[1]] == pytest.approx(4 / 254, rel=0.02)
    assert middle % stored[quantize.input[1]] == 0, "zero is a level"
    assert middle == np.float16(middle), "in FP16, too"
    step, steps = stored[quantize.input[1]], qdq.half_scales(np.abs(W).max(0))
    alpha = 0.5 if kind == "Gemm" else 1.0
    expected = alpha * ((rounded(x - middle, step) + middle) @ rounded(W, steps)) + B
    np.testing.assert_allclose(run(placed, x).reshape(expected.shape), expected, rtol=1e-4, atol=1e-3)


def test_weights_that_were_only_rounded_are_taken_from_the_graph_before() -> None:
    n = helper.make_node
    scales = (np.abs(W).max(0) / 128).astype(np.float32)
    stored = np.rint(W / scales).clip(-128, 127).astype(np.int8)
    nodes = [n("DequantizeLinear", ["w8", "ws", "wz"], ["w"], axis=1), n("MatMul", ["x", "w"], ["y"], name="product")]
    quantized = model(nodes, w8=stored, ws=scales, wz=np.zeros(32, np.int8))

    def weights(name: str, value: NDArray[Any]) -> NDArray[Any]:
        before = model([n("MatMul", ["x", "v"], ["y"], name=name)], v=value)
        (weight,) = strip(quantized, before).model.graph.initializer
        return numpy_helper.to_array(weight)

    np.testing.assert_array_equal(weights("product", W), W)
    smoothed = weights("product", W / np.geomspace(0.1, 10, len(W), dtype=np.float32)[:, None])
    assert 0 < np.square(smoothed - W).mean() < np.square(stored * scales - W).mean() / 10
    for other in (weights("another", W), weights("product", W[::-1].copy()), weights("product", W[:, :16])):
        np.testing.assert_allclose(other, stored * scales, rtol=1e-6)
