"""The search for INT8 that keeps the answers, on graphs made to break it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemm.errors import InputError
from edgemm.graph.bypass import bypass, quantized_products
from edgemm.quantizers import nncf
from edgemm.recipe import QuantizeSearch
from edgemm.tuning import Judge, tune

WIDTH, OUTLIERS = 32, (3, 11, 25)
SPEC: dict[str, Any] = {
    "name": "g",
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["b", WIDTH]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["b", WIDTH]}],
}


def graph(layers: int = 2, outliers: tuple[int, ...] = OUTLIERS) -> onnx.ModelProto:
    """LayerNorm and product, `layers` times; gains of 100 in three channels, whose weights are 1/100 of the others."""
    rng = np.random.default_rng(0)
    gain = np.ones(WIDTH, np.float32)
    gain[list(outliers)] = 100
    nodes, constants, x = [], {"gain": gain, "zero": np.zeros(WIDTH, np.float32)}, "x"
    for i in range(layers):
        out = "y" if i == layers - 1 else f"x{i}"
        constants[f"w{i}"] = (rng.standard_normal((WIDTH, WIDTH)) / gain[:, None]).astype(np.float32)
        nodes.append(helper.make_node("LayerNormalization", [x, "gain", "zero"], [f"n{i}"], name=f"norm_{i}"))
        nodes.append(helper.make_node("MatMul", [f"n{i}", f"w{i}"], [out], name=f"product_{i}"))
        x = out
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", WIDTH])],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def samples(n: int = 40) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((4, WIDTH)).astype(np.float32)} for _ in range(n)]


def search(**changes: Any) -> QuantizeSearch:
    return QuantizeSearch(**{"sqnr_db": 25, "smooth_quant": (-1, 0.5), "ranges": ("minmax",), **changes})


def tuned(model: onnx.ModelProto, wanted: QuantizeSearch) -> tuple[Any, Any]:
    return tune(SPEC, model, samples(), nncf.quantize, nncf.Options(), wanted)


def test_outliers_are_smoothed() -> None:
    options, found = tuned(graph(), search())
    plain, smooth = found.trials
    assert plain.sqnr_db < 15 < 25 < smooth.sqnr_db
    assert (options.smooth_quant, options.keep_float) == (0.5, ())
    assert found.sensitivity == ()


def test_the_first_that_is_good_enough_is_taken() -> None:
    _, found = tuned(graph(outliers=()), search())
    assert [t.smooth_quant for t in found.trials] == [-1]


def test_where_nothing_smooths_the_most_sensitive_product_stays_float() -> None:
    options, found = tuned(graph(4), search(smooth_quant=(-1,), sqnr_db=22))
    gains = {row.name: row.gain_db for row in found.sensitivity}
    assert set(gains) == {f"product_{i}" for i in range(4)}
    assert options.keep_float[0] == max(gains, key=gains.__getitem__)
    made = nncf.quantize(graph(4), samples(), options)
    assert not set(quantized_products(made)) & set(options.keep_float)


def test_half_of_the_products_stay_int8_whatever_is_wanted() -> None:
    options, found = tuned(graph(4), search(sqnr_db=80, smooth_quant=(-1,)))
    assert len(options.keep_float) == 2
    assert found.sqnr_db < 80


def test_a_spent_budget_tries_nothing_more() -> None:
    _, found = tuned(graph(), search(budget_minutes=1e-9, sqnr_db=80))
    assert len(found.trials) == 1


def test_all_products_bypassed_leave_the_weights_rounding_alone() -> None:
    made = nncf.quantize(graph(outliers=()), samples(), nncf.Options())
    judge = Judge(SPEC, graph(outliers=()), samples(8))
    names = quantized_products(made)
    assert names == ["product_0", "product_1"]
    assert judge(graph(outliers=())) > 100
    assert judge(bypass(made, names)) > judge(bypass(made, names[:1])) > judge(made)


def test_a_pattern_that_matches_no_node_names_near_ones() -> None:
    with pytest.raises(InputError, match=r"keep_float: 'prodct_0' matches no node\n  fix: near: product_0"):
        nncf.quantize(graph(), samples(), nncf.Options(keep_float=("prodct_0",)))
