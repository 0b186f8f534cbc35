"""The reference model and its training: against torch's own attention, and against itself interrupted."""

from __future__ import annotations

import csv
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.data import Sample, easy_vqa, scenes
from edgemm.errors import InputError
from edgemm.models import reasoner
from edgemm.reasoner import train as training
from edgemm.reasoner.corpus import UNKNOWN, Corpus, build_tokenizer, told
from edgemm.reasoner.model import Attention, FusionLayer, Reasoner, ReasonerConfig, additive_mask
from edgemm.reasoner.train import train
from edgemm.runtime.inputs import ImageSpec
from edgemm.runtime.preprocess import image_to_pixels
from edgemm.training import Train
from tests.checkpoints import REASONER

pytestmark = pytest.mark.usefixtures("one_thread")
CONCEPTS = ("blue", "circle", "red", "square")
CONFIG = ReasonerConfig(
    answers=(*CONCEPTS, "no", "yes"),
    vocab_size=20,
    image_size=16,
    **REASONER,
)


@pytest.fixture(scope="module")
def model() -> Reasoner:
    torch.manual_seed(0)
    made = Reasoner(CONFIG).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def some(images: int, questions: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(images * 100 + questions * 10 + tokens)
    ids = torch.randint(1, CONFIG.vocab_size, (images * questions, tokens), generator=rng)
    return torch.randn(images, 3, 16, 16, generator=rng), ids, torch.ones_like(ids)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


# What a question and its answer tell


@pytest.mark.parametrize(
    "question, answer, facts",
    [
        ("is there a red shape?", "yes", [("red", True)]),
        ("is there a red shape?", "no", [("red", False)]),
        ("is there not a red shape?", "yes", [("red", False)]),
        ("is there not a red shape?", "no", [("red", True)]),
        ("is no circle present?", "yes", [("circle", False)]),
        ("is no circle present?", "no", [("circle", True)]),
        ("does the image not contain a square?", "yes", [("square", False)]),
        ("does the image contain a square?", "yes", [("square", True)]),
        ("does the image contain a square?", "no", [("square", False)]),
        ("what color is the circle?", "red", [("circle", True), ("red", True)]),
        ("what is the blue shape?", "square", [("blue", True), ("square", True)]),
        ("what shape is in the image?", "square", [("square", True)]),
        ("is there a shape?", "yes", []),
        ("is there a redish shape?", "no", []),  # words, not parts of words
        ("is there a nottingham circle?", "yes", [("circle", True)]),
    ],
)
def test_told(question: str, answer: str, facts: list[tuple[str, bool]]) -> None:
    assert told(question, answer, CONCEPTS) == facts


def test_what_easy_vqa_tells_of_an_image_never_contradicts_itself() -> None:
    samples = easy_vqa.samples("train")
    concepts = tuple(sorted({s.label for s in samples} - {"yes", "no"}))
    seen: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for sample in samples:
        facts = told(sample.text, sample.label, concepts)
        assert facts, sample.text
        for concept, present in facts:
            seen[sample.group, concept].add(present)
    assert {len(told_twice) for told_twice in seen.values()} == {1}


# Tokenizer


def test_tokenizer_has_berts_specials_first_and_puts_them_round_a_question() -> None:
    tokenizer = build_tokenizer(["is there a red shape?"], ("Yes", "no"))
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)[4:] == sorted(
        ["is", "there", "a", "red", "shape", "?", "yes", "no"]
    )
    encoded = tokenizer.encode("Is there a RED shape?")
    assert encoded.tokens == ["[CLS]", "is", "there", "a", "red", "shape", "?", "[SEP]"]
    assert tokenizer.encode("is there a green shape?").tokens[4] == "[UNK]"


def test_tokenizer_does_not_hang_on_the_order_of_its_texts() -> None:
    texts = ["is there a red shape?", "what color is it?", "no circle?"]
    assert build_tokenizer(texts, ("a", "b")).to_str() == build_tokenizer(texts[::-1], ("b", "a")).to_str()


# Attention


def reference_of(attention: Attention) -> nn.MultiheadAttention:
    width = attention.q_proj.in_features
    reference = nn.MultiheadAttention(width, attention.heads, batch_first=True).eval()
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
        reference.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
        reference.out_proj.load_state_dict(attention.o_proj.state_dict())
    return reference


