"""Head pruning on a tiny reasoner: what leaves, what stays, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.models import AttentionBlock, find_family, read_model, reasoner
from edgemm.pruners.attention_heads import Options, attention, choose, magnitude, prune
from edgemm.reasoner.corpus import build_tokenizer
from edgemm.reasoner.model import Reasoner, ReasonerConfig
from tests.checkpoints import REASONER

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = ["is there a red shape?", "what color is the circle?"]
ANSWERS = ("blue", "circle", "no", "red", "yes")
TOKENIZER = build_tokenizer(QUESTIONS, ANSWERS)
CONFIG = ReasonerConfig(
    answers=ANSWERS,
    vocab_size=TOKENIZER.get_vocab_size(),
    image_size=16,
    **REASONER,
)
BERT = "text_encoder.bert.encoder.layer.0.attention"
NAMES = [BERT] + [f"fusion.layers.{i}.{kind}_attention" for i in range(2) for kind in ("self", "cross")]
Inputs = tuple[Tensor, Tensor, Tensor]


def tiny(seed: int = 0) -> Reasoner:
    """Random weights, biases too, wide enough that every head counts in the logits."""
    return copy.deepcopy(made(seed))


@cache
def made(seed: int) -> Reasoner:
    torch.manual_seed(seed)
    model = Reasoner(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(images: int = 2, questions: int = 2, tokens: int = 7, seed: int = 1) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, CONFIG.vocab_size, (images * questions, tokens), generator=rng)
    return torch.randn(images, 3, 16, 16, generator=rng), ids, torch.ones_like(ids)


@torch.inference_mode()
def logits(model: Reasoner, given: Inputs | None = None) -> Tensor:
    return model(*(given or inputs()))


def blocks(model: Reasoner) -> dict[str, AttentionBlock]:
    return {b.name: b for b in reasoner.attentions(model)}


def cut(model: Reasoner, **options: Any) -> dict[str, tuple[list[float], list[int]]]:
    return prune(reasoner, model, lambda: logits(model), Options(**options))


def shapes(model: Reasoner) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def heads_left(model: Reasoner) -> list[int]:
    return [b.heads for b in reasoner.attentions(model)]


def mask(block: AttentionBlock, heads: list[int]) -> None:
    """Zero the output columns of `heads`."""
    with torch.no_grad():
        for head in heads:
            block.o.weight[:, head * block.head_dim : (head + 1) * block.head_dim] = 0


def test_every_attention_is_found_in_running_order() -> None:
    found = reasoner.attentions(tiny())
    assert [b.name for b in found] == NAMES
    assert [(b.kind, b.queries, b.keys) for b in found] == [
        ("cross", "text", "image") if "cross" in b.name else ("self", "text", "text") for b in found
    ]
    assert {(b.heads, b.head_dim) for b in found} == {(4, 8)}


@pytest.mark.parametrize("score", ["magnitude", "attention"])
def test_keep_1_changes_no_bit(score: str) -> None:
    model = tiny()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    changes = cut(model, keep=1, score=score)
    assert all(heads == [0, 1, 2, 3] for _, heads in changes.values())
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", [0, 3])
def test_a_head_that_carries_nothing_is_the_one_cut_and_is_not_missed(name: str, head: int) -> None:
    model = tiny()
    mask(blocks(model)[name], [head])
    before = logits(model)
    changes = cut(model, keep=19 / 20, score="attention")
    assert {n: heads for n, (_, heads) in changes.items() if len(heads) < 4} == {
        name: [h for h in range(4) if h != head]
    }
    assert changes[name][0][head] == 0
    assert (logits(model) - before).abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 3),
    kept=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=len(NAMES), max_size=len(NAMES)),
)
def test_a_pruned_head_is_a_masked_head(seed: int, kept: list[set[int]]) -> None:
    masked, pruned = tiny(seed), tiny(seed)
    for a, b, heads in zip(reasoner.attentions(masked), reasoner.attentions(pruned), kept, strict=True):
        mask(a, [h for h in range(4) if h not in heads])
        b.keep(list(heads))
    for given_ in (inputs(), inputs(images=3, questions=1, tokens=4)):
        assert torch.allclose(logits(pruned, given_), logits(masked, given_), atol=1e-5, rtol=1e-5)


def test_heads_do_count_in_this_model() -> None:
    for name in NAMES:
        model = tiny()
        before = logits(model)
        blocks(model)[name].keep([0, 2])
        assert (logits(model) - before).abs().max() > 1e-3, name


@pytest.mark.parametrize("score", ["magnitude", "attention"])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.75])
def test_shapes_really_shrink(score: str, keep: float) -> None:
    model = tiny()
    before = blocks(model)
    parameters = sum(p.numel() for p in model.parameters())
    changes = cut(model, keep=keep, score=score)
    assert sum(len(heads) for _, heads in changes.values()) == max(len(NAMES), round(keep * 20))
    for name, block in blocks(model).items():
        scores, heads = changes[name]
        assert (len(scores), block.heads) == (4, len(heads))
        for old, new in zip(*((b.q, b.k, b.v) for b in (before[name], block)), strict=True):
            assert new is old
            assert new.weight.shape == (8 * len(heads), 32)
            assert new.bias.shape == (8 * len(heads),)
            assert (new.in_features, new.out_features) == (32, 8 * len(heads))
        assert block.o.weight.shape == (32, 8 * len(heads))
        assert block.o.bias.shape == (32,)
        assert (block.o.in_features, block.o.out_features) == (8 * len(heads), 32)
        parameters -= (4 - len(heads)) * 8 * (3 * (32 + 1) + 32)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert logits(model).isfinite().all()


def test_every_layer_keeps_a_head_and_it_is_its_best() -> None:
    model = tiny()
    expected = {n: [max(range(4), key=s.__getitem__)] for n, s in magnitude(reasoner.attentions(model)).items()}
    changes = cut(model, keep=0.01)
    assert {name: heads for name, (_, heads) in changes.items()} == expected
    assert heads_left(model) == [1] * len(NAMES)


def test_layers_may_end_up_uneven() -> None:
    model = tiny()
    for head, scale in enumerate((8.0, 0.01, 0.01, 0.01)):
        rows = slice(8 * head, 8 * head + 8)
        with torch.no_grad():
            for linear in (b := blocks(model)[NAMES[2]]).q, b.k, b.v:
                linear.weight[rows] *= scale
            b.o.weight[:, rows] *= scale
    cut(model, keep=0.8)
    assert sorted(heads_left(model)) == [1, 3, 4, 4, 4]
    assert blocks(model)[NAMES[2]].heads == 1
    assert logits(model).isfinite().all()


def test_only_the_layers_asked_for_are_touched() -> None:
    model = tiny()
    state = copy.deepcopy(model.state_dict())
    changes = cut(model, keep=0.5, layers=("*cross_attention", "fusion.layers.1.*"))
    assert list(changes) == [NAMES[2], NAMES[3], NAMES[4]]
    assert sum(len(heads) for _, heads in changes.values()) == 6
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(changes)):
            assert torch.equal(tensor, state[name]), name


def test_a_pattern_that_matches_nothing_is_named_and_nothing_is_cut() -> None:
    model = tiny()
    with pytest.raises(InputError) as caught:
        cut(model, keep=0.5, layers=("*cross_attention", "decoder.*"))
    assert "'decoder.*'" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)
    assert heads_left(model) == [4] * len(NAMES)


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.0001, 2, math.nan, math.inf, "half", None])
def test_keep_outside_0_to_1_is_refused(keep: Any) -> None:
    with pytest.raises(ValidationError):
        Options(keep=keep)
    with pytest.raises(InputError, match="keep"):
        plugins.options("pruners", "attention_heads", {"keep": keep}, "recipe: prune.0")


@pytest.mark.parametrize("keep", [1e-9, 0.5, 1])
def test_keep_in_0_to_1_is_taken(keep: float) -> None:
    assert Options(keep=keep).keep == keep


@pytest.mark.parametrize("values", [{}, {"keep": 0.5, "score": "random"}, {"keep": 0.5, "layer": ["*"]}])
def test_other_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options.model_validate(values)


CROSS: dict[str, Any] = {"layers": ("*cross_attention",), "keep": 0.5}
SELF: dict[str, Any] = {"layers": ("*self_attention", "text_encoder.*"), "keep": 0.4}


@pytest.mark.parametrize("seed", range(3))
def test_passes_on_disjoint_layers_commute(seed: int) -> None:
    one, other = tiny(seed), tiny(seed)
    first = {**cut(one, **CROSS), **cut(one, **SELF)}
    second = {**cut(other, **SELF), **cut(other, **CROSS)}
    assert first == second
    assert shapes(one) == shapes(other)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("seed", range(3))
def test_passes_that_look_at_data_cut_as_much_in_either_order(seed: int) -> None:
    one, other = tiny(seed), tiny(seed)
    for model, order in ((one, (CROSS, SELF)), (other, (SELF, CROSS))):
        for options in order:
            cut(model, score="attention", **options)
    for part in ("cross", "self"):
        left = [sum(b.heads for b in reasoner.attentions(m) if b.kind == part) for m in (one, other)]
        assert left[0] == left[1] == (4 if part == "cross" else round(0.4 * 12))


def test_a_second_pass_on_the_same_layers_cuts_what_the_first_left() -> None:
    model = tiny()
    cut(model, keep=0.75)
    changes = cut(model, keep=0.5, score="attention")
    assert sum(heads_left(model)) == round(0.5 * 15)
    assert sum(len(scores) for scores, _ in changes.values()) == 15
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("score", ["magnitude", "attention"])
def test_same_model_same_cut(score: str) -> None:
    one, other = tiny(), tiny()
    assert cut(one, keep=0.5, score=score) == cut(other, keep=0.5, score=score)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("score, keep", [("magnitude", 0.5), ("attention", 0.6), ("magnitude", 0.01), ("magnitude", 1)])
def test_saved_and_loaded_a_pruned_model_is_the_same(tmp_path: Path, score: str, keep: float) -> None:
    model = tiny()
    cut(model, keep=keep, score=score)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    reasoner.save(model, tmp_path / "model", tmp_path)
    family = find_family(tmp_path / "model")
    loaded = read_model(family, tmp_path / "model")
    assert family is reasoner
    assert shapes(loaded) == shapes(model)
    assert heads_left(loaded) == heads_left(model)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))


def test_saved_in_half_precision_a_pruned_model_loads_in_fp32(tmp_path: Path) -> None:
    model = tiny()
    cut(model, keep=0.5)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    reasoner.save(model, tmp_path / "model", tmp_path, half=True)
    loaded = reasoner.load(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(a.half(), b.half()) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


# Which heads stay


Scores = list[list[float]]
layers_of_scores = st.lists(
    st.lists(st.just(0.0) | st.floats(1e-6, 100), min_size=1, max_size=4), min_size=1, max_size=4
)


def shares(scores: Scores) -> Scores:
    return [[s / (sum(layer) / len(layer) or 1.0) for s in layer] for layer in scores]


@settings(max_examples=200, deadline=None)
@given(scores=layers_of_scores, keep=st.floats(0.001, 1))
def test_choose_is_the_best_of_all_choices(scores: Scores, keep: float) -> None:
    share = shares(scores)
    total = max(len(scores), round(keep * sum(map(len, scores))))
    kept = choose(scores, keep)
    assert [sorted(set(heads)) for heads in kept] == kept
    assert all(heads and set(heads) <= set(range(len(layer))) for heads, layer in zip(kept, scores, strict=True))
    assert sum(map(len, kept)) == total
    value = sum(share[layer][head] for layer, heads in enumerate(kept) for head in heads)
    slots = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
    if math.comb(len(slots), total) <= 2_000:
        best = max(
            sum(share[layer][head] for layer, head in chosen)
            for chosen in itertools.combinations(slots, total)
            if len({layer for layer, _ in chosen}) == len(scores)
        )
        assert value == pytest.approx(best, rel=1e-9, abs=1e-9)


def plain_choose(scores: Scores, keep: float) -> list[list[int]]:
    """Start with everything, and take the smallest share away for as long as its layer has another."""
    share = shares(scores)
    kept = [list(range(len(layer))) for layer in scores]
    for _ in range(sum(map(len, scores)) - max(len(scores), round(keep * sum(map(len, scores))))):
        candidates = [(share[i][h], i, h) for i, heads in enumerate(kept) if len(heads) > 1 for h in heads]
        _, layer, head = min(candidates)
        kept[layer].remove(head)
    return kept


@settings(max_examples=200, deadline=None)
@given(heads=st.lists(st.integers(2, 12), min_size=1, max_size=6), keep=st.floats(0.001, 1), seed=st.integers(0, 2**32))
def test_choose_is_taking_the_smallest_away(heads: list[int], keep: float, seed: int) -> None:
    rng = random.Random(seed)  # no two scores alike
    scores = [[rng.uniform(0, scale) for _ in range(h)] for h in heads for scale in [rng.uniform(0.1, 100)]]
    assert choose(scores, keep) == plain_choose(scores, keep)


@settings(max_examples=50, deadline=None)
@given(scores=layers_of_scores, keep=st.floats(0.001, 1), scale=st.sampled_from([0.25, 4.0, 1024.0]))
def test_the_scale_of_a_layer_does_not_matter(scores: Scores, keep: float, scale: float) -> None:
    assert choose([[s * scale for s in scores[0]], *scores[1:]], keep) == choose(scores, keep)


def test_choose_with_all_scores_zero_still_keeps_as_many() -> None:
    assert [len(heads) for heads in choose([[0.0] * 4, [0.0] * 4], 0.01)] == [1, 1]
    assert sum(len(heads) for heads in choose([[0.0] * 4, [0.0] * 4], 0.5)) == 4


# Scores


def plain_magnitude(block: AttentionBlock) -> list[float]:
    norms = []
    for head in range(block.heads):
        squares = 0.0
        for unit in range(head * block.head_dim, (head + 1) * block.head_dim):
            for linear in (block.q, block.k, block.v):
                squares += sum(w**2 for w in linear.weight[unit].tolist())
            squares += sum(w**2 for w in block.o.weight[:, unit].tolist())
        norms.append(math.sqrt(squares))
    return norms


def test_magnitude_is_the_plain_loop() -> None:
    model = tiny()
    blocks(model)[NAMES[1]].keep([1, 3])
    found = magnitude(reasoner.attentions(model))
    assert list(found) == NAMES
    for name, block in blocks(model).items():
        assert found[name] == pytest.approx(plain_magnitude(block), rel=1e-5)


def plain_attention(block: AttentionBlock, calls: list[tuple[Tensor, Tensor]]) -> list[float]:
    """For each (queries [B,T,D], keys [B,P,D]) that the block saw, one query and one key at a time."""
    d = block.head_dim
    weights = [(linear.weight.double(), linear.bias.double()) for linear in (block.q, block.k, block.v)]
    sums, count = [0.0] * block.heads, 0
    for queries, keys in calls:
        for query_rows, key_rows in zip(queries.double(), keys.double(), strict=True):
            for query in query_rows:
                count += 1
                for head in range(block.heads):
                    rows = slice(head * d, (head + 1) * d)
                    (wq, bq), (wk, bk), (wv, bv) = ((w[rows], b[rows]) for w, b in weights)
                    q = wq @ query + bq
                    scores = [float(q @ (wk @ key + bk)) / math.sqrt(d) for key in key_rows]
                    total = sum(math.exp(s) for s in scores)
                    for score, key in zip(scores, key_rows, strict=True):
                        carried = block.o.weight.double()[:, rows] @ (wv @ key + bv)
                        sums[head] += math.exp(score) / total * float(carried.norm())
    return [s / count for s in sums]


def run_and_record(model: Reasoner, block: AttentionBlock, batches: list[Inputs]) -> Callable[[], Any]:
    def run() -> list[tuple[Tensor, Tensor]]:
        seen: dict[str, list[Tensor]] = {"q": [], "k": []}
        handles = [
            linear.register_forward_pre_hook(lambda _m, args, part=part: seen[part].append(args[0]))
            for part, linear in (("q", block.q), ("k", block.k))
        ]
        for batch in batches:
            logits(model, batch)
        for handle in handles:
            handle.remove()
        return list(zip(seen["q"], seen["k"], strict=True))

    return run


@pytest.mark.parametrize("name", [BERT, "fusion.layers.0.self_attention", "fusion.layers.1.cross_attention"])
def test_attention_score_is_the_plain_loop(name: str) -> None:
    model = tiny()
    blocks(model)["fusion.layers.0.self_attention"].keep([0, 2, 3])
    batches = [inputs(images=2, questions=2, tokens=4), inputs(images=1, questions=1, tokens=3, seed=5)]
    block = blocks(model)[name]
    calls = run_and_record(model, block, batches)()
    assert calls[0][1].shape[1] == (16 if "cross" in name else 4)
    found = attention(reasoner.attentions(model), lambda: [logits(model, batch) for batch in batches])
    with torch.no_grad():
        assert found[name] == pytest.approx(plain_attention(block, calls), rel=1e-4)


def test_attention_score_leaves_the_model_as_it_was() -> None:
    model = tiny()
    before = logits(model)
    attention(reasoner.attentions(model), lambda: logits(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model), before)


def test_attention_score_takes_its_hooks_away_when_the_data_fail() -> None:
    model = tiny()

    def broken() -> None:
        logits(model)
        raise InputError("cannot read 1.png", fix="give a whole file")

    with pytest.raises(InputError, match=r"1\.png"):
        prune(reasoner, model, broken, Options(keep=0.5, score="attention"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert heads_left(model) == [4] * len(NAMES)
