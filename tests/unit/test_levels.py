"""Levels of proof: what a report may claim of an engine that did not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgemm.artifact import Artifact, build
from edgemm.errors import InconclusiveError
from edgemm.levels import precision_of, unmeasured
from edgemm.report import html, junit, markdown
from edgemm.report.schema import Gate, Report, TargetReport
from edgemm.target import Target, load_target
from edgemm.verdict import raise_verdict

COUNTS = {
    "gemms": 6,
    "quantized_gemms": 6,
    "int8_gemms": 6,
    "attention": 1,
    "fused_attention": "unknown",
    "float32_nodes": 2,
    "layers": 9,
}
PASS = Gate(name="accuracy drop", value=0.001, limit=0.01, unit="", verdict="PASS", detail="")
ROW: Any = {
    "metric": "accuracy",
    "unit": "",
    "n": 900,
    "clusters": 900,
    "n_required": 900,
    "fp32": 1.0,
    "compressed": 1.0,
    "drop": 0.0,
    "drop_ci95_upper": 0.001,
    "margin": 0.01,
    "flips": 0.0,
    "sqnr_db": 30.0,
    "verdict": "PASS",
}


def engine(runs: Path, **files: str) -> Artifact:
    def make(out: Path) -> None:
        for name, content in files.items():
            (out / name.replace("__", ".")).write_text(content)

    return build("engine", runs, config=files, tools=("tensorrt-rtx-cu13-libs",), make=make)


def reported(target: Target, runs: Path, built: bool, judged: bool = True, **budgets: float) -> TargetReport:
    from edgemm.report.schema import Accuracy

    graphs = {"block__int8__onnx": "int8", "block__fp16__onnx": "fp16"}
    engines = {"block__int8__engine": "x" * 25, "block__fp16__engine": "x" * 60}
    facts = '{"block.int8": ' + repr(COUNTS).replace("'", '"') + "}"
    made = engine(runs, **graphs, layers__json=facts, **(engines if built else {}))
    baseline = engine(runs, **({"block__engine": "x" * 100} if built else {"block__onnx": "x" * 100}))
    budgeted = target.model_copy(update={"budgets": target.budgets.model_copy(update=budgets)})
    accuracy = (Accuracy(**ROW),) if judged else ()
    unjudged = PASS.model_copy(update={"verdict": "INCONCLUSIVE", "value": None})
    return unmeasured(made, baseline, budgeted, accuracy, [PASS if judged else unjudged], None, ["a note"])


def test_an_engine_built_ahead_of_time_is_level_2_and_unverified(tmp_path: Path) -> None:
    row = reported(load_target("rtx"), tmp_path, built=True)
    assert (row.verdict, row.level, row.latency, row.memory) == ("UNVERIFIED", "L2", None, None)
    assert row.size
    assert (row.size.fp32_bytes, row.size.compressed_bytes) == (100, 25)
    assert "L1: accuracy is that of the INT8 graph simulated in ONNX Runtime on the CPU" in row.established
    assert "L2: engines were built ahead of time by tensorrt_rtx" in row.established
    assert row.established.endswith(
        "Not established, for want of the device (L3): latency, memory, and that the engine's answers are the "
        "simulation's."
    )
    raise_verdict([row])  # the target asks for L2: exit 0


def test_a_graph_for_a_jetson_is_level_1_and_claims_no_engine(tmp_path: Path) -> None:
    row = reported(load_target("jetson-orin-nano"), tmp_path, built=False)
    assert (row.verdict, row.level, row.size) == ("UNVERIFIED", "L1", None)
    assert "L2" not in row.established
    assert "whether the engine builds on the device, latency" in row.established
    raise_verdict([row])


def test_without_data_that_means_something_only_the_lint_is_established(tmp_path: Path) -> None:
    row = reported(load_target("jetson-orin-nano"), tmp_path, built=False, judged=False)
    assert (row.verdict, row.level) == ("INCONCLUSIVE", "L0")
    assert "L1" not in row.established
    with pytest.raises(InconclusiveError):
        raise_verdict([row])


@pytest.mark.parametrize(("name", "built", "asked"), [("rtx", True, "L3"), ("jetson-thor", False, "L2")])
def test_less_than_was_asked_for_is_exit_5_with_the_sentence(
    name: str, built: bool, asked: str, tmp_path: Path
) -> None:
    row = reported(load_target(name, {"level": asked}), tmp_path, built=built)
    assert row.verdict == "UNVERIFIED"
    with pytest.raises(InconclusiveError, match=rf"is reached, and {asked} is asked. L0: .*\n  fix: ") as caught:
        raise_verdict([row])
    assert caught.value.exit_code == 5


def test_budgets_that_need_the_device_are_unverified_and_the_size_is_judged(tmp_path: Path) -> None:
    row = reported(load_target("rtx"), tmp_path, built=True, min_speedup=2.0, max_p50_ms=5, max_size_ratio=0.2)
    verdicts = {g.name: (g.verdict, g.value) for g in row.gates}
    assert verdicts["speed-up p50"] == ("UNVERIFIED", None)
    assert verdicts["latency p50"] == ("UNVERIFIED", None)
    assert verdicts["size ratio"] == ("FAIL", 0.25)
    assert row.verdict == "FAIL"


def test_every_report_says_the_level_and_the_counts(tmp_path: Path) -> None:
    row = reported(load_target("rtx"), tmp_path, built=True)
    report = Report(model="m", recipe="r", seed=0, versions={}, host={}, targets=(row,))
    text = markdown.render(report)
    assert "### Level L2" in text
    assert "| block, int8 | 6 of 6 | unknown of 1 | 2 | 9 |" in text
    page = html.render(report)
    assert "Level L2" in page
    assert "6 of 6" in page
    assert "L2: engines were built" in junit.render(report)
    assert Report.model_validate_json(report.model_dump_json(by_alias=True)) == report


def test_without_a_quantizer_the_fp16_graph_is_what_is_judged(tmp_path: Path) -> None:
    made = engine(tmp_path, block__fp16__onnx="fp16")
    assert precision_of(made, load_target("rtx")) == "fp16"