@torch.no_grad()
@pytest.mark.parametrize("tokens, keys", [(5, 5), (3, 16), (1, 7)])
def test_attention_is_torchs_multihead_attention(tokens: int, keys: int) -> None:
    torch.manual_seed(tokens)
    attention = Attention(32, 4).eval()
    x, y = torch.randn(2, tokens, 32), torch.randn(2, keys, 32)
    expected, _ = reference_of(attention)(x, y, y)
    assert close(attention(x, y), expected)


@torch.no_grad()
def test_attention_does_not_see_what_is_masked() -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4).eval()
    x, y = torch.randn(2, 3, 32), torch.randn(2, 6, 32)
    present = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    expected, _ = reference_of(attention)(x, y, y, key_padding_mask=present == 0)
    assert close(attention(x, y, additive_mask(present, torch.float32)), expected)


@torch.no_grad()
def test_attention_is_scaled_dot_product_attention_head_by_head() -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4).eval()
    x, y = torch.randn(2, 3, 32), torch.randn(2, 6, 32)
    q, k, v = attention.q_proj(x), attention.k_proj(y), attention.v_proj(y)
    heads = [slice(8 * h, 8 * h + 8) for h in range(4)]
    contexts = [F.scaled_dot_product_attention(q[..., h], k[..., h], v[..., h]) for h in heads]
    assert close(attention(x, y), attention.o_proj(torch.cat(contexts, -1)))


@torch.no_grad()
def test_training_drops_whole_heads_and_rescales_the_others() -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4, drop_head=0.5)
    x = torch.randn(64, 3, 32)
    kept = attention.eval()(x, x)
    nn.init.eye_(attention.o_proj.weight), nn.init.zeros_(attention.o_proj.bias)
    whole = attention(x, x).unflatten(-1, (4, 8))
    dropped = attention.train()(x, x).unflatten(-1, (4, 8))
    gone = (dropped == 0).all(dim=(1, 3))
    assert 0.3 < gone.float().mean() < 0.7
    assert close(dropped, torch.where(gone[:, None, :, None], 0.0, 2 * whole))
    attention.drop_head = 0.0
    assert close(attention(x, x), whole.flatten(2))
    assert kept.shape == x.shape


def test_mask_is_nothing_at_tokens_and_minus_30_at_padding() -> None:
    assert additive_mask(torch.tensor([[1, 1, 0]]), torch.float32).tolist() == [[[[0.0, 0.0, -30.0]]]]


# The whole model


@torch.inference_mode()
@pytest.mark.parametrize("images, questions", [(1, 1), (1, 5), (3, 1), (3, 4)])
def test_questions_of_an_image_together_are_as_one_by_one(model: Reasoner, images: int, questions: int) -> None:
    pixels, ids, mask = some(images, questions, tokens=6)
    together = model(pixels, ids, mask)
    assert together.shape == (images * questions, len(CONFIG.answers))
    for i, row in enumerate(together):
        image = i // questions
        assert close(row, model(pixels[image : image + 1], ids[i : i + 1], mask[i : i + 1])[0])


@torch.inference_mode()
@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(2, 8), padding=st.integers(1, 8), questions=st.integers(1, 3))
def test_padding_changes_nothing(model: Reasoner, tokens: int, padding: int, questions: int) -> None:
    pixels, ids, mask = some(2, questions, tokens)
    expected = model(pixels, ids, mask)
    for filler in (0, 7):
        padded = model(pixels, F.pad(ids, (0, padding), value=filler), F.pad(mask, (0, padding)))
        assert close(padded, expected)


@torch.inference_mode()
def test_image_and_question_both_matter(model: Reasoner) -> None:
    pixels, ids, mask = some(1, 1, tokens=6)
    answer = model(pixels, ids, mask)
    assert (model(pixels.flip(2), ids, mask) - answer).abs().max() > 1e-3
    assert (model(pixels, ids.flip(1), mask) - answer).abs().max() > 1e-3


@torch.inference_mode()
def test_fusion_layer_takes_keys_of_another_length_than_the_text() -> None:
    torch.manual_seed(0)
    layer = FusionLayer(CONFIG).eval()
    text, mask = torch.randn(4, 5, 32), torch.zeros(4, 1, 1, 5)
    image = torch.randn(2, 9, 32)
    made, same = layer(text, mask, image)
    assert made.shape == text.shape
    assert same is image


