"""Models of full size with seeded random weights, for which none are at hand: export, INT8, compilation, latency.

Minutes and gigabytes each, so `make e2e-full` alone runs them. Of accuracy they say nothing and claim nothing; the
clock decides nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgemm import console, plugins
from edgemm.models import Component, find_family, read_model, sizes
from edgemm.models._graph import check, onnx_export
from edgemm.recipe import load_recipe
from tests import checkpoints

TOLERANCE = 1e-4
# The clock decides no test, and tables of embeddings stay FP32.
UNGATED = ("--set", "target.budgets.min_speedup=null", "--set", "target.budgets.max_size_ratio=null")
QUICK = ("--set", "verify.rounds=8")
COMPONENTS = {
    "clip": ["image_encoder", "text_encoder"],
    "vilt": ["image_encoder", "fusion"],
    "blip": ["image_encoder", "fusion", "cross_cache", "decoder"],
}


@pytest.mark.full
@pytest.mark.parametrize("name", COMPONENTS)
def test_a_full_size_checkpoint_goes_all_the_way(
    name: str, edgemm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, out = checkpoints.write(name, tmp_path / name, full=True), tmp_path / "out"
    arguments = ("--data", "random:8", "--target", "x86-openvino", "-o", out, "--json")
    done = edgemm("compress", directory, *arguments, *UNGATED, *QUICK, timeout=3600)
    assert done.returncode == 5, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert json.loads(done.stdout) == report
    (target,) = report["targets"]
    assert (target["verdict"], target["accuracy"], target["bundle"]) == ("INCONCLUSIVE", [], None)
    rows = target["latency"]["components"]
    assert [row["name"] for row in rows] == COMPONENTS[name]
    assert all(row["fp32_p50_ms"] > 0 and row["compressed_p50_ms"] > 0 for row in rows)
    # The export stage holds each graph to torch; here it is held once more.
    (graphs,) = (out / ".runs").glob("graph-*")
    assert json.loads((graphs / "manifest.json").read_text())["config"]["tolerance"] == TOLERANCE
    family = find_family(directory)
    for component in family.components(read_model(family, directory)):
        check(component, graphs / f"{component.name}.onnx", TOLERANCE)
    whole, ratio = target["latency"], target["size"]["compressed_bytes"] / target["size"]["fp32_bytes"]
    total = {"name": "all", "speedup_p50": whole["speedup_p50"], "speedup_ci95": whole["speedup_ci95"]}
    total |= {f"{key}_p50_ms": whole[key]["p50_ms"] for key in ("fp32", "compressed")}
    title = f"{name}, batch 1, {whole['threads']} threads of {report['host']['cpu']}, size {ratio:.2f} of FP32"
    with capsys.disabled():
        columns = ("", "OpenVINO FP32 p50, ms", "INT8 p50, ms", "speed-up", "95 % interval")
        console.table(title, columns, map(cells, (*rows, total)))


@pytest.mark.full
@pytest.mark.parametrize("name", ["clip"])
def test_half_of_a_full_size_model_leaves_its_graph(name: str, tmp_path: Path, capsys: Any) -> None:
    """Half of the heads and neurons: every graph is what the pruned torch model computes, from the disk too."""
    whole = checkpoints.write(name, tmp_path / "whole", full=True)
    family = find_family(whole)
    model = read_model(family, whole)
    before = sizes(family, model)
    for pass_ in load_recipe("half").prune:
        options = plugins.options("pruners", pass_.use, pass_.values, "half")
        plugins.plugin("pruners", pass_.use).prune(family, model, lambda: run(family.components(model)), options)
    family.save(model, tmp_path / "half", whole)
    after = sizes(family, half := read_model(family, tmp_path / "half"))
    for component in family.components(half):
        onnx_export(component, path := tmp_path / f"{component.name}.onnx", 18)
        check(component, path, TOLERANCE)
    with capsys.disabled():
        rows = zip(("parameters", "MACs"), before, after, strict=True)
        table = ((what, f"{old:,}", f"{new:,}", f"{old / new:.2f}x") for what, old, new in rows)
        console.table(f"{name}, half", ("", "before", "after", "ratio"), table)
    assert before[1] / after[1] > 1.75


def run(components: list[Component]) -> None:
    for component in components:
        component.module(**component.example(4))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    figures = [row["fp32_p50_ms"], row["compressed_p50_ms"], row["speedup_p50"]]
    return row["name"], *(f"{v:.2f}" for v in figures), "{:.2f} to {:.2f}".format(*row["speedup_ci95"])
