"""The main job: what report.json must say, and that the bundle answers without torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import urllib3

from edgemm import load_bundle
from edgemm.data.easy_vqa import samples
from edgemm.errors import EdgemmError
from edgemm.report.schema import Report
from edgemm.runtime.query import Query
from tests.serving import serving


def test_the_report_is_whole(report: dict[str, Any]) -> None:
    Report.model_validate(report)
    (target,) = report["targets"]
    assert target["verdict"] == "PASS"
    for name in ("accuracy", "latency", "memory", "size", "pruning", "gates", "bundle"):
        assert target[name], name
    assert target["latency"]["torch_p50_ms"] > 0
    assert target["accuracy"][0]["n"] == 9673
    assert target["accuracy"][0]["clusters"] == 1000


def test_accuracy_is_kept(report: dict[str, Any]) -> None:
    (accuracy,) = report["targets"][0]["accuracy"]
    assert accuracy["fp32"] >= 0.99
    assert accuracy["drop_ci95_upper"] < 0.01


def test_a_quarter_of_the_cross_modal_heads_is_gone(report: dict[str, Any]) -> None:
    pruning = report["targets"][0]["pruning"]
    cross = [layer for layer in pruning["layers"] if layer["kind"] == "cross"]
    before, after = (sum(layer[f"heads_{when}"] for layer in cross) for when in ("before", "after"))
    assert after <= 0.75 * before
    assert pruning["parameters_after"] < pruning["parameters_before"]
    assert pruning["macs_after"] < pruning["macs_before"]


def test_size_is_under_three_tenths(report: dict[str, Any]) -> None:
    size = report["targets"][0]["size"]
    assert size["compressed_bytes"] <= 0.30 * size["fp32_bytes"]


def test_every_gate_is_a_junit_case(main_job: Path, report: dict[str, Any]) -> None:
    cases = ElementTree.parse(main_job / "out" / "junit.xml").findall(".//testcase")
    assert {c.get("name") for c in cases} >= {g["name"] for g in report["targets"][0]["gates"]}


def test_the_bundle_has_the_sha256_of_the_report(bundle: Path, report: dict[str, Any]) -> None:
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() == report["targets"][0]["bundle"]["sha256"]


def test_the_bundle_answers_where_the_toolchain_cannot_be_imported(device, bundle: Path) -> None:
    questions = [s for s in samples("test") if s.text.startswith("what")][:3]
    for sample in questions:
        done = device("run", bundle, "--image", sample.image, "--text", sample.text, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["answer"] == sample.label


def test_verify_repeats_the_check_without_the_toolchain(device, bundle: Path, report: dict[str, Any]) -> None:
    done = device("verify", bundle, "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["verdict"] == "PASS"
    assert again["accuracy"] == report["targets"][0]["accuracy"]
    assert again["latency"] is None


def test_a_harsh_recipe_fails_with_numbers_and_a_report(edgemm, main_job: Path, tmp_path: Path) -> None:
    shutil.copytree(main_job / "out" / ".runs", tmp_path / "out" / ".runs")
    (tmp_path / "out" / "x86-openvino").mkdir()
    stale = tmp_path / "out" / "x86-openvino" / "reasoner-x86-openvino.edgemm"
    stale.write_bytes(b"of an earlier run")
    recipe = tmp_path / "harsh.yaml"
    recipe.write_text("data: easy_vqa\nprune: [{use: attention_heads, keep: 0.05}]\nverify: {rounds: 4}\n")
    arguments = ("compress", "reasoner", "--target", "x86-openvino", "--recipe", recipe, "-o", tmp_path / "out")
    done = edgemm(*arguments, "--set", "calibration=300")
    assert done.returncode == 4, done.stderr
    assert "FAIL" in done.stdout
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    (target,) = written["targets"]
    assert target["verdict"] == "FAIL"
    assert f"{target['accuracy'][0]['compressed']:.4f}" in done.stdout
    assert target["bundle"] is None
    assert not stale.exists(), "a bundle of another recipe must not be taken for this one"


def test_too_few_samples_are_inconclusive(
    edgemm, tiny_model: Path, tiny_recipe: Path, tiny_target: Path, tmp_path: Path
) -> None:
    few = ("--set", "verify.limit=40", "--set", "verify.metrics=[{use: accuracy, margin: 0.01}]")
    done = edgemm("compress", tiny_model, "--recipe", tiny_recipe, "--target", tiny_target, "-o", tmp_path, *few)
    assert done.returncode == 5, done.stderr
    assert "INCONCLUSIVE" in done.stdout
    (target,) = json.loads((tmp_path / "report.json").read_text())["targets"]
    assert target["bundle"] is None
    assert target["accuracy"][0]["n_required"] > 40


def test_every_command_reads_the_bundle(edgemm, bundle: Path, report: dict[str, Any]) -> None:
    found = json.loads(edgemm("inspect", bundle, "--json").stdout)
    assert [c["name"] for c in found["components"]] == ["image_encoder", "text_encoder", "fusion"]
    assert found["certificate"]["verdict"] == "PASS"
    rows = json.loads(edgemm("evaluate", bundle, "--json").stdout)["accuracy"]
    assert rows["all"]["accuracy"] == pytest.approx(report["targets"][0]["accuracy"][0]["compressed"])
    assert rows["all"]["n"] == 9673


def test_the_public_api_is_the_command_line(bundle: Path) -> None:
    import edgemm

    sample = samples("test")[0]
    assert edgemm.load_bundle(bundle).run(image=sample.image, text=sample.text).answer == sample.label
    with pytest.raises(EdgemmError, match="cannot read"):
        edgemm.load_bundle(bundle.with_name("absent.edgemm"))


def test_the_server_gives_what_run_gives(bundle: Path) -> None:
    """Triton's clients, many at once so that rows share batches; files as well. To 1/200 of the largest logit."""
    session = load_bundle(bundle)
    asked = [s for s in samples("test") if len(s.text) > 25][:24]
    tensors = [session.tensors(Query(s.image, s.text)) for s in asked]
    expected = [session.run(image=s.image, text=s.text) for s in asked]
    kinds = {"float32": "FP32", "int64": "INT64"}
    with serving(bundle, "--cache-mb", "0", "--max-batch-size", "4") as server:

        def infer(i: int) -> Any:
            client_of = triton_http if i % 2 else triton_grpc
            with client_of.InferenceServerClient(server.http if i % 2 else server.grpc) as client:
                inputs = [client_of.InferInput(n, list(v.shape), kinds[v.dtype.name]) for n, v in tensors[i].items()]
                for tensor, value in zip(inputs, tensors[i].values(), strict=True):
                    tensor.set_data_from_numpy(value)
                return client.infer("reasoner", inputs).as_numpy("logits")[0]

        def answer(i: int) -> Any:
            files = {"image": ("image", asked[i].image.read_bytes()), "text": asked[i].text}
            return urllib3.request("POST", f"http://{server.http}/v1/answer", fields=files).json()

        with ThreadPoolExecutor(16) as pool:
            logits, answers = list(pool.map(infer, range(24))), list(pool.map(answer, range(24)))
    for one, got, wanted in zip(logits, answers, expected, strict=True):
        assert np.abs(one - wanted.outputs["logits"]).max() < 5e-3 * np.abs(wanted.outputs["logits"]).max()
        assert got["answer"] == wanted.answer and got["probability"] == pytest.approx(wanted.probability, abs=1e-2)