@torch.inference_mode()
def test_components_in_a_row_are_the_model(model: Reasoner) -> None:
    pixels, ids, mask = some(2, 1, tokens=5)
    image_encoder, text_encoder, fusion = reasoner.components(model)
    image = image_encoder.module(pixel_values=pixels)
    text = text_encoder.module(input_ids=ids, attention_mask=mask)
    assert torch.equal(
        fusion.module(text_tokens=text, attention_mask=mask, image_tokens=image), model(pixels, ids, mask)
    )
    for component in (image_encoder, text_encoder, fusion):
        out = component.module(**component.example(batch=2))
        sizes = {**component.max_sizes, "batch": 2}
        assert list(out.shape) == [sizes.get(n, n) for n in component.outputs[0].shape]


def test_config_survives_json_and_ignores_what_it_does_not_know() -> None:
    values = json.loads(json.dumps({"model_type": "reasoner", "pruned_heads": {}, **CONFIG.to_dict()}))
    assert ReasonerConfig.from_dict(values) == CONFIG


# Training


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Ten images of one coloured shape, four questions each."""
    folder = tmp_path_factory.mktemp("images")
    rng = random.Random(0)
    made = []
    for i in range(10):
        color, shape = rng.choice(["red", "blue"]), rng.choice(["circle", "square"])
        image = Image.new("RGB", (16, 16), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((2, 2, 9 + i % 4, 9 + i % 4), fill=color)
        image.save(folder / f"{i}.png")
        for text, label in (
            (f"what color is the {shape}?", color),
            (f"what is the {color} shape?", shape),
            ("is there a red shape?", "yes" if color == "red" else "no"),
            ("is there not a circle?", "no" if shape == "circle" else "yes"),
        ):
            made.append(Sample(f"{i}-{len(made)}", str(i), folder / f"{i}.png", text, label, text))
    return made


def recipe(bf16: bool = False) -> Train:
    return Train(
        threads=1,
        perception_epochs=2,
        reasoning_epochs=2,
        images_per_batch=3,
        questions_per_image=2,
        validation_images=2,
        bf16=bf16,
        model={
            "image_size": 16,
            "image_channels": (16,),
            "image_depths": (1,),
            "width": 32,
            "heads": 4,
            "text_layers": 1,
            "fusion_layers": 1,
        },
    )


def test_corpus_holds_what_the_questions_tell(samples: list[Sample]) -> None:
    corpus = Corpus.build(samples, validation_images=2, seed=3)
    assert (corpus.answers, corpus.concepts) == (tuple(sorted([*CONCEPTS, "no", "yes"])), CONCEPTS)
    assert corpus.images.shape == (10, 3, 16, 16)
    assert sorted(corpus.training + corpus.validation) == list(range(10))
    assert len(corpus.validation) == 2
    for i, (asked, holds) in enumerate(zip(corpus.asked, corpus.holds, strict=True)):
        mine = samples[4 * i : 4 * i + 4]
        assert np.array_equal(corpus.images[i].permute(1, 2, 0).numpy(), np.array(Image.open(mine[0].image)))
        assert [corpus.answers[a] for _, a in asked] == [s.label for s in mine]
        for (question, _), sample in zip(asked, mine, strict=True):
            ids = corpus.questions[question]
            assert ids[ids != 0].tolist() == corpus.tokenizer.encode(sample.text).ids
        expected = dict.fromkeys(CONCEPTS, UNKNOWN)
        color, shape = mine[0].label, mine[1].label
        expected |= {color: 1.0, shape: 1.0, "red": float(color == "red"), "circle": float(shape == "circle")}
        assert dict(zip(CONCEPTS, holds.tolist(), strict=True)) == expected


def test_each_answer_to_a_question_is_equally_likely_to_be_drawn(samples: list[Sample]) -> None:
    corpus = Corpus.build(samples, validation_images=2, seed=3)
    weight: dict[tuple[int, int], float] = defaultdict(float)
    for asked, weights in zip(corpus.asked, corpus.weights, strict=True):
        for pair, w in zip(asked, weights, strict=True):
            weight[pair] += w
    assert all(w == pytest.approx(1) for w in weight.values())


def test_pixels_are_what_the_runtime_makes_of_the_file(samples: list[Sample], model: Reasoner) -> None:
    corpus = Corpus.build(samples, validation_images=2, seed=3)
    at_runtime = image_to_pixels(samples[0].image, ImageSpec(**reasoner.program(model, Path())["image"]).model_dump())
    assert np.allclose(corpus.pixels([0]).numpy(), at_runtime, atol=1e-6)


def test_data_without_image_files_is_refused(tmp_path: Path) -> None:
    drawn = [Sample("1", "1", b"a PNG", "is there a red circle?", "yes", "existence")]
    with pytest.raises(InputError, match="none of 1 samples has an image in a file"):
        train(drawn, recipe(bf16=False), 0, tmp_path / "out")


def run(samples: list[Sample], out: Path, *, bf16: bool = False, seed: int = 1) -> dict[str, Tensor]:
    trained, _ = train(samples, recipe(bf16), seed, out)
    assert not trained.training
    return trained.state_dict()


def rows(out: Path) -> list[tuple[str, ...]]:
    """log.csv without the seconds."""
    with (out / "log.csv").open(newline="") as f:
        return [(stage, epoch, loss, accuracy) for stage, epoch, _, loss, accuracy in csv.reader(f)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "stop, last",
    [
        ("perception epoch 2/2", ("perception", 0)),
        ("reasoning epoch 1/2", ("perception", 1)),
        ("reasoning epoch 2/2", ("reasoning", 0)),
    ],
)
def test_training_interrupted_and_resumed_ends_at_the_same_bits(
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: str,
    last: tuple[str, int],
    bf16: bool,
) -> None:
    whole = run(samples, tmp_path / "whole", bf16=bf16)

    def interrupt(message: str) -> None:  # the epoch is done, and its checkpoint not yet written
        if message.startswith(stop):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(samples, tmp_path / "parts", bf16=bf16)
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert (state["stage"], state["epoch"]) == last
    torch.manual_seed(99)  # a resumed run must not hang on the state of the process
    assert same(run(samples, tmp_path / "parts", bf16=bf16), whole)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert [row[:2] for row in rows(tmp_path / "whole")[1:]] == [
        ("perception", "1"),
        ("perception", "2"),
        ("reasoning", "1"),
        ("reasoning", "2"),
    ]


def test_training_resumes_from_a_copied_checkpoint(samples: list[Sample], tmp_path: Path) -> None:
    copies: dict[str, bytes] = {}
    write = torch.save

    def keep(state: dict[str, object], path: Path) -> None:
        write(state, path)
        copies[f"{state['stage']} {state['epoch']}"] = path.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.torch, "save", keep)
        whole = run(samples, tmp_path / "whole")
    assert list(copies) == ["perception 0", "perception 1", "reasoning 0", "reasoning 1"]
    for name, checkpoint in copies.items():
        out = tmp_path / name
        out.mkdir()
        (out / "checkpoint.pt").write_bytes(checkpoint)
        assert same(run(samples, out), whole), name


def test_a_finished_training_asked_for_again_gives_the_same_model(samples: list[Sample], tmp_path: Path) -> None:
    whole = run(samples, tmp_path)
    log = (tmp_path / "log.csv").read_text()
    assert same(run(samples, tmp_path), whole)
    assert (tmp_path / "log.csv").read_text() == log


def test_the_seed_decides(samples: list[Sample], tmp_path: Path) -> None:
    one = run(samples, tmp_path / "one", seed=1)
    assert same(one, run(samples, tmp_path / "again", seed=1))
    assert not same(one, run(samples, tmp_path / "other", seed=2))


def test_loss_falls(samples: list[Sample], tmp_path: Path) -> None:
    more = {"perception_epochs": 40, "reasoning_epochs": 40, "learning_rate": 0.01}
    train(samples, recipe().model_copy(update=more), 1, tmp_path)
    for stage in ("perception", "reasoning"):
        losses = [float(loss) for name, _, loss, _ in rows(tmp_path) if name == stage]
        assert len(losses) == 40
        assert all(math.isfinite(loss) for loss in losses)
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_samples_without_picture_files_are_refused() -> None:
    with pytest.raises(InputError, match="reasoner-scenes"):
        Corpus.build(scenes.samples("test")[:9], validation_images=1, seed=0)


def test_an_answer_that_no_question_names_is_no_concept() -> None:
    assert told("what color is the circle?", "purple", ("circle", "red")) == [("circle", True)]
