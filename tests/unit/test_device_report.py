"""The bundle that goes to a device, and the verdict on the report that comes back."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgemm.artifact import Artifact, build
from edgemm.cli import build_app
from edgemm.device import device_runner
from edgemm.device.files import calibration_ranges, device_files, fits, reference_cases
from edgemm.device_report import verify_device
from edgemm.errors import InputError, ToolchainError
from edgemm.recheck import verify_bundle
from edgemm.report import html, markdown
from edgemm.report.schema import Accuracy, Report, TargetReport
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.session import open_directory
from edgemm.stages.package import package
from edgemm.target import Budgets
from tests import devices

ACCURACY = Accuracy(
    metric="accuracy", unit="share", n=5000, clusters=1000, n_required=1500, fp32=0.99, compressed=0.989, drop=0.001,
    drop_ci95_upper=0.004, margin=0.01, flips=0.003, sqnr_db=30.0, verdict="PASS",
)  # fmt: skip
CERTIFICATE = {"accuracy": [ACCURACY.model_dump(mode="json")]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return devices.bundle(tmp_path_factory.mktemp("device"), **CERTIFICATE)


def candidate(output: str, ms: float, **changes: Any) -> dict[str, Any]:
    samples = [round(ms * (1 + 0.01 * (i % 7)), 4) for i in range(4 * 2 * device_runner.BLOCK)]
    return {
        "engine": {"file": "0.engine", "sha256": "0" * 64, "size_bytes": 1000},
        "cached": False, "build_s": 1.0, "activation_bytes": 4096, "error": None, "sqnr_db": {output: 50.0},
        "passed": True, "latency": {"p50_ms": ms, "p90_ms": ms, "p99_ms": ms}, "samples_ms": samples, **changes,
    }  # fmt: skip


@pytest.fixture
def report(bundle: Path) -> dict[str, Any]:
    """What a device says of `bundle`: INT8 is twice as fast."""
    rows = [
        {
            "name": name,
            "shipped": "int8",
            "reason": "faster",
            "int8_speedup": {"p50": 2.0, "ci95": [1.9, 2.1]},
            "candidates": {"fp16": candidate(y, 2.0), "int8": candidate(y, 1.0)},
        }
        for name, (_, y, *_) in devices.WIDTHS.items()
    ]
    return {
        "schema": 1,
        "bundle": {"path": "tiny.edgemm", "sha256": read_bundle(bundle).sha256},
        "model": "tiny",
        "target": "jetson-test",
        "runner_sha256": "0" * 64,
        "hardware": {
            "gpu": "Orin", "compute_capability": "8.7", "multiprocessors": 8, "memory_bytes": 8 << 30, "driver": 12060,
            "release": None, "tensorrt": "10.3.0", "integrated": True, "board": "NVIDIA Jetson Orin Nano",
        },
        "versions": {"python": "3.10.12"},
        "power": {"nvpmodel": "NV Power Mode: 15W\n0", "clocks_before": None, "clocks_after": None},
        "components": rows,
        "whole": {"p50_ms": 9.0, "p90_ms": 9.0, "p99_ms": 9.0, "samples_ms": [2.0] * 50 + [4.0] * 49},
        "memory": {"host_peak_mb": 90.0, "device_mb": 20.0, "peak_mb": 100.0},
        "gates": [],
        "notes": ["from the device"],
    }  # fmt: skip


def judged(bundle: Path, report: dict[str, Any], folder: Path) -> TargetReport:
    (folder / "r.json").write_text(json.dumps(report))
    return verify_device(bundle, folder / "r.json")


def test_a_good_report_turns_unverified_into_pass(bundle: Path, report: dict[str, Any], tmp_path: Path) -> None:
    row = judged(bundle, report, tmp_path)
    assert (row.verdict, row.name, row.accuracy) == ("PASS", "jetson-test", (ACCURACY,))
    assert {g.name: g.verdict for g in row.gates} == {
        "encoder int8 h": "PASS",
        "head int8 logits": "PASS",
        "accuracy drop": "PASS",
        "latency p50": "PASS",
        "peak memory": "PASS",
    }
    assert row.latency and row.memory and row.size
    assert row.latency.compressed.p50_ms == 2.0, "of the samples, not what the report says of them"
    assert [(c.name, c.compressed_p50_ms) for c in row.latency.components] == [("encoder", 1.03), ("head", 1.03)]
    assert (row.latency.fp32, row.latency.speedup_p50, row.memory.fp32_peak_mb) == (None, None, None)
    assert (row.memory.compressed_peak_mb, row.size.compressed_bytes) == (100.0, 2000)
    assert "from the device" in row.notes
    assert (row.level, row.level_asked) == ("L3", "L3")
    assert "NVIDIA Jetson Orin Nano" in row.established and "power mode NV Power Mode: 15W, 0" in row.established


def test_a_report_without_fp32_can_be_shown(bundle: Path, report: dict[str, Any], tmp_path: Path) -> None:
    row = judged(bundle, report, tmp_path)
    whole = Report(model="tiny", recipe="tiny", seed=0, versions={}, host={}, targets=(row,))
    text = markdown.render(whole)
    assert "| latency p50 | not measured | 2.00 ms |" in text
    assert "| speed-up at p50 | not measured | not measured |" in text
    assert "| peak memory | not measured | 100.0 MB |" in text
    assert "FP32 was not run on the device" in text
    assert "2.00 ms" in html.render(whole)


@pytest.mark.parametrize(
    ("budgets", "gate"),
    [
        ({"max_p50_ms": 1.9}, "latency p50"),
        ({"max_peak_mb": 99}, "peak memory"),
        ({"max_size_ratio": 0.1}, "size ratio"),
    ],
)
def test_the_targets_budgets_decide(
    report: dict[str, Any], tmp_path: Path, budgets: dict[str, float], gate: str
) -> None:
    target = devices.TARGET.model_copy(update={"budgets": Budgets(**budgets)})
    strict = devices.bundle(tmp_path, target=target, **CERTIFICATE)
    report["bundle"]["sha256"] = read_bundle(strict).sha256
    row = judged(strict, report, tmp_path)
    assert row.verdict == "FAIL"
    assert [g.name for g in row.gates if g.verdict == "FAIL"] == [gate]


@pytest.mark.parametrize("missing", ["whole", "memory"])
def test_a_budget_that_was_not_measured_is_inconclusive(
    bundle: Path, report: dict[str, Any], tmp_path: Path, missing: str
) -> None:
    row = judged(bundle, {**report, missing: None}, tmp_path)
    assert row.verdict == "INCONCLUSIVE"
    assert [g.detail for g in row.gates if g.verdict == "INCONCLUSIVE"] == ["not measured"]


def test_a_speed_up_over_fp32_cannot_be_had_on_a_device(report: dict[str, Any], tmp_path: Path) -> None:
    target = devices.TARGET.model_copy(update={"budgets": Budgets(min_speedup=2)})
    strict = devices.bundle(tmp_path, target=target, **CERTIFICATE)
    report["bundle"]["sha256"] = read_bundle(strict).sha256
    row = judged(strict, report, tmp_path)
    (gate,) = [g for g in row.gates if g.name == "speed-up p50"]
    assert (row.verdict, gate.verdict, gate.value) == ("INCONCLUSIVE", "INCONCLUSIVE", None)


def test_no_engine_fails(bundle: Path, report: dict[str, Any], tmp_path: Path) -> None:
    row = report["components"][1]
    row["shipped"], row["int8_speedup"] = None, None
    for c in row["candidates"].values():
        c |= {
            "engine": None,
            "error": "out of memory",
            "sqnr_db": {},
            "passed": False,
            "latency": None,
            "samples_ms": [],
        }
    row = judged(bundle, {**report, "whole": None, "memory": None}, tmp_path)
    assert row.verdict == "FAIL"
    (gate,) = [g for g in row.gates if g.verdict == "FAIL"]
    assert (gate.name, gate.detail) == ("head engine", "fp16: out of memory; int8: out of memory")


def ship_fp16(report: dict[str, Any]) -> None:
    report["components"][0]["shipped"] = "fp16"


def slower_int8(report: dict[str, Any]) -> None:
    report["components"][0]["candidates"]["int8"] = candidate("h", 2.5)


def noisy_int8(report: dict[str, Any]) -> None:
    report["components"][0]["candidates"]["int8"]["sqnr_db"] = {"h": 20.0}


def nan_int8(report: dict[str, Any]) -> None:
    report["components"][0]["candidates"]["int8"]["sqnr_db"] = {"h": None}


def unmeasured_output(report: dict[str, Any]) -> None:
    report["components"][0]["candidates"]["int8"]["sqnr_db"] = {}


def another_bundle(report: dict[str, Any]) -> None:
    report["bundle"]["sha256"] = "f" * 64


def fewer_components(report: dict[str, Any]) -> None:
    del report["components"][0]


def fewer_candidates(report: dict[str, Any]) -> None:
    del report["components"][0]["candidates"]["fp16"]


def half_a_round(report: dict[str, Any]) -> None:
    del report["components"][0]["candidates"]["int8"]["samples_ms"][3:]


def another_gpu(report: dict[str, Any]) -> None:
    report["hardware"]["compute_capability"] = "8.9"


def no_capability(report: dict[str, Any]) -> None:
    report["hardware"]["compute_capability"] = "Orin"


def unknown_key(report: dict[str, Any]) -> None:
    report["verdict"] = "PASS"


def negative_time(report: dict[str, Any]) -> None:
    report["whole"]["samples_ms"][0] = -1


def nan_memory(report: dict[str, Any]) -> None:
    report["memory"]["peak_mb"] = float("nan")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (nan_memory, "memory.peak_mb = nan"),
        (ship_fp16, "encoder ships fp16, but INT8 has"),
        (slower_int8, "encoder ships int8, but INT8 is not faster"),
        (noisy_int8, "encoder ships int8, but the only candidate that passes is fp16"),
        (nan_int8, "encoder ships int8, but the only candidate that passes is fp16"),
        (unmeasured_output, "encoder ships int8, but the only candidate that passes is fp16"),
        (another_bundle, "is of a bundle with SHA-256 ffffffffffff"),
        (fewer_components, "has not the components encoder, head"),
        (fewer_candidates, "encoder has not the candidates of the bundle"),
        (half_a_round, "3 latencies are no whole rounds"),
        (another_gpu, "is of compute capability 8.9, and the bundle is for sm 87"),
        (no_capability, "hardware.compute_capability = 'Orin'"),
        (unknown_key, "unknown key 'verdict'"),
        (negative_time, "whole.samples_ms.0 = -1"),
    ],
)
def test_a_report_that_does_not_hold_together_is_refused(
    bundle: Path, report: dict[str, Any], tmp_path: Path, change: Any, why: str
) -> None:
    change(report)
    with pytest.raises(InputError, match=re.escape(why)):
        judged(bundle, report, tmp_path)


def test_the_command_ends_with_the_verdicts_exit_code(bundle: Path, report: dict[str, Any], tmp_path: Path) -> None:
    def verify(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(build_app(), ["verify", str(bundle), *map(str, arguments)])
        return result.exit_code, result.output

    file = tmp_path / "r.json"
    file.write_text(json.dumps(report))
    code, shown = verify("--device-report", file, "--json")
    assert code == 0 and '"verdict": "PASS"' in shown
    slow = copy.deepcopy(report)
    slow["whole"]["samples_ms"] = [5000.0] * 50
    file.write_text(json.dumps(slow))
    assert verify("--device-report", file)[0] == 4
    file.write_text(json.dumps({**report, "whole": None}))
    code, shown = verify("--device-report", file)
    assert code == 5 and "not measured" in shown
    file.write_text("{")
    assert verify("--device-report", file)[0] == 2
    assert verify("--device-report", tmp_path / "none.json")[0] == 2
    assert verify("--device-report", file, "--data", "easy_vqa")[0] == 2
    assert verify()[0] == ToolchainError.exit_code
    with pytest.raises(ToolchainError, match="built and checked on the device"):
        verify_bundle(bundle)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """What the package stage makes for a device, of artifacts as the stages before it hand them over."""
    runs = tmp_path_factory.mktemp("packed")
    engine, graph = devices.artifacts(runs, devices.program())
    row = TargetReport(
        name="jetson-test", verdict="UNVERIFIED", accuracy=(ACCURACY,), latency=None, memory=None, size=None,
        pruning=None, gates=(), bundle=None,
    )  # fmt: skip

    def made(**files: str) -> Any:
        return lambda out: [(out / n.replace("_", ".")).write_text(text) for n, text in files.items()]

    verified = build("verified", runs, config={}, make=made(target_json=row.model_dump_json()))
    source = build("source", runs, config={"data": "2" * 64}, make=made(reference_npz=""))
    return package(verified, engine, graph, graph, source, devices.RECIPE, devices.TARGET, runs)


def test_the_bundle_carries_all_that_a_device_needs(packed: Artifact) -> None:
    content = read_bundle(packed.path / "model.edgemm")
    assert set(content.files) == {
        *(f"{name}.{precision}.onnx" for name in devices.WIDTHS for precision in ("fp16", "int8")),
        *(
            "check.npz",
            "bom.cdx.json",
            "golden/expected.npz",
            "golden/inputs.json",
            *(f"golden/{i}.x.npy" for i in range(4)),
        ),
        "device/reference.npz",
        "device/spec.json",
        "device/trtexec.sh",
        "device_runner.py",
    }
    runner = Path(device_runner.__file__).read_bytes()
    assert content.files["device_runner.py"] == (packed.path / "device_runner.py").read_bytes() == runner
    assert content.files["device/trtexec.sh"] == (packed.path / "trtexec.sh").read_bytes()
    assert content.manifest["certificate"]["accuracy"] == [ACCURACY.model_dump(mode="json")]
    spec = json.loads(content.files["device/spec.json"])
    head = spec["components"]["head"]
    assert head["profiles"] == {"h": {"min": [1, 32], "opt": [1, 32], "max": [4, 32]}}
    assert head["ranges"] == {"h": pytest.approx([-128 * 4 / 127, 4])}
    for precision, most in (("fp16", 40.0), ("int8", 34.0)):
        row = head["candidates"][precision]
        assert row["onnx"] == f"head.{precision}.onnx"
        assert row["min_sqnr_db"]["logits"] == pytest.approx(min(40.0, row["simulated_sqnr_db"]["logits"] - 6))
        assert row["min_sqnr_db"]["logits"] == pytest.approx(most, abs=1)
    assert spec["gates"] == {"max_p50_ms": 1000, "max_peak_mb": 100_000}
    assert (spec["rounds"], spec["decoder"]) == (4, None)


def test_references_are_what_the_fp32_graph_met_and_made(packed: Artifact, tmp_path: Path) -> None:
    cases = device_runner.Bundle(packed.path / "model.edgemm").cases("head")
    _, graph = devices.artifacts(tmp_path, devices.program())
    session = open_directory(graph.path)
    assert len(cases) == 8
    for inputs, outputs in cases:
        assert inputs["h"].shape == (1, 32) and inputs["h"].dtype == np.float32
        np.testing.assert_allclose(session.components["head"](inputs)["logits"], outputs["logits"], rtol=1e-6)


def test_the_same_bundle_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert devices.bundle(tmp_path / "a").read_bytes() == devices.bundle(tmp_path / "b").read_bytes()


def test_trtexec_lines_do_the_same_build(packed: Artifact) -> None:
    lines = [shlex.split(x) for x in (packed.path / "trtexec.sh").read_text().splitlines() if x.startswith("trtexec")]
    assert len(lines) == 4
    assert lines[3] == [
        "trtexec",
        "--onnx=head.int8.onnx",
        "--stronglyTyped",
        "--minShapes=h:1x32",
        "--optShapes=h:1x32",
        "--maxShapes=h:4x32",
        "--timingCacheFile=edgemm.timing",
        "--saveEngine=head.int8.engine",
    ]


def test_the_trtexec_script_runs(packed: Artifact, tmp_path: Path) -> None:
    """With a trtexec that only says which graph it was given, if that is there."""
    tool = tmp_path / "bin" / "trtexec"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ -s "${1#--onnx=}" ] && echo "${1#--onnx=}"\n')
    tool.chmod(0o755)
    done = subprocess.run(
        ["sh", str(packed.path / "trtexec.sh"), str(packed.path / "model.edgemm")],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["encoder.fp16.onnx", "encoder.int8.onnx", "head.fp16.onnx", "head.int8.onnx"]


def test_references_outside_the_profile_are_left_out(tmp_path: Path) -> None:
    profile = {"x": {"min": [1, 16], "opt": [1, 16], "max": [4, 16]}}
    assert fits({"x": np.zeros((4, 16))}, profile)
    assert not fits({"x": np.zeros((5, 16))}, profile)
    made = devices.program()
    made["profiles"]["head"]["h"] = {"min": [2, 32], "opt": [2, 32], "max": [4, 32]}
    engine, graph = devices.artifacts(tmp_path, made)
    samples = devices.noise.samples(made, 3, 0)
    with pytest.raises(InputError, match="no input that head meets in 8 verification samples fits its profile"):
        device_files(engine, graph, samples, devices.RECIPE, devices.TARGET)
    cases = reference_cases(open_directory(graph.path), {}, samples)
    assert [len(rows) for rows in cases.values()] == [3, 3], "without a profile every shape fits"


def test_ranges_are_read_off_activations_alone(tmp_path: Path) -> None:
    import onnx

    onnx.save(devices.graph("head", "int8"), tmp_path / "head.int8.onnx")
    assert list(calibration_ranges(tmp_path / "head.int8.onnx")) == ["h"]
