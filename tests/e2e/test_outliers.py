"""Outliers of activations: minmax INT8 loses the answers, the verdict says so, and the search finds INT8 that does not.

A Vision Transformer on easy-VQA's colours, three channels of each LayerNorm a hundred times the rest.
"""

from __future__ import annotations

import json

import pytest

from tests import colours, outliers
from tests.conftest import Run

RECIPE = """
schema: 1
calibration: 200
quantize: {use: nncf, ranges: minmax, smooth_quant: -1}
verify:
  rounds: 4
  metrics:
    - {use: accuracy, margin: 0.02}
"""
UNTIMED = ("--set", "target.budgets.min_speedup=null", "--set", "target.budgets.max_size_ratio=null")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("outliers")
    plain = colours.checkpoint(root / "plain", 64, **colours.SMALL)
    (root / "minmax.yaml").write_text(RECIPE, encoding="utf-8")
    planted, data = outliers.plant(plain, root / "planted"), colours.manifest(root / "colours.jsonl", 200)
    given = (planted, "--recipe", root / "minmax.yaml", "--data", data, "-o", root / "out")
    return ("compress", *map(str, given), "--json", *UNTIMED)


def test_minmax_fails_and_the_search_passes(edgemm: Run, arguments: tuple[str, ...]) -> None:
    done = edgemm(*arguments)
    assert done.returncode == 4, done.stderr
    (naive,) = json.loads(done.stdout)["targets"]
    assert naive["verdict"] == "FAIL"
    assert naive["bundle"] is None
    assert naive["accuracy"][0]["fp32"] > 0.9

    done = edgemm(*arguments, "--set", "quantize.search.sqnr_db=20")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["targets"]
    (tuned,) = found["tuning"]
    assert found["verdict"] == "PASS"
    assert tuned["int8"]
    assert tuned["smooth_quant"] != -1
    assert found["accuracy"][0]["flips"] < naive["accuracy"][0]["flips"]
