"""The three renderers show what report.json says, and nothing that it doesn't say."""

from __future__ import annotations

import random
import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from edgemm.report import html, junit, markdown
from edgemm.report.schema import Report

HOSTILE = "<script>alert(1)</script> | $x$ & \x00 `y` -->"
RENDERERS = [markdown.render, html.render, junit.render]


def gate(name: str, value: float | None, limit: float, unit: str, verdict: str, detail: str) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "unit": unit, "verdict": verdict, "detail": detail}


def layer(rng: random.Random, name: str, keys: str, keep: int) -> dict[str, Any]:
    scores = [rng.betavariate(1.4, 3.0) for _ in range(12)]
    best = sorted(range(12), key=lambda head: -scores[head])[:keep]
    return {
        "name": name,
        "kind": "cross" if keys == "image" else "self",
        "queries": "text",
        "keys": keys,
        "links_before": 12,
        "links_after": keep,
        "heads_before": 12,
        "heads_after": keep,
        "keys_before": 256 if keys == "image" else 16,
        "keys_after": 32 if keys == "image" else 16,
        "scores": scores,
        "kept": sorted(best),
    }


def target(name: str = "x86-openvino", verdict: str = "PASS", **changes: Any) -> dict[str, Any]:
    """A realistic target; the 240 latencies are around 9 ms (FP32) and 3 ms."""
    rng = random.Random(7)
    layers = [
        *(layer(rng, f"text_encoder.bert.encoder.layer.{i}.attention", "text", 8) for i in range(2)),
        *(layer(rng, f"fusion.layers.{i}.self_attention", "text", 6) for i in range(4)),
        *(layer(rng, f"fusion.layers.{i}.cross_attention", "image", 4 + i) for i in range(4)),
    ]
    fp32 = [9 + rng.gammavariate(2, 0.12) for _ in range(240)]
    compressed = [2.9 + rng.gammavariate(2, 0.05) for _ in range(239)] + [41.0]
    return {
        "name": name,
        "verdict": verdict,
        "accuracy": [
            {
                "metric": "accuracy",
                "unit": "share",
                "n": 9673,
                "clusters": 1000,
                "n_required": 1480,
                "fp32": 0.9984,
                "compressed": 0.9981,
                "drop": 0.0003,
                "drop_ci95_upper": 0.0012,
                "margin": 0.01,
                "flips": 0.0021,
                "sqnr_db": 27.4,
                "verdict": "PASS",
            }
        ],
        "latency": {
            "fp32": {"p50_ms": 9.2134, "p90_ms": 9.4721, "p99_ms": 9.8},
            "compressed": {"p50_ms": 2.9871, "p90_ms": 3.1, "p99_ms": 3.31},
            "speedup_p50": 3.0844,
            "speedup_ci95": [3.05, 3.12],
            "baseline": "FP32 graph in openvino, precision f32, 2 threads",
            "threads": 2,
            "torch_p50_ms": 17.36,
            "samples_ms": {"fp32": fp32, "compressed": compressed},
        },
        "memory": {"fp32_peak_mb": 214.2, "compressed_peak_mb": 121.7},
        "size": {"fp32_bytes": 61_482_240, "compressed_bytes": 11_993_088},
        "pruning": {
            "layers": layers,
            "parameters_before": 15_370_112,
            "parameters_after": 11_821_568,
            "macs_before": 1_143_000_000,
            "macs_after": 874_000_000,
        },
        "gates": [
            gate("accuracy drop", 0.0012, 0.01, "share", "PASS", "upper bound of a one-sided 95 % interval"),
            gate("speed-up p50", 3.0844, 2.0, "x", "PASS", "95 % interval 3.05 to 3.12"),
            gate("size ratio", 0.195, 0.3, "of FP32", "PASS", "12.0 MB of 61.5 MB"),
        ],
        "bundle": {"path": f"runs/{name}/reasoner-{name}.edgemm", "sha256": "3f9a1c" + "0b" * 29},
        "notes": ["Peak memory is of a fresh process that runs only the runtime."],
        **changes,
    }


def report(*targets: dict[str, Any], model: str = "reasoner") -> Report:
    return Report.model_validate(
        {
            "schema": 1,
            "model": model,
            "recipe": "reasoner",
            "seed": 0,
            "versions": {"edgemm": "0.1.0", "python": "3.11.2", "openvino": "2026.4.1", "nncf": "3.4.0"},
            "host": {"cpu": "Intel Xeon @ 2.60 GHz", "cores": "2", "system": "Linux 6.1", "memory": "8 GB"},
            "targets": targets,
        }
    )


