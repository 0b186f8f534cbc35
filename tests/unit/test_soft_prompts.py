"""Soft prompts: what they begin as, that they alone are learned, and what they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgemm.errors import InputError
from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.corpus import build_tokenizer
from edgemm.reasoner.scenes_model import ScenesReasoner
from edgemm.reasoner.soft_prompts import SoftPrompts, learn_prompts
from tests.checkpoints import SCENES

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = build_tokenizer(["a circle and a star"], ("yes", "no"))


@pytest.fixture(scope="module")
def model() -> ScenesReasoner:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SCENES, "answers": ("no", "yes"), "vocab_size": TOKENIZER.get_vocab_size()}
    made = ScenesReasoner(ScenesConfig(**sizes)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def read(model: ScenesReasoner, text: str) -> Tensor:
    """A text's embedding, as the model itself makes it."""
    ids = torch.tensor([TOKENIZER.encode(text).ids])
    mask = torch.ones_like(ids)
    return model.contrast.pools["text"](model.text_encoder(ids, mask), mask)[0]


def pictures(model: ScenesReasoner, each: int, seed: int) -> tuple[Tensor, list[str]]:
    """Unit embeddings, near one of three of their own for each label."""
    labels = ["circle", "cross", "star"]
    centres = torch.eye(model.config.embedding)[:3]  # as different as can be: random weights must reach them
    noise = torch.randn(3, each, model.config.embedding, generator=torch.Generator().manual_seed(seed))
    rows = nn.functional.normalize(centres[:, None] + 0.1 * noise, dim=-1)
    return rows.flatten(0, 1), [label for label in labels for _ in range(each)]


@torch.no_grad()
def test_a_prompt_without_vectors_is_the_word_itself(model: ScenesReasoner) -> None:
    made = SoftPrompts(model, TOKENIZER, ["circle", "star"], 0)()
    torch.testing.assert_close(made, torch.stack([read(model, "circle"), read(model, "star")]))


@torch.no_grad()
def test_a_name_that_is_no_word_begins_as_the_mean_of_those_that_are(model: ScenesReasoner) -> None:
    prompts = SoftPrompts(model, TOKENIZER, ["circle", "cross", "star"], 2)
    torch.testing.assert_close(prompts.words[1], (prompts.words[0] + prompts.words[2]) / 2)
    before = prompts()
    prompts.names.add_(torch.randn(prompts.names.shape, generator=torch.Generator().manual_seed(0)))
    changed = (prompts() - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, True, False], "the names of known words are not learned"


def test_the_prompts_alone_learn(model: ScenesReasoner) -> None:
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    embeddings, labels = pictures(model, 5, seed=0)
    known, weights = learn_prompts(model, TOKENIZER, embeddings, labels)
    assert known == ("circle", "cross", "star")
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    asked, right = pictures(model, 40, seed=1)
    _, first = learn_prompts(model, TOKENIZER, embeddings, labels, steps=0)
    before, after = (
        sum(known[i] == name for i, name in zip((asked @ w.T).argmax(1), right, strict=True)) / len(right)
        for w in (first, weights)
    )
    assert after > before + 0.1, "of pictures that they did not learn from"
    again = learn_prompts(model, TOKENIZER, embeddings, labels)[1]
    assert torch.equal(weights, again), "the same examples teach the same"


def test_each_label_counts_alike(model: ScenesReasoner) -> None:
    """A label's examples given three times over teach the same."""
    embeddings, labels = pictures(model, 2, seed=0)
    more = torch.cat([embeddings, embeddings[:2], embeddings[:2]])
    once = learn_prompts(model, TOKENIZER, embeddings, labels, steps=5)[1]
    thrice = learn_prompts(model, TOKENIZER, more, [*labels, *["circle"] * 4], steps=5)[1]
    torch.testing.assert_close(once, thrice, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "what"), [(["circle", "red star"], "not one word"), (["star", "star"], "1 labels"), ([], "0 labels")]
)
def test_labels_that_make_no_prompts(model: ScenesReasoner, labels: list[str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        learn_prompts(model, TOKENIZER, torch.zeros(len(labels), model.config.embedding), labels)
