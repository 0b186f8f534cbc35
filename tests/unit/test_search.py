"""`search: latency`: the knapsack against all choices, the latencies of layers, and what is cut in the end."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from edgemm import plugins
from edgemm import search as searching
from edgemm.errors import InputError, VerdictError
from edgemm.graph import timing
from edgemm.graph.timing import layer_graph
from edgemm.models import find_family, read_model, reasoner
from edgemm.models._calibration import Calibration
from edgemm.models._hidden_units import hidden_units
from edgemm.models._key_tokens import left
from edgemm.pruners import widths
from edgemm.recipe import Recipe, load_recipe
from edgemm.runtime.session import Query
from edgemm.search import Choice, knapsack, levels, options, search
from edgemm.stages.load import load
from edgemm.stages.prune import prune
from edgemm.target import Target
from tests import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
BOX = Target(name="box", backend="openvino", threads=1)
rows = st.lists(st.tuples(st.floats(0, 0.2), st.floats(0, 10)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(layers=st.lists(rows, min_size=1, max_size=4), speedup=st.floats(1.05, 4))
def test_the_knapsack_is_the_best_of_all_choices(layers: list[list[tuple[float, float]]], speedup: float) -> None:
    """No choice that saves as much loses less, but for what rounding its savings down costs."""
    choices = {
        str(i): [Choice(9, 0.0, 0.0), *(Choice(w, *c) for w, c in enumerate(row))] for i, row in enumerate(layers)
    }
    asked = 1 - 1 / speedup
    slack = len(layers) * asked / searching.STEPS
    every = [
        (sum(c.saved for c in picks), sum(c.loss for c in picks)) for picks in itertools.product(*choices.values())
    ]
    try:
        keep = knapsack(choices, speedup, "box")
    except VerdictError as e:
        most = max(saved for saved, _ in every)
        assert most < asked + slack
        assert f"{1 / (1 - most):.2f}x" in str(e)
        return
    assert list(keep) == [*reversed(choices)]
    picked = [next(c for c in choices[name] if c.width == width) for name, width in keep.items()]
    assert sum(c.saved for c in picked) >= asked - 1e-9
    best = min((loss for saved, loss in every if saved >= asked + slack), default=math.inf)
    assert sum(c.loss for c in picked) <= best + 1e-9


def test_a_speed_up_that_no_cut_reaches_says_how_far_it_got() -> None:
    with pytest.raises(VerdictError, match=r"speedup = 3: on box the narrowest layers give 2\.00x") as caught:
        knapsack({"a": [Choice(4, 0.0, 0.0), Choice(1, 0.5, 1.0)]}, 3, "box")
    assert caught.value.exit_code == 4 and "ask for less than 2.00" in str(caught.value)


def test_a_width_saves_against_the_whole_layer() -> None:
    found = options([1, 2, 4], [1.0, 1.5, 3.0], [3.5, 1.5, 0.0])
    assert found == [Choice(1, 2.0, 3.5), Choice(2, 1.5, 1.5), Choice(4, 0.0, 0.0)]


@pytest.mark.parametrize(("units", "found"), [(1536, 8), (64, 4), (16, 1), (10, 1), (100, 6)])
def test_levels_are_whole_vectors(units: int, found: int) -> None:
    tried = levels(units, 16)
    assert len(tried) == found and tried[-1] == units
    assert all(w % 16 == 0 for w in tried[:-1])
    assert levels(12, 1) == [2, 3, 4, 6, 8, 9, 10, 12] and levels(1, 1) == [1]


# The graphs that are timed


def weights(model: ov.Model) -> list[torch.Tensor]:
    named = [
        n for n in model.get_ordered_ops() if n.get_type_name() == "Constant" and n.get_element_type() == ov.Type.f32
    ]
    return [torch.from_numpy(np.array(n.data)) for n in named]


@pytest.mark.parametrize("cross", [True, False])
def test_the_attention_graph_is_attention(cross: bool) -> None:
    shape = ("attention", (1, 5, 12), (1, 7, 8) if cross else (1, 5, 12), 4, cross)
    model = layer_graph(shape, 3)
    (q, qb, k, kb, v, vb, o, ob) = (t for t in weights(model) if t.numel() > 1)
    x, y = torch.randn(1, 5, 12), torch.randn(1, 7, 8)
    y = y if cross else x
    parts = [(s @ w + b).unflatten(-1, (3, 4)).transpose(1, 2) for s, w, b in ((x, q, qb), (y, k, kb), (y, v, vb))]
    context = (parts[0] @ parts[1].mT).softmax(-1) @ parts[2]
    wanted = context.transpose(1, 2).flatten(2) @ o + ob
    given_ = [x.numpy(), y.numpy()][: len(model.inputs)]
    got = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(given_)[0]
    assert np.abs(got - wanted.numpy()).max() < 1e-4


def test_the_other_graphs_have_the_shapes_of_their_layers() -> None:
    linear = layer_graph(("linear", (1, 5, 12)), 32)
    assert {tuple(t.shape) for t in weights(linear) if t.ndim == 2} == {(12, 32), (32, 12)}
    shape = ("convolution", (1, 8, 10, 10), (3, 2, 1), (1, 1, 0), 6)
    convolution = layer_graph(shape, 4)
    first, second = (t for t in weights(convolution) if t.ndim == 4)
    x = torch.randn(1, 8, 10, 10)
    wanted = F.conv2d(F.conv2d(x, first, stride=2, padding=1).relu(), second)
    got = ov.Core().compile_model(convolution, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy()])[0]
    assert got.shape == wanted.shape and np.abs(got - wanted.numpy()).max() < 1e-4


def test_wider_layers_are_never_faster_and_layers_of_one_shape_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, int]] = []
    monkeypatch.setattr(timing, "layer_graph", lambda *of: made.append(of) or layer_graph(*of))
    shape, other = ("linear", (1, 5, 12)), ("linear", (1, 50, 12))
    table = timing.measure([(shape, [16, 32]), (other, [16]), (shape, [16, 64])], 1, lambda: None)
    wanted = [(shape, 16), (shape, 32), (shape, 64), (other, 16)]
    assert sorted(made, key=str) == sorted(table, key=str) == sorted(wanted, key=str)
    assert 0 < table[shape, 16] <= table[shape, 32] <= table[shape, 64]


# From the recipe to the shapes


@pytest.fixture(scope="module")
def recipe(tiny_model: Path) -> Recipe:
    values = {"model": str(tiny_model), "data": "easy_vqa", "calibration": 6, "verify": {"limit": 8}}
    return Recipe.model_validate({"name": "x", **values, "search": {"use": "latency", "speedup": 1.05}})


def fixed(monkeypatch: pytest.MonkeyPatch, model: float = 40) -> None:
    """Latencies of which no clock decides: of a `model` that takes so long, a head takes 1 and a unit 0.1."""

    def measured(layers: Any, threads: int, whole: Any) -> dict[Any, float]:
        assert whole()
        return {(s, w): w * (1.0 if s[0] == "attention" else 0.1) / model for s, row in layers for w in row}

    monkeypatch.setattr(searching, "measure", measured)


def test_what_is_promised_leaves_the_shapes(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 ms, of which 20 are heads and 20.8 units (64 in three blocks and 16 channels): a speed-up of 2 asks for 20."""
    fixed(monkeypatch)
    source = load(recipe, tmp_path)
    wanted = recipe.model_copy(update={"search": recipe.search.model_copy(update={"speedup": 2.0})})
    found = search(source, wanted, BOX, tmp_path)
    assert [p.use for p in found.prune] == ["widths"]
    artifact = prune(source, found, tmp_path)
    left = read_model(find_family(artifact.path / "model"), artifact.path / "model")
    before = read_model(reasoner, Path(recipe.model))
    cut = sum(b.heads for b in reasoner.attentions(before)) - sum(b.heads for b in reasoner.attentions(left))
    gone = sum(h.units for h in hidden_units(before)) - sum(h.units for h in hidden_units(left))
    assert 20 <= cut * 1.0 + gone * 0.1 < 22
    kept = found.prune[0].values["keep"]
    shrunk = {b.name: b.heads for b in reasoner.attentions(left)} | {h.name: h.units for h in hidden_units(left)}
    assert kept.items() <= shrunk.items()


