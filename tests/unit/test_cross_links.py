"""Links between modalities that leave, layers of them whole, and the Fisher score without labels."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor, nn

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.models import AttentionBlock, Component, find_family, open_fp32, read_model, reasoner
from edgemm.models._calibration import Calibration
from edgemm.models._graph import check, onnx_export
from edgemm.models._hidden_units import hidden_units
from edgemm.pruners import attention_heads, cross_links, neurons
from edgemm.pruners._scores import fisher, links
from edgemm.reasoner.corpus import build_tokenizer
from edgemm.reasoner.model import Reasoner, ReasonerConfig
from edgemm.runtime.session import Query
from tests import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
ANSWERS = ("blue", "circle", "no", "red", "yes")
TOKENIZER = build_tokenizer(["is there a red shape?"], ANSWERS)
CONFIG = ReasonerConfig(answers=ANSWERS, vocab_size=TOKENIZER.get_vocab_size(), image_size=16, **checkpoints.REASONER)
CROSS = [f"fusion.layers.{i}.cross_attention" for i in range(2)]
CROSSING = ["reasoner", "blip", "whisper", "trocr"]


def tiny() -> Reasoner:
    return copy.deepcopy(made())


@cache
def made() -> Reasoner:
    torch.manual_seed(0)
    model = Reasoner(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@torch.inference_mode()
def logits(model: Reasoner, images: int = 2, questions: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, CONFIG.vocab_size, (images * questions, 7), generator=rng)
    return model(torch.randn(images, 3, 16, 16, generator=rng), ids, torch.ones_like(ids))


def blocks(model: Any, family: ModuleType = reasoner) -> dict[str, AttentionBlock]:
    return {b.name: b for b in family.attentions(model) if b.kind == "cross"}


def cut(model: Reasoner, **options: Any) -> dict[str, tuple[list[float], list[int]]]:
    return cross_links.prune(reasoner, model, lambda: logits(model), cross_links.Options(**options))


def mask(block: AttentionBlock, heads: list[int]) -> None:
    with torch.no_grad():
        block.linears[3].weight.unflatten(1, (block.heads, block.head_dim))[:, heads] = 0


@pytest.mark.parametrize("score", ["attention", "magnitude"])
@pytest.mark.parametrize("options", [{"keep": 1, "repair": True}, {"threshold": 0}], ids=str)
def test_keep_1_changes_no_bit(score: str, options: dict[str, Any]) -> None:
    model = tiny()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    assert {n: h for n, (_, h) in cut(model, score=score, **options).items()} == {n: [0, 1, 2, 3] for n in CROSS}
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("heads", [[1], [0, 1, 2, 3]], ids=["a head", "a whole layer"])
@pytest.mark.parametrize("repaired", [False, True])
def test_links_that_carry_nothing_go_and_are_not_missed(heads: list[int], repaired: bool) -> None:
    model = tiny()
    mask(blocks(model)[CROSS[1]], heads)
    before = logits(model)
    changes = cut(model, threshold=1e-6, repair=repaired)
    left = [h for h in range(4) if h not in heads]
    assert {n: h for n, (_, h) in changes.items()} == {CROSS[0]: [0, 1, 2, 3], CROSS[1]: left}
    assert blocks(model)[CROSS[1]].heads == len(left)
    assert (logits(model) - before).abs().max() < 1e-6


def test_links_under_the_threshold_go_and_others_stay() -> None:
    scores = {n: s for n, (s, _) in cut(tiny(), threshold=0).items()}
    largest = max(s for row in scores.values() for s in row)
    changes = cut(tiny(), threshold=0.8)
    for name, (found, kept) in changes.items():
        assert found == scores[name]
        assert kept == [h for h, s in enumerate(scores[name]) if s >= 0.8 * largest]
    assert 0 < sum(len(kept) for _, kept in changes.values()) < 8


@pytest.mark.parametrize("keep, left", [(0.01, 1), (0.5, 4), (0.75, 6)])
def test_keep_is_a_share_of_the_edge_and_one_link_stays(keep: float, left: int) -> None:
    model = tiny()
    with torch.no_grad():  # all that the second layer carries is less than what the first does
        blocks(model)[CROSS[1]].linears[3].weight *= 0.01
    changes = cut(model, keep=keep)
    kept = {n: len(h) for n, (_, h) in changes.items()}
    assert kept == {CROSS[0]: min(4, left), CROSS[1]: left - min(4, left)}
    assert logits(model).isfinite().all() and logits(model, 3, 1).isfinite().all()


def test_a_layer_without_links_adds_its_bias(tmp_path: Path) -> None:
    masked, model = tiny(), tiny()
    mask(blocks(masked)[CROSS[0]], [0, 1, 2, 3])
    blocks(model)[CROSS[0]].keep([])
    assert (logits(model) - logits(masked)).abs().max() < 1e-5
    assert [linear.weight.numel() for linear in blocks(model)[CROSS[0]].linears] == [0, 0, 0, 0]
    with pytest.raises(AssertionError):
        next(b for b in reasoner.attentions(model) if b.kind == "self").keep([])


def test_repair_lets_the_bias_say_what_the_layer_said_on_average() -> None:
    """One vector for all queries: least squares of the whole output on a constant is its mean."""
    model = tiny()
    block = blocks(model)[CROSS[0]]
    said: list[Tensor] = []
    module = model.fusion.layers[0].cross_attention
    handle = module.register_forward_hook(lambda _m, _i, out: said.append(out.flatten(0, -2)))
    logits(model)
    handle.remove()
    with torch.no_grad():  # so little is carried that all its links go
        block.linears[3].weight *= 1e-3
        block.linears[3].bias *= 0
    cut(model, keep=0.5, repair=True, layers=("*cross_attention",))
    assert block.linears[3].weight.numel() == 0
    wanted = (torch.cat(said).detach() - made().fusion.layers[0].cross_attention.o_proj.bias.detach()).mean(0) * 1e-3
    assert torch.allclose(block.linears[3].bias, wanted, atol=1e-5 + 2e-3 * float(wanted.abs().max()))


def test_other_passes_leave_a_layer_without_links_alone() -> None:
    model = tiny()
    blocks(model)[CROSS[0]].keep([])
    for score in ("magnitude", "attention"):
        changes = attention_heads.prune(
            reasoner, model, lambda: logits(model), attention_heads.Options(keep=0.75, score=score, repair=True)
        )
        assert CROSS[0] not in changes and CROSS[1] in changes
    assert cut(model, keep=0.5).keys() == {CROSS[1]}


def opened(name: str, directory: Path) -> tuple[ModuleType, Any, Path]:
    """A family's model of seeded weights, and a checkpoint of it."""
    if name == "reasoner":
        TOKENIZER.save(str(directory.parent / "tokenizer.json"))
        reasoner.save(tiny(), directory, directory.parent)
    elif name in checkpoints.MODELS:
        checkpoints.write(name, directory)
    else:
        checkpoints.bare(name).save_pretrained(directory)
    family = find_family(directory)
    return family, read_model(family, directory), directory


