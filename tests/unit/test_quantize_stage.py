"""What the quantize stage refuses: samples that are missing or broken, what a target can't run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgemm import recording
from edgemm.data import Sample
from edgemm.errors import InputError
from edgemm.quantizers import nncf, onnxruntime
from edgemm.recipe import Recipe
from edgemm.stages import quantize as stage
from edgemm.target import Target


class Session:
    """Two encoders; a sample without text reaches the image's alone. What it makes of a text is its number."""

    decoder = None
    observe: Any = None

    def __init__(self) -> None:
        takes = {"vision": "pixels", "words": "ids"}
        self.components = {n: SimpleNamespace(spec={"inputs": [{"name": port}]}) for n, port in takes.items()}
        self.sources = {"image": {"pixels"}, "text": {"ids"}}

    def tensors(self, query: Any) -> dict[str, np.ndarray]:
        return {"pixels": np.ones(1)} if query.text is None else {"ids": np.array([float(query.text)])}

    def infer(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = "vision" if "pixels" in tensors else "words"
        self.observe(name, tensors)
        return tensors | {f"{name}_out": next(iter(tensors.values())) * 2}


def record(monkeypatch: pytest.MonkeyPatch, texts: list[str | None], asked: int = 2) -> dict[str, list[Any]]:
    samples = [
        Sample(id=str(i), group=str(i), image=None if t else b"x", text=t, label=None) for i, t in enumerate(texts)
    ]
    monkeypatch.setattr(recording, "open_directory", lambda path: Session())
    monkeypatch.setattr(recording, "split", lambda recipe, program: (samples, []))
    graph: Any = SimpleNamespace(path=None, json=lambda name: {})
    return recording.record(graph, Recipe(name="x", calibration=asked), {"vision", "words"})


def test_what_each_component_meets_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = record(monkeypatch, ["3", None])
    assert {name: len(rows) for name, rows in found.items()} == {"vision": 1, "words": 1}


def test_a_graph_for_fewer_modalities_than_any_sample_has_meets_a_part_of_one() -> None:
    sources = {"image": {"pixels"}, "text": {"ids", "mask"}, "audio": {"wave"}}
    found = recording.parts({"pixels": np.ones(1), "ids": np.ones(2), "mask": np.ones(2)}, sources)
    assert [set(part) for part in found] == [{"pixels"}, {"ids", "mask"}]
    assert len(recording.parts(dict.fromkeys(("pixels", "ids", "mask", "wave"), np.ones(1)), sources)) == 6
    assert recording.parts({"wave": np.ones(1)}, sources) == []


def test_no_calibration_row_for_a_modality(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"none of 2 calibration samples reaches words: it needs ids\n  fix: give rows"
    ):
        record(monkeypatch, [None, None])


def test_a_sample_of_which_the_model_makes_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="calibration sample 1: the FP32 model makes NaN of it, first in ids"):
        record(monkeypatch, ["3", "nan", None])


def test_fewer_samples_than_asked_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record(monkeypatch, ["3", None], asked=300)
    assert "2 samples, of 300 that the recipe asks for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "target", "reason"),
    [
        (nncf.Options(weight_only=True, bits=4), {"backend": "tensorrt"}, "bits = 4: the graphs for TensorRT"),
        (onnxruntime.Options(dynamic=True), {"backend": "openvino"}, "dynamic = true on box: one range"),
        (onnxruntime.Options(dynamic=True), {"backend": "onnxruntime", "static": False}, "depend on their batch"),
    ],
)
def test_what_a_target_cannot_run_is_refused(options: Any, target: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        stage.check_dialect("decoder", options, Target(name="box", **target))


def test_what_it_can_run_is_not() -> None:
    stage.check_dialect("x", onnxruntime.Options(dynamic=True), Target(name="box", backend="onnxruntime"))
    stage.check_dialect("x", nncf.Options(weight_only=True, bits=4), Target(name="box", backend="openvino"))
