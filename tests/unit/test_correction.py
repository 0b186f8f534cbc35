"""What rounding adds on average is taken off, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgemm.runtime import onnxruntime
from edgemm.simulation import unbiased

WIDTH, TOKENS = 16, 40
SPEC: dict[str, Any] = {
    "name": "decoder",
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["b", WIDTH]}],
    "outputs": [{"name": n, "dtype": "float32", "shape": ["b", TOKENS]} for n in ("logits", "twice")],
}


def graph(weights: np.ndarray) -> onnx.ModelProto:
    """logits = x W, which another node takes too."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["logits"]), helper.make_node("Add", ["logits"] * 2, ["twice"])]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", WIDTH])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", TOKENS]) for n in ("logits", "twice")],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    files = {"decoder.onnx": model.SerializeToString()}
    return onnxruntime.compile_component(files, SPEC, {"threads": 1})({"x": x})


def test_the_mean_error_over_the_samples_is_gone_and_the_rest_stays() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((WIDTH, TOKENS)).astype(np.float32)
    rough = (exact + 0.1 * rng.standard_normal(exact.shape)).astype(np.float32)
    samples = [{"x": (1 + rng.standard_normal((1, WIDTH))).astype(np.float32)} for _ in range(64)]
    x = np.concatenate([s["x"] for s in samples])
    wanted, before = run(graph(exact), x), run(graph(rough), x)
    after = run(unbiased(graph(rough), graph(exact), SPEC, samples, "logits"), x)
    error = before["logits"] - wanted["logits"]
    assert np.abs(error.mean(0)).max() > 0.1
    np.testing.assert_allclose(after["logits"] - wanted["logits"], error - error.mean(0), atol=1e-4)
    np.testing.assert_allclose(after["twice"], before["twice"], atol=1e-4)


def test_without_samples_nothing_changes() -> None:
    weights = np.ones((WIDTH, TOKENS), np.float32)
    assert unbiased(graph(weights), graph(2 * weights), SPEC, [], "logits") == graph(weights)