def fail() -> dict[str, Any]:
    gates = [
        gate("accuracy drop", 0.0012, 0.01, "share", "PASS", ""),
        gate("speed-up", 1.42, 2.0, "x", "FAIL", "p50 1.45x, 95 % interval 1.42 to 1.48"),
    ]
    return target("slow-box", "FAIL", gates=gates)


def inconclusive() -> dict[str, Any]:
    gates = [
        gate("accuracy drop", 0.0181, 0.01, "share", "INCONCLUSIVE", "60 samples of 1,480 needed"),
        gate("size ratio", 0.195, 0.3, "of FP32", "PASS", ""),
    ]
    return target("few-samples", "INCONCLUSIVE", gates=gates)


def unmeasured() -> dict[str, Any]:
    return target(
        "jetson-tensorrt",
        "UNVERIFIED",
        accuracy=[],
        latency=None,
        memory=None,
        size=None,
        pruning=None,
        bundle=None,
        gates=[gate("speed-up", None, 2.0, "x", "UNVERIFIED", "this host has no GPU")],
        notes=["Finish with `edgemm verify` on the device."],
    )


def everything() -> Report:
    return report(target(), fail(), inconclusive(), unmeasured())


def test_markdown_shows_the_numbers() -> None:
    text = markdown.render(report(target()))
    for line in (
        "## PASS: x86-openvino",
        "| accuracy | 0.9984 | 0.9981 | drop 0.0003, at most 0.0012 (95 %), margin 0.01 |",
        "| latency p50 | 9.21 ms | 2.99 ms | -67.6 % |",
        "| latency p99 | 9.80 ms | 3.31 ms | -66.2 % |",
        "| speed-up at p50 | 1x | 3.08x | 95 % interval 3.05 to 3.12 |",
        "| peak memory | 214.2 MB | 121.7 MB | -43.2 % |",
        "| size on disk | 61.48 MB | 11.99 MB | -80.5 % |",
        "| speed-up p50 | 3.084x | 2x | PASS | 95 % interval 3.05 to 3.12 |",
        "| cross-modal attention | 48 links, 48 heads | 22 links, 22 heads | -54.2 % |",
        "| cross-modal attention, keys | 1024 keys | 128 keys | -87.5 % |",
        "| self-attention | 72 links, 72 heads | 40 links, 40 heads | -44.4 % |",
        "| MACs | 1,143 M | 874 M | -23.5 % |",
        "Bundle: runs/x86-openvino/reasoner-x86-openvino.edgemm (sha256 3f9a1c0b0b0b)",
    ):
        assert line in text.splitlines()


def test_markdown_says_what_failed_and_what_was_not_measured() -> None:
    text = markdown.render(everything())
    assert "FAIL: speed-up; accuracy 0.9984 → 0.9981; speed-up 3.08x (3.05 to 3.12); size -80.5 %" in text
    assert "INCONCLUSIVE: accuracy drop" in text
    assert "| peak memory | not measured | not measured |  |" in text
    assert "| speed-up | not measured | 2x | UNVERIFIED | this host has no GPU |" in text
    assert "Bundle: not made" in text


def test_markdown_tables_keep_their_columns_whatever_the_names() -> None:
    text = markdown.render(report(target(gates=[gate(HOSTILE, 1.0, 2.0, "a|b", "PASS", "two\nlines")]), model=HOSTILE))
    rows = [re.findall(r"(?<!\\)\|", line) for line in text.splitlines() if "lines" in line]
    assert [len(bars) for bars in rows] == [6]
    assert "<script" not in text.replace(r"\<", "")


def test_junit_counts_and_messages() -> None:
    root = ET.fromstring(junit.render(everything()))
    counts = ("tests", "failures", "errors", "skipped")
    assert [[s.get("name"), *(s.get(c) for c in counts)] for s in root.iter("testsuite")] == [
        ["x86-openvino", "3", "0", "0", "0"],
        ["slow-box", "2", "1", "0", "0"],
        ["few-samples", "2", "0", "1", "0"],
        ["jetson-tensorrt", "1", "0", "0", "1"],
    ]
    assert [root.get(c) for c in counts] == ["8", "1", "1", "1"]
    messages = {e.tag: e.get("message") for c in root.iter("testcase") for e in c if e.tag != "system-out"}
    assert messages == {
        "failure": "speed-up: 1.42x, limit 2x; p50 1.45x, 95 % interval 1.42 to 1.48",
        "error": "accuracy drop: 0.0181 share, limit 0.01 share; 60 samples of 1,480 needed",
        "skipped": "speed-up: not measured, limit 2x; this host has no GPU",
    }


