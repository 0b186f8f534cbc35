"""Zeros among the weights: where they are, what they buy on which target, and what they do to the bundle's size."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.models import find_family, read_model
from edgemm.pruners import nm_sparsity
from edgemm.recipe import Recipe, check_plugins
from edgemm.report.markdown import pruning_summary
from edgemm.report.schema import Pruning
from edgemm.runtime.bundle import read_bundle, write_bundle
from edgemm.stages.load import load
from edgemm.stages.prune import prune as prune_stage
from edgemm.target import Target
from tests import checkpoints
from tests.adversarial.test_bundle import MANIFEST

pytestmark = pytest.mark.usefixtures("one_thread")


class Mixed(nn.Module):
    """One of each kind; `odd` has five input channels, `tied` is an embedding table too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.transposed, self.odd = nn.Linear(8, 6), Conv1D(6, 8), nn.Linear(5, 3)
        self.image, self.sound = nn.Conv2d(8, 4, 3), nn.Conv1d(4, 4, 3)
        self.table, self.tied = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.tied.weight = self.table.weight
        nn.init.normal_(self.transposed.weight)


def cut(model: nn.Module, **options: Any) -> None:
    assert nm_sparsity.prune(None, model, lambda: None, nm_sparsity.Options(**options)) == {}  # type: ignore[arg-type]


def rows(model: Mixed, name: str) -> Tensor:
    """Input channels last, by hand."""
    weight = getattr(model, name).weight.detach()
    axes = {"linear": (0, 1), "transposed": (1, 0), "image": (0, 2, 3, 1), "sound": (0, 2, 1)}
    return weight.permute(axes[name])


def test_of_each_four_input_channels_the_two_smallest_become_zero(capsys: pytest.CaptureFixture[str]) -> None:
    before, model = Mixed(), Mixed()
    cut(model, pattern="2:4")
    for name in ("linear", "transposed", "image", "sound"):
        pairs = zip(rows(before, name).reshape(-1, 4), rows(model, name).reshape(-1, 4), strict=True)
        for old, new in pairs:
            largest = sorted(range(4), key=lambda i: -abs(old[i]))[:2]
            assert new.tolist() == [v if i in largest else 0 for i, v in enumerate(old.tolist())]
    for name in ("odd", "table"):
        assert torch.equal(getattr(before, name).weight, getattr(model, name).weight)
    logged = capsys.readouterr().err
    assert "no multiple of 4 in odd," in logged and "weights of tied are an embedding table" in logged


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_smallest_becomes_zero(share: float) -> None:
    before, model = Mixed(), Mixed()
    cut(model, sparsity=share)
    for name in ("linear", "transposed", "image", "sound"):
        old, new = rows(before, name).flatten().abs(), rows(model, name).flatten().abs()
        gone = new == 0
        assert int(gone.sum()) == round(share * len(old))
        assert old[gone].max() <= old[~gone].min() and torch.equal(old[~gone], new[~gone])


def test_only_the_layers_asked_for_are_touched_and_unknown_ones_are_named() -> None:
    model = Mixed()
    state = copy.deepcopy(model.state_dict())
    cut(model, sparsity=0.5, layers=("lin*",))
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, state[n])]
    assert changed == ["linear.weight"]
    with pytest.raises(InputError, match=r"'decoder\.\*'"):
        cut(model, sparsity=0.5, layers=("decoder.*",))
    with pytest.raises(InputError, match="no layer has input channels in groups of 4"):
        cut(model, pattern="2:4", layers=("odd",))