def test_a_layer_whose_cut_changes_nothing_costs_nothing(tiny_model: Path, tmp_path: Path) -> None:
    model = read_model(reasoner, tiny_model)
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    with torch.no_grad():
        model.fusion.layers[1].fc2.weight[:, 16:] = 0
    found = searching.losses(
        questions(model, tmp_path), {"fusion.layers.0": [8, 16, 64], "fusion.layers.1": [8, 16, 64]}
    )
    assert found["fusion.layers.1"][1:] == pytest.approx([0, 0], abs=1e-10)
    assert found["fusion.layers.0"][0] > 0 == found["fusion.layers.0"][2]


def test_latencies_are_measured_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch)
    source = load(recipe, tmp_path)
    first = search(source, recipe, BOX, tmp_path)
    monkeypatch.setattr(searching, "measure", lambda *_: pytest.fail("measured again"))
    assert search(source, recipe, BOX, tmp_path) == first
    more = recipe.model_copy(update={"search": recipe.search.model_copy(update={"speedup": 1.01})})
    search(source, more, BOX, tmp_path)
    with pytest.raises(VerdictError, match="speedup = 100"):
        more = recipe.model_copy(update={"search": recipe.search.model_copy(update={"speedup": 100.0})})
        search(source, more, BOX, tmp_path)


