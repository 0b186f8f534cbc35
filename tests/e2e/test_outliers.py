"""INT8 by minmax alone breaks a model with planted outliers, and the verdict says so; the search keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import edgemm as package
from edgemm.models import reasoner
from tests.outliers import answers, plant

NAIVE = "quantize: {use: nncf, smooth_quant: -1, ranges: minmax}\n"
SEARCH = "quantize: {use: nncf, search: {sqnr_db: 30, smooth_quant: [-1, 0.5], precisions: [f32, bf16]}}\n"
WEIGHTS = Path(package.__file__).parent / "reasoner" / "weights"
UNGATED = ("--set", "target.budgets.min_speedup=null")


def compress(edgemm: Any, model: Path, where: Path, name: str, recipe: str, *more: str) -> tuple[int, dict[str, Any]]:
    (where / f"{name}.yaml").write_text(f"schema: 1\ndata: easy_vqa\n{recipe}", encoding="utf-8")
    arguments = ("--recipe", where / f"{name}.yaml", "--target", "x86-openvino", "-o", where / "out", *UNGATED, *more)
    done = edgemm("compress", model, *arguments)
    assert done.returncode in (0, 4), done.stderr
    (target,) = json.loads((where / "out" / "report.json").read_text())["targets"]
    return done.returncode, target


def test_fp32_is_unchanged(tiny_model: Path, tmp_path: Path) -> None:
    planted = reasoner.load(plant(tiny_model, tmp_path / "planted"))
    torch.testing.assert_close(answers(planted), answers(reasoner.load(tiny_model)), rtol=1e-4, atol=1e-5)


def test_minmax_fails_and_the_search_passes(edgemm: Any, tiny_model: Path, tmp_path: Path) -> None:
    model = plant(tiny_model, tmp_path / "planted")
    small = (
        "calibration: 24\nverify: {limit: 200, rounds: 4, resamples: 1000, metrics: [{use: agreement, margin: 0.15}]}\n"
    )
    size = ("--set", "target.budgets.max_size_ratio=null")
    code, target = compress(edgemm, model, tmp_path, "naive", NAIVE + small, *size)
    assert (code, target["verdict"], target["bundle"]) == (4, "FAIL", None)
    code, target = compress(edgemm, model, tmp_path, "search", SEARCH + small, *size)
    assert (code, target["verdict"]) == (0, "PASS")
    for found in target["tuning"]:
        assert found["sqnr_db"] >= 30
        assert sum(t["chosen"] for t in found["trials"]) == 1
        assert any(not t["int8"] for t in found["trials"])
    assert {row["component"] for row in target["saturation"]} <= {"image_encoder", "text_encoder", "fusion"}


@pytest.mark.full
def test_the_reference_model_with_outliers(edgemm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = plant(WEIGHTS, tmp_path / "planted")
    rest = "calibration: 300\nverify: {metrics: [{use: accuracy, margin: 0.01}]}\n"
    code, naive = compress(edgemm, model, tmp_path, "naive", NAIVE + rest)
    assert (code, naive["verdict"]) == (4, "FAIL")
    code, found = compress(edgemm, model, tmp_path, "search", SEARCH + rest, "--budget-minutes", "8")
    assert (code, found["verdict"]) == (0, "PASS")
    with capsys.disabled():
        for name, target in (("minmax", naive), ("search", found)):
            print(name, target["accuracy"], target["latency"]["speedup_p50"])  # noqa: T201
