"""The bound on pairs of products is held to a plain reference of what a CPU without VNNI computes."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgemm.graph.bypass import quantized_products
from edgemm.graph.saturation import HIGH, LOW, extremes, pairs, unsaturated


def maddubs(activations: NDArray[np.uint8], weights: NDArray[np.int8]) -> tuple[int, int]:
    """Dot product as vpmaddubsw and vpmaddwd compute it, pairs saturated to int16; and the exact one."""
    a, w = activations.astype(int), weights.astype(int)
    if len(a) % 2:
        a, w = np.append(a, 0), np.append(w, 0)
    sums = [int(a[i] * w[i] + a[i + 1] * w[i + 1]) for i in range(0, len(a), 2)]
    return sum(min(max(s, LOW), HIGH) for s in sums), sum(sums)


def saturates(weights: NDArray[np.int8]) -> bool:
    """Whether some activations make a column saturate: only 0 and 255 can be the worst."""
    return any(
        len(set(maddubs(np.array(a, np.uint8), weights))) > 1 for a in itertools.product((0, 255), repeat=len(weights))
    )


@pytest.mark.parametrize(
    "pair", [(64, 64), (64, 65), (127, 1), (127, 2), (-64, -64), (-64, -65), (127, -127), (-127, 0)]
)
def test_the_bound_is_exact_for_a_pair(pair: tuple[int, int]) -> None:
    weights = np.array(pair, np.int8)
    least, largest = extremes(weights[:, None], 0)
    assert (least >= LOW and largest <= HIGH) is not saturates(weights)


def test_the_bound_is_exact_for_random_weights() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        weights = rng.integers(-90, 91, rng.integers(1, 8)).astype(np.int8)
        least, largest = extremes(weights[:, None], 0)
        seen.add(proven := least >= LOW and largest <= HIGH)
        assert proven is not saturates(weights)
    assert seen == {True, False}


def test_neighbours_are_input_channels() -> None:
    weight = np.zeros((2, 4, 3, 3), np.int8)
    weight[1, 1, 2, 2], weight[1, 2, 2, 2] = 127, 127  # of two pairs: (0,1) and (2,3)
    assert extremes(weight, 1) == (0, 127 * 255)
    weight[1, 3, 2, 2] = 100
    assert extremes(weight, 1) == (0, 227 * 255)


def graph(weight: NDArray[np.int8]) -> onnx.ModelProto:
    """x -> Q/DQ -> MatMul by `weight` -> Q/DQ -> MatMul by itself."""
    constants = {
        "s": np.array(0.02, np.float32),
        "z": np.array(0, np.int8),
        "w": weight,
        "ws": np.full(weight.shape[1], 0.01, np.float32),
        "wz": np.zeros(weight.shape[1], np.int8),
    }

    def rounded(x: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("QuantizeLinear", [x, "s", "z"], [f"{x}q"]),
            helper.make_node("DequantizeLinear", [f"{x}q", "s", "z"], [f"{x}d"]),
        ]

    nodes = [
        *rounded("x"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="weighted"),
        *rounded("y"),
        helper.make_node("MatMul", ["yd", "yd"], ["out"], name="square"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_what_can_saturate_gets_seven_bits_or_stays_float() -> None:
    model = graph(np.full((4, 4), 127, np.int8))
    before = {p.product: p for p in pairs(model)}
    assert (before["weighted"].largest, before["weighted"].proven) == (254 * 255, False)
    assert (before["square"].largest, before["square"].proven) == (None, False)
    made, seven, floats = unsaturated(model)
    assert (seven, floats) == (("weighted",), ("square",))
    assert [(p.product, p.proven) for p in pairs(made)] == [("weighted", True)]
    assert quantized_products(made) == ["weighted"]
    values = {i.name: numpy_helper.to_array(i) for i in made.graph.initializer}
    np.testing.assert_allclose(values["w"] * values["ws"], 127 * 0.01, rtol=0.01)
    assert values["w"].max() == 64
    onnx.checker.check_model(made)


def test_what_is_proven_stays_as_it_is() -> None:
    model = graph(np.full((4, 4), 64, np.int8))
    made, seven, _ = unsaturated(model)
    assert seven == ()
    kept = {i.name: numpy_helper.to_array(i) for i in made.graph.initializer}
    assert kept["w"].max() == 64
    assert pairs(made)[0].largest == 128 * 255
