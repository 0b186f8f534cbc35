"""The lint says before any build, by node name, what TensorRT refuses: each rule is held against the real parser."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemm.backends import _tensorrt, _tensorrt_lint
from edgemm.errors import EdgemmError, InputError
from edgemm.target import Target

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'edgemm[tensorrt-rtx]'")
TARGET = Target(name="desk", backend="tensorrt_rtx", sm=(86,), precision="f16", precisions=("int8", "fp16"))
PROFILE = {"x": {"min": [1, 16], "opt": [2, 16], "max": [4, 16]}}
WEIGHT = np.linspace(-1, 1, 16 * 16, dtype=np.float32).reshape(16, 16)


def graph(
    nodes: list[onnx.NodeProto], opset: int = 19, batch: int | str = "batch", **constants: np.ndarray
) -> onnx.ModelProto:
    """x float32[batch,16] -> y, of opset 19."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 16] if name == "x" else None)
        for name in ("x", "y")
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=imports, ir_version=10)


def node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), output.split(), f"the_{kind}", **attributes)


def quantized(zero: np.ndarray | None, scale: float = 0.1) -> onnx.ModelProto:
    """Q and DQ around x, then a product with INT8 weights."""
    names = "x s" if zero is None else "x s z"
    nodes = [
        node("QuantizeLinear", names, "q"),
        node("DequantizeLinear", names.replace("x", "q"), "d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "the_weight"),
        node("MatMul", "d wd", "y"),
    ]
    constants = {"s": np.float32(scale), "w": (WEIGHT * 100).astype(np.int8), "ws": np.float32(0.01), "wz": np.int8(0)}
    return graph(nodes, **constants, **({} if zero is None else {"z": zero}))


def biased() -> onnx.ModelProto:
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "s", "z"], ["bd"], "the_bias"),
        node("Add", "x bd", "y"),
    ]
    return graph(nodes, b=np.arange(16, dtype=np.int32), s=np.float32(0.01), z=np.int32(0))


def weights_in_uint8() -> onnx.ModelProto:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], "the_weight"),
        node("MatMul", "x wd", "y"),
    ]
    return graph(nodes, w=np.ones((16, 16), np.uint8), s=np.float32(0.1), z=np.uint8(0))


def integers() -> onnx.ModelProto:
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"),
        node("MatMulInteger", "q w z wz", "i"),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Mul", "f s", "y"),
    ]
    return graph(nodes, w=np.ones((16, 16), np.uint8), wz=np.uint8(0))


def qlinear() -> onnx.ModelProto:
    zero, scale = np.int8(0), np.float32(0.1)
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("QLinearMatMul", "q s z w s z s z", "p"),
        node("DequantizeLinear", "p s z", "y"),
    ]
    return graph(nodes, s=scale, z=zero, w=np.ones((16, 16), np.int8))


def foreign() -> onnx.ModelProto:
    return graph([node("FusedMatMul", "x w", "y", domain="com.microsoft")], w=WEIGHT)


REFUSED: list[tuple[Callable[[], onnx.ModelProto], str, str, str]] = [
    (weights_in_uint8, "the_weight", "weights in uint8", "unsupported input type of UINT8"),
    (lambda: quantized(np.int8(3)), "the_QuantizeLinear", "zero point", "Non-zero zero point is not supported"),
    (lambda: quantized(np.int8(0), 0.0), "the_QuantizeLinear", "scale is zero", "must all be positive"),
    (biased, "the_bias", "int32", "Int32"),
    (integers, "the_DynamicQuantizeLinear", "DynamicQuantizeLinear is not supported", ""),
    (qlinear, "the_QLinearMatMul", "QLinearMatMul is not supported", ""),
    (foreign, "the_FusedMatMul", "an operator of com.microsoft", ""),
]
NAMES = ("uint8", "zero point", "zero scale", "int32 bias", "dynamic", "qlinear", "domain")


@pytest.mark.parametrize(("make", "name", "what", "words"), REFUSED, ids=NAMES)
def test_what_the_parser_refuses_is_predicted(
    make: Callable[[], onnx.ModelProto], name: str, what: str, words: str
) -> None:
    model = make()
    findings = list(_tensorrt_lint.lint(model, PROFILE, 20))
    assert (name, True) in [(f.node, what in f.what) for f in findings]
    assert all(f.fix for f in findings)
    with pytest.raises(EdgemmError) as refused:
        _tensorrt.build(trt, model.SerializeToString(), PROFILE, TARGET, "g")
    assert re.search(words, str(refused.value)), refused.value


@pytest.mark.parametrize("make", [lambda: quantized(np.int8(0)), lambda: graph([node("MatMul", "x w", "y")], w=WEIGHT)])
def test_what_the_parser_takes_has_no_finding(make: Callable[[], onnx.ModelProto]) -> None:
    model = make()
    assert not list(_tensorrt_lint.lint(model, PROFILE, 20))
    assert _tensorrt.build(trt, model.SerializeToString(), PROFILE, TARGET, "g").engine


@pytest.mark.parametrize("zero", [np.uint8(0), None])
def test_uint8_activations_are_refused_though_the_parser_takes_them_for_int8(zero: np.ndarray | None) -> None:
    model = quantized(zero)
    assert "clipped" in next(iter(_tensorrt_lint.lint(model, PROFILE, 20))).what
    built = _tensorrt.build(trt, model.SerializeToString(), PROFILE, TARGET, "g")
    assert built.layers
    assert {"Int8"} == next(row.inputs for row in built.layers if "the_MatMul" in row.nodes)


def test_a_batch_baked_into_the_graph_is_predicted() -> None:
    model = graph([node("MatMul", "x w", "y")], batch=3, w=WEIGHT)
    (finding,) = _tensorrt_lint.lint(model, PROFILE, 20)
    assert finding.node == "x"
    assert "[3, 16]" in finding.what
    with pytest.raises(EdgemmError, match="shape"):
        _tensorrt.build(trt, model.SerializeToString(), PROFILE, TARGET, "g")


def test_a_dynamic_input_without_a_profile_is_predicted() -> None:
    model = graph([node("MatMul", "x w", "y")], w=WEIGHT)
    (finding,) = _tensorrt_lint.lint(model, {}, 20)
    assert (finding.node, "without an optimization profile" in finding.what) == ("x", True)
    with pytest.raises(EdgemmError):
        _tensorrt.build(trt, model.SerializeToString(), {}, TARGET, "g")


def test_a_newer_opset_than_the_device_reads_is_predicted() -> None:
    (finding,) = _tensorrt_lint.lint(graph([node("MatMul", "x w", "y")], opset=22, w=WEIGHT), PROFILE, 20)
    assert "opset 22" in finding.what
    assert "--set export.opset=20" in finding.fix


def test_the_first_finding_is_an_error_with_its_fix() -> None:
    with pytest.raises(InputError, match=r"g: TensorRT refuses the_QuantizeLinear: .*\(and \d more\)\n  fix: quantize"):
        _tensorrt_lint.check(quantized(np.uint8(7)), PROFILE, 20, "g")
