"""Calibration samples: each modality and length has its share, and what ranges they give is compared between halves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemm.data import Sample, stratified
from edgemm.graph.ranges import unsettled


def rows(tmp_path: Path) -> list[Sample]:
    """800 with an image and texts of 1 to 100 characters, 150 with a text alone, 50 with a recording alone."""
    found = [Sample(f"i{i}", "g", image=b"", text="x" * (1 + i % 100)) for i in range(800)]
    found += [Sample(f"t{i}", "g", text="x" * (1 + i % 100)) for i in range(150)]
    for i in range(50):
        path = tmp_path / f"{i}.wav"
        path.write_bytes(bytes(1000 * (1 + i)))
        found.append(Sample(f"a{i}", "g", audio=path))
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_each_subset_and_length_has_its_share(tmp_path: Path, seed: int) -> None:
    samples = rows(tmp_path)
    drawn = stratified(samples, 100, seed)
    assert len({s.id for s in drawn}) == 100
    kinds = Counter(s.id[0] for s in drawn)
    assert kinds["i"] == pytest.approx(80, abs=2)
    assert kinds["t"] == pytest.approx(15, abs=2)
    assert kinds["a"] == pytest.approx(5, abs=2)
    texts = sorted(len(s.text) for s in drawn if s.text)
    for i, quarter in enumerate((25, 50, 75)):
        assert sum(t <= quarter for t in texts) == pytest.approx(len(texts) * (i + 1) / 4, abs=4)
    sizes = [s.audio.stat().st_size for s in drawn if isinstance(s.audio, Path)]
    assert min(sizes) < 25_000 < max(sizes)


def test_the_seed_decides_and_few_samples_are_all_taken(tmp_path: Path) -> None:
    samples = rows(tmp_path)
    assert stratified(samples, 100, 3) == stratified(samples, 100, 3)
    assert stratified(samples, 100, 3) != stratified(samples, 100, 4)
    assert stratified(samples[:7], 8, 0) == samples[:7]
    assert len(stratified(samples, 1, 0)) == 1


def test_a_range_that_one_half_alone_shows_has_not_settled() -> None:
    constants = {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8), "two": np.array(2, np.float32)}
    nodes = [helper.make_node("Mul", ["x", "two"], ["y"])]
    nodes += [helper.make_node("QuantizeLinear", [n, "s", "z"], [f"{n}q"]) for n in ("x", "y", "steady")]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in ("x", "steady")],
        [helper.make_tensor_value_info("yq", TensorProto.INT8, [3])],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    def half(largest: float) -> list[dict[str, np.ndarray]]:
        return [{"x": np.array([0, -largest, 1], np.float32), "steady": np.ones(3, np.float32)}] * 3

    assert unsettled(model, half(10), half(11)) == (3, ())
    assert unsettled(model, half(10), half(20)) == (3, ("x", "y"))
