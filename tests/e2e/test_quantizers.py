"""Each quantizer from the recipe to the verdict, and ONNX Runtime as what the device runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.conftest import Run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantizers")


@pytest.fixture(scope="module")
def onnxruntime_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "ort.yaml"
    path.write_text("schema: 1\nbackend: onnxruntime\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def images_and_questions(
    edgemm: Run, out: Path, tiny_model: Path, tiny_recipe: Path, tiny_target: Path, onnxruntime_target: Path
) -> Path:
    """`out`, where the quantizer of ONNX Runtime went to a verdict on both targets."""
    arguments = ("compress", tiny_model, "--recipe", tiny_recipe, "--set", "quantize.use=onnxruntime", "-o", out)
    done = edgemm(*arguments, "--target", tiny_target, "--target", onnxruntime_target)
    assert done.returncode == 0, done.stderr
    return out


def test_onnxruntime_is_judged_on_both_runtimes(images_and_questions: Path) -> None:
    report = json.loads((images_and_questions / "report.json").read_text())
    assert [(t["name"], t["verdict"]) for t in report["targets"]] == [("box", "PASS"), ("ort", "PASS")]
    baselines = [t["latency"]["baseline"].split(",")[0] for t in report["targets"]]
    assert baselines == ["FP32 graph in openvino", "FP32 graph in onnxruntime"]


def test_a_bundle_for_onnxruntime_answers_and_keeps_its_rules(edgemm: Run, images_and_questions: Path) -> None:
    bundle = images_and_questions / "ort" / "model-ort.edgemm"
    assert edgemm("inspect", bundle, "--strict").returncode == 0
    done = edgemm("verify", bundle)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("neural_compressor") is None, reason="neural-compressor is not installed")
def test_neural_compressor_comes_to_a_verdict(
    edgemm: Run, images_and_questions: Path, tiny_model: Path, tiny_recipe: Path, tiny_target: Path
) -> None:
    arguments = ("compress", tiny_model, "--recipe", tiny_recipe, "--target", tiny_target, "-o", images_and_questions)
    done = edgemm(*arguments, "--set", "quantize.use=neural_compressor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["targets"][0]["verdict"] == "PASS"
    assert "neural_compressor, 16 samples" in done.stderr


def test_a_graph_from_outside_is_refused_by_neural_compressor(
    edgemm: Run, images_and_questions: Path, tmp_path: Path, tiny_target: Path
) -> None:
    (graph,) = images_and_questions.glob(".runs/graph-*/image_encoder.onnx")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schema: 1\ndata: 'random:8'\nquantize: {use: neural_compressor}\n", encoding="utf-8")
    done = edgemm("compress", graph, "--recipe", recipe, "--target", tiny_target, "-o", tmp_path / "out")
    assert done.returncode in (2, 3), done.stderr
    assert "came as ONNX" in done.stderr or "is not installed" in done.stderr
