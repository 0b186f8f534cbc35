"""What the stage makes of a graph for a CPU, and constant activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgemm.artifact import build
from edgemm.graph.bypass import quantized_products
from edgemm.graph.saturation import pairs
from edgemm.quantizers import nncf
from edgemm.recipe import load_recipe
from edgemm.recording import spread
from edgemm.simulation import answers, simulated
from edgemm.stages.quantize import Work
from edgemm.target import Target
from tests.unit.test_tuning import SPEC, WIDTH, graph, samples


def work(tmp_path: Path, **target: Any) -> Work:
    plain = build("graph", tmp_path, config={}, make=lambda out: onnx.save(graph(), out / "g.onnx"))
    found = Work(
        plain, load_recipe("default", {"data": "easy_vqa"}), Target(name="t", backend="openvino", **target), tmp_path
    )
    vars(found).update({"specs": {"g": SPEC}})
    return found


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_activations_give_a_graph_that_runs(value: float) -> None:
    same = [{"x": np.full((4, WIDTH), value, np.float32)}] * 4
    made = nncf.quantize(graph(), same, nncf.Options())
    for row in answers(simulated(made, SPEC), same):
        assert np.isfinite(row["y"]).all()


@pytest.mark.parametrize(("isa", "seven"), [("avx512_vnni", False), ("avx2", True)])
def test_what_a_cpu_without_vnni_gets_is_proven(tmp_path: Path, isa: str, seven: bool) -> None:
    made = nncf.quantize(graph(), samples(), nncf.Options())
    ready, found = work(tmp_path, isa=isa).unsaturated("g", made)
    assert (found.isa, found.sixteen_bits) == (isa, seven)
    assert set(found.proven) | set(found.unproven) == set(quantized_products(ready))
    if seven:
        assert found.seven_bits
        assert found.unproven == ()
        assert all(p.proven for p in pairs(ready))
    else:
        assert (found.seven_bits, found.floats) == ((), ())
        assert found.unproven


@pytest.mark.parametrize(
    ("named", "prune", "floats"),
    [
        ("fusion/key_tokens/MatMul", [{"use": "key_tokens", "keep": 2}], ("Conv", "*key_tokens*")),
        ("fusion/key_tokens/MatMul", [], ("Conv",)),
        ("fusion/fc1/MatMul", [{"use": "key_tokens", "keep": 2}], ("Conv",)),
    ],
)
def test_what_chooses_tokens_stays_float(tmp_path: Path, named: str, prune: list[Any], floats: tuple[str, ...]) -> None:
    model = graph()
    model.graph.node[0].name = named
    plain = build("graph", tmp_path, config={}, make=lambda out: onnx.save(model, out / "g.onnx"))
    quantize = {"use": "nncf", "keep_float": ["Conv"]}
    recipe = load_recipe("default", {"data": "easy_vqa", "prune": prune, "quantize": quantize})
    found = Work(plain, recipe, Target(name="t", backend="openvino"), tmp_path)
    vars(found).update({"specs": {"g": SPEC}})
    assert found.options["g"].keep_float == floats


def test_samples_are_spread() -> None:
    assert spread(range(10), 3) == [1, 4, 7]
    assert spread(range(2), 8) == [0, 1]
    assert spread(range(5), 0) == []