@pytest.mark.parametrize("name", ["clip", "resnet", "wav2vec2"])
@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"sparsity": 0.5}], ids=str)
def test_families_keep_their_zeros_on_disk(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole = checkpoints.write(name, tmp_path / "whole")
    family = find_family(whole)
    model = read_model(family, whole)
    cut(model, **options)
    family.save(model, tmp_path / "pruned", whole)
    again = read_model(family, tmp_path / "pruned")
    assert sum(int((p == 0).sum()) for p in again.parameters()) > 0.15 * sum(p.numel() for p in again.parameters())
    with torch.inference_mode():
        assert all(c.module(**c.example(1)) is not None for c in family.components(again))


def test_the_stage_counts_zeros(tiny_model: Path, tmp_path: Path) -> None:
    values = {"data": "easy_vqa", "calibration": 4, "prune": [{"use": "nm_sparsity", "sparsity": 0.5}]}
    recipe = Recipe.model_validate({"name": "x", "model": str(tiny_model), **values, "verify": {"limit": 8}})
    report = Pruning.model_validate(prune_stage(load(recipe, tmp_path), recipe, tmp_path).json("pruning.json"))
    assert 0.4 < report.zero_weights / report.parameters_after < 0.5
    assert report.macs_after == report.macs_before
    (row,) = (r for r in pruning_summary(report) if r.name == "zero weights")
    assert row.change.endswith("% of the parameters")


# What it buys

FP16 = {"backend": "tensorrt", "precision": "f16", "precisions": ("fp16",), "sm": (87,), "compile": "on-device"}


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ({"backend": "openvino"}, {"pattern": "2:4"}, "no time is bought, OpenVINO"),
        ({"backend": "tensorrt_rtx", "sm": (86,)}, {"pattern": "2:4"}, "no time is bought, TensorRT-RTX"),
        ({**FP16, "sparsity": "2:4"}, {"pattern": "2:4"}, "may take sparse FP16 kernels"),
        (FP16, {"pattern": "2:4"}, "no time is bought, TensorRT skips zeros only with"),
        ({**FP16, "sparsity": "2:4"}, {"sparsity": 0.5}, "no time is bought, TensorRT skips zeros only with"),
    ],
)
def test_the_report_says_where_zeros_buy_time(target: dict[str, Any], options: dict[str, Any], said: str) -> None:
    note = nm_sparsity.note(nm_sparsity.Options(**options), Target(name="x", **target))
    assert said in note and "deflated in the bundle" in note


@pytest.mark.parametrize(("share", "most"), [(0.0, 1.001), (0.5, 0.75), (0.9, 0.35)])
def test_int8_weights_that_are_zero_shrink_in_the_bundle(share: float, most: float, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(400_000, generator=rng)
    weights[weights.abs() < weights.abs().quantile(share) if share else weights != weights] = 0
    content = (weights / weights.abs().max() * 127).round().to(torch.int8).numpy()
    if not share:
        content[content == 0] = 1
    path = tmp_path / "m.edgemm"
    path.write_bytes(write_bundle(MANIFEST, {"fusion.bin": content.tobytes()}))
    assert path.stat().st_size < most * content.nbytes + 2000
    assert read_bundle(path).files == {"fusion.bin": content.tobytes()}


# Bad input


@pytest.mark.parametrize(
    "values", [{"sparsity": 0}, {"sparsity": 1}, {"sparsity": math.nan}, {"pattern": "1:4"}, {"sparsity": -0.5}]
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        plugins.options("pruners", "nm_sparsity", values, "recipe: prune.0")


@pytest.mark.parametrize("values", [{}, {"sparsity": 0.5, "pattern": "2:4"}])
def test_one_of_pattern_and_sparsity_is_to_be_given(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give one of pattern"):
        plugins.options("pruners", "nm_sparsity", values, "recipe: prune.0")


def test_passes_that_would_undo_the_zeros_are_refused() -> None:
    zeros, heads = {"use": "nm_sparsity", "pattern": "2:4"}, {"use": "attention_heads", "keep": 0.5}
    with pytest.raises(InputError, match=r"prune\.0: nm_sparsity is not the last pass"):
        check_plugins(Recipe.model_validate({"name": "x", "prune": [zeros, heads]}))
    check_plugins(Recipe.model_validate({"name": "x", "prune": [heads, zeros]}))