def test_image_tokens_leave_where_that_saves_most(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers together are a tenth of the time, and half of the tokens is half of it."""
    fixed(monkeypatch, model=400)
    monkeypatch.setattr(searching, "TOKENS", (2,))
    monkeypatch.setattr(searching, "timed", lambda calls: (1.0, 0.5))
    source = load(recipe, tmp_path)
    asked = recipe.search.model_copy(update={"speedup": 1.9, "key_tokens": True})
    found = search(source, recipe.model_copy(update={"search": asked}), BOX, tmp_path)
    whole = reasoner.token_layers(read_model(reasoner, Path(recipe.model)))[0].tokens
    assert [(p.use, p.values["keep"]) for p in found.prune] == [("key_tokens", whole // 2)]
    artifact = prune(source, found, tmp_path)
    assert left(reasoner.token_layers(read_model(reasoner, artifact.path / "model"))) == whole // 2
    with pytest.raises(VerdictError, match=r"speedup = 3: on box the narrowest layers give 2\.\d\dx"):
        asked = recipe.search.model_copy(update={"speedup": 3.0, "key_tokens": True})
        search(source, recipe.model_copy(update={"search": asked}), BOX, tmp_path)


def test_a_model_without_image_tokens_has_none_to_choose(tmp_path: Path) -> None:
    directory = checkpoints.write("bert", tmp_path / "bert")
    values = {
        "model": str(directory),
        "data": "random:4",
        "search": {"use": "latency", "speedup": 2, "key_tokens": True},
    }
    recipe = Recipe.model_validate({"name": "x", **values})
    with pytest.raises(InputError, match="no image tokens can leave this bert"):
        search(load(recipe, tmp_path), recipe, BOX, tmp_path)


def test_without_search_the_recipe_stays(recipe: Recipe, tmp_path: Path) -> None:
    plain = recipe.model_copy(update={"search": None})
    assert search(load(plain, tmp_path), plain, BOX, tmp_path) is plain


def test_what_is_not_timed_here_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    there = Target(name="nano", backend="tensorrt", sm=(87,), precision="f16", compile="on-device")
    with pytest.raises(InputError, match="target nano is not timed on this host"):
        search(load(recipe, tmp_path), recipe, there, tmp_path)


@pytest.mark.parametrize("value", [1, 0.5, -2, math.nan, "fast", None])
def test_a_speed_up_is_over_1(value: Any) -> None:
    with pytest.raises(InputError, match="speedup"):
        load_recipe("reasoner", {"search": {"use": "latency", "speedup": value}})


# The pass


def questions(model: Any, tmp_path: Path) -> Calibration:
    from PIL import Image

    path = tmp_path / "x.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(path)
    return Calibration(reasoner, model, tmp_path, [Query(image=path, text="is there a red shape?")] * 2)


def test_layers_keep_as_many_as_is_said(tiny_model: Path, tmp_path: Path) -> None:
    model = read_model(reasoner, tiny_model)
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    keep = {"fusion.layers.0.cross_attention": 3, "fusion.layers.1": 5, "fusion.layers.1.self_attention": 4}
    changes = widths.prune(reasoner, model, questions(model, tmp_path), widths.Options(keep=keep))
    assert {n: len(kept) for n, (_, kept) in changes.items()} == keep
    for scores, kept in changes.values():
        assert kept == sorted(sorted(range(len(scores)), key=lambda i, s=scores: -s[i])[: len(kept)])
    left = {b.name: b.heads for b in reasoner.attentions(model)} | {h.name: h.units for h in hidden_units(model)}
    assert keep.items() <= left.items() and left["fusion.layers.0"] == 64


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"fusion.layers.7": 2}, r"no layer 'fusion\.layers\.7'"),
        ({"fusion.layers.1": 0}, r"keep\.fusion\.layers\.1 = 0: it has 64"),
        ({"fusion.layers.1": 65}, r"= 65: it has 64"),
    ],
)
def test_widths_that_cannot_be_are_refused(keep: dict[str, int], said: str, tiny_model: Path) -> None:
    model = read_model(reasoner, tiny_model)
    with pytest.raises(InputError, match=said):
        widths.prune(reasoner, model, lambda: None, widths.Options(keep=keep))
    with pytest.raises(InputError, match="keep"):
        plugins.options("pruners", "widths", {"keep": {}}, "recipe: prune.0")