@torch.inference_mode()
def outputs(components: list[Component]) -> list[Tensor]:
    found: list[Tensor] = []
    for component in components:
        out = component.module(**component.example(2, small=True))
        found += out if isinstance(out, tuple) else (out,)
    return found


@pytest.mark.parametrize("name", CROSSING)
def test_without_a_layer_every_family_is_the_same_on_disk_and_runs_everywhere(name: str, tmp_path: Path) -> None:
    """The same as with its heads masked; its keys and values are in no graph; torch, ONNX Runtime, OpenVINO agree."""
    family, model, whole = opened(name, tmp_path / "whole")
    masked = copy.deepcopy(model)
    for of in (masked, model):
        found = blocks(of, family)
        for edge in {(b.queries, b.keys) for b in found.values()}:
            first = next(b for b in found.values() if (b.queries, b.keys) == edge)
            mask(first, list(range(first.heads))) if of is masked else first.keep([])
    family.save(model, tmp_path / "pruned", whole)
    again = read_model(family, tmp_path / "pruned")
    assert [b.heads for b in family.attentions(again)] == [b.heads for b in family.attentions(model)]
    assert 0 in [b.heads for b in family.attentions(again)]
    with_it = {c.name: c for c in family.components(masked)}
    gone = 0
    for component in family.components(again):
        example = with_it[component.name].example(2, small=True)
        ports = [p.name for p in component.inputs]
        gone += len(with_it[component.name].outputs) - len(component.outputs)
        with torch.inference_mode():
            before = with_it[component.name].module(**example)
            after = component.module(**{n: example[n] for n in ports})
        parts = [o if isinstance(o, tuple) else (o,) for o in (before, after)]
        old = dict(zip((p.name for p in with_it[component.name].outputs), parts[0], strict=True))
        for port, value in zip(component.outputs, parts[1], strict=True):
            assert (old[port.name] - value).abs().max() < 1e-4, (component.name, port.name)
        path = tmp_path / f"{component.name}.onnx"
        onnx_export(component, path, 18)
        check(component, path, 1e-4)
        compiled = ov.Core().compile_model(ov.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        got = compiled({n: example[n].numpy() for n in ports})
        for port, value in zip(component.outputs, parts[1], strict=True):
            error = np.abs(got[port.name] - value.numpy()).max() / max(np.abs(value.numpy()).max(), 1e-6)
            assert error < 1e-3, (component.name, port.name)
    assert gone == (0 if name == "reasoner" else 2)  # a decoder's keys and values


@pytest.mark.parametrize("name", ["blip", "whisper"])
def test_links_of_every_edge_are_measured_and_cut(name: str, tmp_path: Path) -> None:
    family, model, _ = opened(name, tmp_path)
    run = lambda: outputs(family.components(model))  # noqa: E731
    changes = cross_links.prune(family, model, run, cross_links.Options(keep=0.5, score="magnitude"))
    edges: dict[tuple[str, str], int] = {}
    for n, b in blocks(model, family).items():
        edges[b.queries, b.keys] = edges.get((b.queries, b.keys), 0) + len(changes[n][1])
        assert b.heads == len(changes[n][1])
    assert set(edges.values()) == ({4} if name == "blip" else {6})
    assert len(edges) == (2 if name == "blip" else 1)
    assert all(t.isfinite().all() for t in outputs(family.components(model)))


# The map


def test_a_merged_layer_has_an_edge_for_each_pair_of_modalities() -> None:
    """Words and patches: the four parts of the plain loop's probability x norm."""
    torch.manual_seed(0)
    q, k, v, o = (nn.Linear(8, 8) for _ in range(4))
    block = AttentionBlock("it", "merged", "text+image", "text+image", 2, 4, q, k, v, o, lambda n: None)
    states = torch.randn(3, 5, 8)

    @torch.no_grad()
    def run() -> None:
        q(states), k(states), v(states), o(states)

    found = links([block], run, words=lambda: 2)["it"]
    parts = {"text": range(2), "image": range(2, 5)}
    assert list(found) == [(a, b) for a in parts for b in parts]
    for (queries, keys), scores in found.items():
        for head in range(2):
            rows, plain = slice(4 * head, 4 * head + 4), 0.0
            for x in states:
                qs, ks, vs = (f(x)[:, rows].detach() for f in (q, k, v))
                for i in parts[queries]:
                    e = [math.exp(float(qs[i] @ key) / 2) for key in ks]
                    for j in parts[keys]:
                        plain += e[j] / sum(e) * float((o.weight[:, rows] @ vs[j]).norm())
            assert scores[head] == pytest.approx(plain / (3 * len(parts[queries])), rel=1e-4)
    (whole,) = links([block], run)["it"].values()
    summed = [
        2 / 5 * sum(found["text", x][h] for x in parts) + 3 / 5 * sum(found["image", x][h] for x in parts)
        for h in (0, 1)
    ]
    assert whole == pytest.approx(summed, rel=1e-4)


# Fisher


def calibration(model: Reasoner, directory: Path, n: int = 6) -> Calibration:
    """Questions about noise."""
    if not (directory / "tokenizer.json").is_file():
        TOKENIZER.save(str(directory / "tokenizer.json"))
    rng = np.random.default_rng(0)
    queries = []
    for i in range(n):
        from PIL import Image

        path = directory / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
        queries.append(Query(image=path, text="is there a red shape?"))
    return Calibration(reasoner, model, directory, queries)


@torch.no_grad()
def rise(model: Reasoner, run: Calibration, block: AttentionBlock, head: int, step: float) -> float:
    """Mean KL divergence when a head is turned down by `step`."""
    whole = torch.from_numpy(run()["logits"]).double().log_softmax(-1)
    weight = block.linears[3].weight
    columns = weight[:, head * block.head_dim : (head + 1) * block.head_dim]
    saved = columns.clone()
    columns *= 1 - step
    turned = torch.from_numpy(run()["logits"]).double().log_softmax(-1)
    columns.copy_(saved)
    return float((whole.exp() * (whole - turned)).sum(-1).mean())


def test_fisher_is_the_curvature_of_the_loss_against_the_model_itself(tmp_path: Path) -> None:
    """KL(model, model with a head turned down by e) is e^2 x the score, for small e."""
    model = tiny()
    with torch.no_grad():  # answers that are not certain, so that the loss is smooth
        model.fusion.answer.weight *= 0.1
    few = calibration(model, tmp_path)
    many = Calibration(reasoner, model, tmp_path, list(few.queries) * 150)  # as many random directions
    block = blocks(model)[CROSS[1]]
    found = fisher({block.name: (block.linears[3], 4)}, many)[block.name]
    plain = [rise(model, few, block, h, 0.02) / 0.02**2 for h in range(4)]
    assert found == pytest.approx(plain, rel=0.3)
    assert np.argsort(found).tolist() == np.argsort(plain).tolist()


def test_fisher_leaves_the_model_as_it_was_and_is_repeatable(tmp_path: Path) -> None:
    model = tiny()
    run, state = calibration(model, tmp_path), copy.deepcopy(model.state_dict())
    readers = {b.name: (b.linears[3], b.heads) for b in reasoner.attentions(model)}
    readers |= {h.name: (h.reads, h.units) for h in hidden_units(model)}
    found = fisher(readers, run)
    assert found == fisher(readers, run)
    assert {n: len(s) for n, s in found.items()} == {n: count for n, (_, count) in readers.items()}
    assert all(s >= 0 for scores in found.values() for s in scores)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("pruner", "names", "reads"),
    [
        (attention_heads, "text_encoder.bert.encoder.layer.0.attention", None),
        (cross_links, CROSS[0], None),
        (neurons, "fusion.layers.1", 7),
    ],
)
def test_fisher_cuts_what_changes_nothing(pruner: Any, names: str, reads: int | None, tmp_path: Path) -> None:
    model = tiny()
    if reads is None:
        mask(next(b for b in reasoner.attentions(model) if b.name == names), [2])
    else:
        with torch.no_grad():
            model.fusion.layers[1].fc2.weight[:, reads] = 0
    before = logits(model)
    total = {attention_heads: 20, cross_links: 8, neurons: 64 * 3 + 16}[pruner]
    run = calibration(model, tmp_path)
    changes = pruner.prune(reasoner, model, run, pruner.Options(keep=1 - 1 / total, score="fisher"))
    assert [n for n, (scores, kept) in changes.items() if len(kept) < len(scores)] == [names]
    gone = 2 if reads is None else reads
    assert changes[names][0][gone] == 0 and gone not in changes[names][1]
    assert (logits(model) - before).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["clip", "vilt", "vit", "wav2vec2"])