def test_junit_is_never_green_for_a_target_that_did_not_pass() -> None:
    root = ET.fromstring(junit.render(report(target(verdict="FAIL", gates=[], notes=["the engine gave NaN"]))))
    assert root.get("failures") == "1"
    assert [e.get("message") for e in root.iter("failure")] == ["the engine gave NaN"]


def test_html_shows_the_numbers() -> None:
    text = html.render(report(target()))
    for shown in ("✓ PASS", "0.9984", "0.9981", "3.08x", "9.21 ms", "-80.5 %", "3f9a1c" + "0b" * 29, "22 links"):
        assert shown in text
    assert text.count('<svg role="img" aria-label="') == 4
    assert "95 % upper bound 0.0012" in text and "margin 0.01" in text
    assert "fusion.layers.3.cross_attention 7 of 12" in text


def test_html_lists_hidden_units() -> None:
    row = target()
    row["pruning"] = {
        **row["pruning"],
        "hidden": [{"name": "fusion.layers.0", "units_before": 768, "units_after": 192}],
    }
    page = html.render(report(row))
    assert "fusion.layers.0</th>" in page and "768 → 192" in page and "25 %" in page


def test_both_reports_say_what_the_search_for_int8_chose() -> None:
    found = {
        "component": "text_encoder",
        "wanted_db": 30,
        "sqnr_db": 31.25,
        "smooth_quant": -1,
        "ranges": "mse",
        "keep_float": ["node_7"],
        "trials": [{"smooth_quant": -1, "ranges": "mse", "sqnr_db": 28}],
        "sensitivity": [{"name": "node_7", "gain_db": 3.5}, {"name": "node_9", "gain_db": 0.1}],
    }
    made = report(target(tuning=[found]))
    assert "| text_encoder | 31.2 | 30.0 | off | mse | node_7 |" in markdown.render(made).replace("\\", "")
    page = html.render(made)
    assert "Most sensitive to INT8: text_encoder node_7 3.50 dB, text_encoder node_9 0.10 dB" in page
    assert "Sensitivity to INT8" not in html.render(report(target()))


def test_html_stands_alone() -> None:
    text = html.render(everything())
    assert "<script" not in text
    assert all(
        link.startswith(("#", "data:image/png;base64,"))
        for link in re.findall(r'\b(?:src|href)\s*=\s*"?([^">]*)', text)
    )
    assert not re.search(r"url\((?!#)|@import|<link", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {used for used in re.findall(r'(?:url\(#|href="#)([^")]+)', text)} <= set(ids)


def test_html_without_measurements() -> None:
    text = html.render(report(unmeasured()))
    assert "<svg" not in text and "… UNVERIFIED" in text
    assert text.count('<p class="muted">not measured</p>') == 5


def test_html_with_part_of_the_measurements() -> None:
    unscored = [{**x, "scores": None} for x in target()["pruning"]["layers"]]
    part = target(memory=None, pruning={**target()["pruning"], "layers": unscored})
    assert html.render(report(part)).count("<svg") == 4


@pytest.mark.filterwarnings("ignore:Glyph 0")
def test_hostile_names_stay_text() -> None:
    hostile = target(HOSTILE, notes=[HOSTILE], bundle={"path": HOSTILE, "sha256": HOSTILE})
    hostile["accuracy"][0].update(metric=HOSTILE, unit=HOSTILE)
    hostile["gates"][0].update(name=HOSTILE, unit=HOSTILE, detail=HOSTILE)
    hostile["pruning"]["layers"][0].update(name=HOSTILE, queries=HOSTILE, keys=HOSTILE)
    made = report(hostile, model=HOSTILE)
    page = html.render(made)
    assert "<script" not in page
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt; | $x$ &amp;" in page
    assert ET.fromstring(junit.render(made)).get("name") == "edgemm " + HOSTILE.replace("\x00", "\ufffd")


@pytest.mark.parametrize("render", RENDERERS)
def test_same_report_same_bytes(render: Any) -> None:
    assert render(everything()) == render(everything())


def test_html_draws_a_bound_that_is_infinite() -> None:
    unsure = target(verdict="INCONCLUSIVE")
    unsure["accuracy"][0].update(drop_ci95_upper=float("inf"), verdict="INCONCLUSIVE")
    assert "95 % upper bound inf" in html.render(report(unsure))
