"""Key tokens: which go, that nothing else changes, and that the graph says the same."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgemm.errors import InputError
from edgemm.models import find_family, read_model, reasoner
from edgemm.models._graph import check, onnx_export
from edgemm.models._key_tokens import KeyTokens
from edgemm.pruners import attention_heads, key_tokens
from edgemm.reasoner.model import Reasoner
from edgemm.stages.prune import layer as row
from edgemm.stages.prune import measured
from tests.checkpoints import write
from tests.unit.test_attention_heads import TOKENIZER, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("reasoner", "clip", "vit")
TOKENS = 16  # of the image, in each of these


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: write(name, tmp_path_factory.mktemp(name)) for name in (*FAMILIES[1:], "bert")}
    source = tmp_path_factory.mktemp("source")
    TOKENIZER.save(str(source / "tokenizer.json"))
    reasoner.save(tiny(), source / "model", source)
    return {**made, "reasoner": source / "model"}


@pytest.fixture(params=FAMILIES)
def loaded(request: pytest.FixtureRequest, directories: dict[str, Path]) -> tuple[ModuleType, Any, Path]:
    directory = directories[request.param]
    family = find_family(directory)
    return family, read_model(family, directory), directory


def cut(family: ModuleType, model: Any, **options: Any) -> None:
    assert key_tokens.prune(family, model, lambda: None, key_tokens.Options(**options)) == {}


def component(family: ModuleType, model: Any) -> Any:
    """The one whose tokens can leave."""
    return family.components(model)[2 if family is reasoner else 0]


@torch.inference_mode()
def out(family: ModuleType, model: Any, batch: int = 3) -> Tensor:
    part = component(family, model)
    return part.module(**part.example(batch))


@pytest.mark.parametrize("merge", [False, True])
def test_all_tokens_change_nothing(loaded: tuple[ModuleType, Any, Path], merge: bool) -> None:
    family, model, _ = loaded
    before = out(family, model)
    for i in range(len(family.token_layers(model))):
        cut(family, model, keep=TOKENS, layer=i, merge=merge)
    assert (out(family, model) - before).abs().max() < 1e-6


def loop(queries: Tensor, keys: Tensor, block: Any, weight: list[float]) -> list[float]:
    """Attention that each key of one sample gets, by the definition: a softmax for each query and head."""
    q, k, *_ = block.linears
    received = [0.0] * len(keys)
    for head in range(block.heads):
        part = slice(head * block.head_dim, (head + 1) * block.head_dim)
        for query, counts in zip(queries, weight, strict=True):
            scores = torch.stack([q(query)[part] @ k(key)[part] / block.head_dim**0.5 for key in keys])
            for i, probability in enumerate(scores.softmax(0).tolist()):
                received[i] += counts * probability
    return received


@torch.inference_mode()
def test_the_tokens_that_stay_get_most_attention() -> None:
    model = tiny()
    block = next(b for b in reasoner.attentions(model) if b.kind == "cross")
    rng = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 32, generator=rng), torch.randn(2, 9, 32, generator=rng)
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    chosen = KeyTokens.of(block, 4, merge=False)(queries, keys, weight)
    merged = KeyTokens.of(block, 4, merge=True)(queries, keys, weight)
    for i in range(2):
        received = loop(queries[i], keys[i], block, weight[i].tolist())
        best = sorted(range(9), key=lambda key: -received[key])[:4]
        assert torch.equal(chosen[i], keys[i][best])
        groups = [[keys[i][b]] for b in best]
        for token in keys[i]:
            likeness = [F.cosine_similarity(token, keys[i][b], dim=0) for b in best]
            groups[likeness.index(max(likeness))].append(token)
        assert torch.allclose(merged[i], torch.stack([torch.stack(g).mean(0) for g in groups]), atol=1e-6)


@torch.inference_mode()
def test_heads_that_left_before_do_not_choose_and_those_that_leave_later_do() -> None:
    model = tiny()
    heads = attention_heads.Options(keep=0.4)
    queries, keys = torch.randn(1, 3, 32), torch.randn(1, 9, 32)
    for kept_heads in (4, 2):
        block = next(b for b in reasoner.attentions(model) if b.kind == "cross")
        expected = loop(queries[0], keys[0], block, [1.0] * 3)
        kept = KeyTokens.of(block, 2, merge=False)
        attention_heads.prune(reasoner, model, lambda: None, heads)
        assert kept.k.shape[0] == kept_heads == block.heads
        assert kept.received(queries, keys, None)[0].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("merge", [False, True])
def test_it_is_saved_exported_and_counted(loaded: tuple[ModuleType, Any, Path], merge: bool, tmp_path: Path) -> None:
    family, model, source = loaded
    plain = out(family, model)
    cut(family, model, keep=5, layer=1, merge=merge)
    expected = out(family, model)
    assert (expected - plain).abs().max() > 1e-5
    assert torch.equal(out(family, copy.deepcopy(model)), expected)

    family.save(model, tmp_path / "model", source)
    again = read_model(family, tmp_path / "model")
    assert torch.equal(out(family, again), expected)
    first, second = family.token_layers(again)
    assert first.kept is None
    assert (second.kept.keep, second.kept.merge) == (5, merge)

    part = component(family, again)
    path = tmp_path / f"{part.name}.onnx"
    onnx_export(part, path, 18)
    check(part, path, 1e-4)
    graph = onnx.load(path).graph
    (node,) = (n for n in graph.node if n.op_type == "TopK")
    assert any(n.op_type == "Gather" for n in graph.node)
    (wanted,) = (onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == node.input[1])
    assert wanted.tolist() == [5], "a constant, as TensorRT needs it"

    (_, macs), keys = measured(family, again)
    class_token = int(family is not reasoner)
    layers = [layer.attention for layer in family.token_layers(again)]
    assert [keys[b.name] for b in layers] == [TOKENS + class_token, 5 + class_token]
    if class_token:  # with 16 words, the choice among 16 tokens costs as much as it saves
        assert macs < measured(family, read_model(family, source))[0][1]
    reported = row(layers[0], None, [0], TOKENS, 5)
    assert (reported.keys_before, reported.keys_after, reported.links_after) == (TOKENS, 5, 1)


def test_two_passes_leave_the_fewer_from_the_later_layer_on() -> None:
    model = tiny()
    cut(reasoner, model, keep=9)
    cut(reasoner, model, keep=3, layer=1)
    cut(reasoner, model, keep=8)  # in place of 9
    assert [x.kept.keep for x in reasoner.token_layers(model) if x.kept] == [8, 3]
    with pytest.raises(InputError, match=r"keep = 9: only 8 tokens reach fusion.layers.1\n  fix: keep at most 8"):
        cut(reasoner, model, keep=9, layer=1)


@torch.inference_mode()
def test_padding_of_the_question_chooses_nothing() -> None:
    model = tiny()
    cut(reasoner, model, keep=3)
    fusion = component(reasoner, model).module
    text, image = torch.randn(2, 4, 32), torch.randn(2, TOKENS, 32)
    expected = fusion(text, torch.ones(2, 4, dtype=torch.int64), image)
    padded = fusion(F.pad(text, (0, 0, 0, 3), value=5.0), torch.tensor([[1] * 4 + [0] * 3] * 2), image)
    assert torch.allclose(padded, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": TOKENS + 1}, r"keep = 17: only 16 tokens reach .*\n  fix: keep at most 16"),
        ({"keep": 1, "layer": 2}, r"layer = 2: the model has 2 layers\n  fix: 0 to 1"),
    ],
)
def test_what_is_not_there_is_refused(
    loaded: tuple[ModuleType, Any, Path], options: dict[str, Any], message: str
) -> None:
    family, model, _ = loaded
    with pytest.raises(InputError, match=message):
        cut(family, model, **options)


def test_family_without_the_choice_is_refused(directories: dict[str, Path]) -> None:
    family = find_family(directories["bert"])
    with pytest.raises(InputError, match="no layer of this bert says which image tokens matter"):
        cut(family, read_model(family, directories["bert"]), keep=1)


def test_what_looks_at_the_tokens_learns_and_what_chooses_them_does_not() -> None:
    model: Reasoner = tiny()
    cut(reasoner, model, keep=3)
    part = component(reasoner, model)
    part.module(**part.example(2)).square().sum().backward()
    layer = model.fusion.layers[0]
    assert layer.cross_attention.v_proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in layer.key_tokens.parameters())