def test_fisher_knows_every_kind_of_output(name: str, tmp_path: Path) -> None:
    """Embeddings, answers scored one by one, classes, characters over time."""
    from edgemm.data.noise import samples
    from edgemm.models import whole_program

    family, model, directory = opened(name, tmp_path)
    program = whole_program(family, model, directory)
    run = Calibration(family, model, directory, [s.query for s in samples(program, 2, 0)])
    scores = attention_heads.prune(family, model, run, attention_heads.Options(keep=0.5, score="fisher"))
    assert all(math.isfinite(s) and s > 0 for found, _ in scores.values() for s in found)


def test_fisher_of_a_model_that_writes_is_refused(tmp_path: Path) -> None:
    family, model, directory = opened("blip", tmp_path)
    run = Calibration(family, model, directory, [])
    with pytest.raises(InputError, match="token by token"):
        attention_heads.prune(family, model, run, attention_heads.Options(keep=0.5, score="fisher"))
    assert all(b.heads == 4 for b in family.attentions(model))
    assert open_fp32(family, model, directory).decoder


# Bad input


@pytest.mark.parametrize(
    "values", [{"keep": 0}, {"keep": 1.1}, {"keep": math.nan}, {"threshold": -1}, {"threshold": 2}, {"keep": "half"}]
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        plugins.options("pruners", "cross_links", values, "recipe: prune.0")


@pytest.mark.parametrize("values", [{}, {"keep": 0.5, "threshold": 0.1}])
def test_one_of_keep_and_threshold_is_to_be_given(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give one of keep"):
        plugins.options("pruners", "cross_links", values, "recipe: prune.0")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vilt", "vilt.encoder.layer.0.attention and 1 more attend within one sequence .* 1.01x"),
        ("vit-gpt2", "q, k and v of decoder.transformer.h.0.crossattention, .* are one matrix"),
        ("clip", "cross_links: the model has no layer"),
    ],
)
def test_models_without_links_that_can_leave_are_refused_by_name(name: str, said: str, tmp_path: Path) -> None:
    family, model, _ = opened(name, tmp_path)
    with pytest.raises(InputError, match=said):
        cross_links.prune(family, model, lambda: None, cross_links.Options(keep=0.5))


def test_a_layer_name_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError, match=r"'decoder\.\*'(.|\n)*fusion\.layers\.1\.cross_attention"):
        cut(tiny(), keep=0.5, layers=("decoder.*",))
