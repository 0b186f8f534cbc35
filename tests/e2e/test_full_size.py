"""Models of full size with seeded random weights, for which none are at hand: export, INT8, compilation, latency.

Minutes and gigabytes each, so `make e2e-full` alone runs them. Of accuracy they say nothing and claim nothing; the
clock decides nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgemm import console
from edgemm.models import find_family, read_model
from edgemm.models._graph import check
from tests import checkpoints

TOLERANCE = 1e-4
# The clock decides no test, and tables of embeddings stay FP32.
UNGATED = ("--set", "target.budgets.min_speedup=null", "--set", "target.budgets.max_size_ratio=null")
QUICK = ("--set", "verify.rounds=4")
COMPONENTS = {
    "clip": ["image_encoder", "text_encoder"],
    "vilt": ["image_encoder", "fusion"],
    "blip": ["image_encoder", "fusion", "cross_cache", "decoder"],
}


RUNS = {"INT8": (), "half": ("--recipe", "half", "--set", "quantize=null"), "half and INT8": ("--recipe", "half")}


@pytest.mark.full
@pytest.mark.parametrize("name", COMPONENTS)
def test_a_full_size_checkpoint_goes_all_the_way(
    name: str, edgemm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """INT8 alone, half of the heads and neurons alone, and both, against the FP32 graph of the whole model."""
    directory, out = checkpoints.write(name, tmp_path / name, full=True), tmp_path / "out"
    arguments = ("--data", "random:8", "--target", "x86-openvino", "-o", out, "--json")
    tables = []
    for what, how in RUNS.items():
        done = edgemm("compress", directory, *arguments, *how, *UNGATED, *QUICK, timeout=3600)
        assert done.returncode == 5, done.stderr
        report = json.loads((out / "report.json").read_text())
        assert json.loads(done.stdout) == report
        (target,) = report["targets"]
        assert (target["verdict"], target["accuracy"], target["bundle"]) == ("INCONCLUSIVE", [], None)
        rows = target["latency"]["components"]
        assert [row["name"] for row in rows] == COMPONENTS[name]
        assert all(row["fp32_p50_ms"] > 0 and row["compressed_p50_ms"] > 0 for row in rows)
        assert ("half" in what) == (target["pruning"] is not None)
        if pruning := target["pruning"]:
            assert pruning["macs_before"] / pruning["macs_after"] > 1.75
        tables.append((what, report))
    # The export stage has held each graph to torch; here those of the pruned model are, once more, from the disk.
    (pruned,) = (out / ".runs").glob("pruned-*")
    family = find_family(pruned / "model")
    components = family.components(read_model(family, pruned / "model"))
    before = {p: json.loads((p / "manifest.json").read_text()) for p in (out / ".runs").glob("graph-*")}
    assert {manifest["config"]["tolerance"] for manifest in before.values()} == {TOLERANCE}
    digest = json.loads((pruned / "manifest.json").read_text())["digest"]
    (graphs,) = (path for path, manifest in before.items() if digest in manifest["parents"])
    for component in components:
        check(component, graphs / f"{component.name}.onnx", TOLERANCE)
    with capsys.disabled():
        for what, report in tables:
            show(f"{name}, {what}", report)


@pytest.mark.full
def test_the_scenes_reasoner_at_full_size(edgemm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BERT base, ResNet-50, wav2vec 2.0 base and levels of width 768 in INT8, all modalities given."""
    directory, out = checkpoints.write_scenes(tmp_path / "scenes", checkpoints.FULL_SCENES), tmp_path / "out"
    arguments = ("--data", "random:8", "--target", "x86-openvino", "-o", out, "--json")
    recipe = "--recipe", "scenes_reasoner-int8"
    done = edgemm("compress", directory, *arguments, *recipe, *UNGATED, *QUICK, timeout=3600)
    assert done.returncode == 5, done.stderr
    report = json.loads((out / "report.json").read_text())
    (target,) = report["targets"]
    levels = ["level_1_text_image_audio", "given_image_audio", "level_2", "level_3"]
    names = ["image_encoder", "text_encoder", "audio_encoder", *levels]
    assert [row["name"] for row in target["latency"]["components"]] == names
    with capsys.disabled():
        show("scenes reasoner, INT8", report)


def show(what: str, report: dict[str, Any]) -> None:
    """A row a component, and one of them all."""
    (target,) = report["targets"]
    whole, ratio = target["latency"], target["size"]["compressed_bytes"] / target["size"]["fp32_bytes"]
    total = {"name": "all", "speedup_p50": whole["speedup_p50"], "speedup_ci95": whole["speedup_ci95"]}
    total |= {f"{key}_p50_ms": whole[key]["p50_ms"] for key in ("fp32", "compressed")}
    title = f"{what}, batch 1, {whole['threads']} threads of {report['host']['cpu']}, size {ratio:.2f} of FP32"
    columns = ("", "OpenVINO FP32 p50, ms", "compressed p50, ms", "speed-up", "95 % interval")
    console.table(title, columns, map(cells, (*whole["components"], total)))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    figures = [row["fp32_p50_ms"], row["compressed_p50_ms"], row["speedup_p50"]]
    return row["name"], *(f"{v:.2f}" for v in figures), "{:.2f} to {:.2f}".format(*row["speedup_ci95"])
