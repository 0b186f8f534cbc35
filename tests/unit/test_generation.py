"""The token loop against transformers' generate on a tiny ViT-GPT2, and what it passes to the decoder."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

from edgemm.errors import InputError
from edgemm.models import vision_encoder_decoder
from edgemm.models._graph import caller
from edgemm.runtime.generation import generate, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, POSITIONS, LAYERS = 61, 24, 2
START, EOS = 1, 48
IMAGES = 8
STD = 0.3
Tensors = dict[str, NDArray[Any]]


@cache
def model() -> Any:
    """Random weights, wide enough that texts differ and end at different lengths."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    encoder = ViTModel(ViTConfig(**sizes, intermediate_size=32, image_size=8, patch_size=4), add_pooling_layer=False)
    config = GPT2Config(n_embd=16, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, n_positions=POSITIONS)
    config.is_decoder = config.add_cross_attention = True
    made = VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(config)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=STD)
    made.generation_config.decoder_start_token_id = START
    made.generation_config.eos_token_id = made.generation_config.pad_token_id = EOS
    return made


@cache
def parts() -> tuple[Any, dict[str, Any], list[Tensors]]:
    """The decoder's call and spec, and what the encoder makes of each image."""
    encoder, decoder = vision_encoder_decoder.components(model())
    encode = caller(encoder, None)
    return caller(decoder, None), decoder.spec(), [encode({"pixel_values": p}) for p in pixels().numpy()[:, None]]


@cache
def pixels() -> torch.Tensor:
    return 3 * torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def output(**changes: Any) -> dict[str, Any]:
    """program.json's `output`, as Session gives it."""
    return {
        "ids": "decoder_input_ids",
        "positions": "position_ids",
        "mask": "decoder_attention_mask",
        "logits": "logits",
        "cache": [(f"past_{p}_{i}", f"present_{p}_{i}") for i in range(LAYERS) for p in ("key", "value")],
        "eos": (EOS,),
        "suppress": (),
        "suppress_first": (),
        "max_new_tokens": 12,
        "beams": 1,
        "length_penalty": 1.0,
        **changes,
    }


def ours(image: int, prompt: tuple[int, ...] = (START,), **changes: Any) -> list[int]:
    call, spec, known = parts()
    return generate(call, spec, output(**changes), known[image], prompt)


def theirs(image: int, prompt: tuple[int, ...] = (START,), **options: Any) -> list[int]:
    """transformers' new tokens, without the end and what pads after it."""
    options = {"num_beams": 1, "max_new_tokens": 12, "eos_token_id": [EOS], **options}
    ids = model().generate(pixels()[image : image + 1], decoder_input_ids=torch.tensor([prompt]), **options)
    new = ids[0, len(prompt) :].tolist()
    return new[: next((i for i, token in enumerate(new) if token in options["eos_token_id"]), len(new))]


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_texts_are_those_of_transformers(beams, penalty):
    made = [ours(i, beams=beams, length_penalty=penalty) for i in range(IMAGES)]
    assert made == [theirs(i, num_beams=beams, length_penalty=penalty) for i in range(IMAGES)]
    assert len({tuple(text) for text in made}) > IMAGES // 2
    if beams == 1 or penalty == 1.0:
        assert {len(text) == 12 for text in made} == {True, False}  # some ended by themselves, some did not


def test_the_searches_differ():
    assert len({tuple(map(tuple, (ours(i, beams=b) for i in range(IMAGES)))) for b in (1, 2, 4)}) == 3
    by_penalty = {tuple(map(tuple, (ours(i, beams=4, length_penalty=p) for i in range(IMAGES)))) for p in (-1.0, 2.0)}
    assert len(by_penalty) == 2


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_suppressed_ids_are_never_made(beams):
    plain = [ours(i, beams=beams) for i in range(IMAGES)]
    never = tuple(sorted({token for text in plain for token in text[1:]})[::2])
    made = [ours(i, beams=beams, suppress=never) for i in range(IMAGES)]
    assert made == [theirs(i, num_beams=beams, suppress_tokens=list(never)) for i in range(IMAGES)]
    assert made != plain
    assert not {token for text in made for token in text} & set(never)


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_ids_suppressed_first_may_come_later(beams):
    plain = [ours(i, beams=beams) for i in range(IMAGES)]
    first = tuple({text[0] for text in plain if text})
    made = [ours(i, beams=beams, suppress_first=first) for i in range(IMAGES)]
    assert made == [theirs(i, num_beams=beams, begin_suppress_tokens=list(first)) for i in range(IMAGES)]
    assert not {text[0] for text in made if text} & set(first)
    assert {token for text in made for token in text[1:]} & set(first)


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_suppressed_ids_beyond_the_vocabulary_change_nothing(beams):
    assert ours(0, beams=beams, suppress=(VOCABULARY, VOCABULARY + 7)) == ours(0, beams=beams)


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_any_of_several_ids_ends_a_text(beams):
    plain = [ours(i, beams=beams) for i in range(IMAGES)]
    often, _ = Counter(token for text in plain for token in set(text[1:])).most_common(1)[0]
    made = [ours(i, beams=beams, eos=(EOS, often)) for i in range(IMAGES)]
    assert made == [theirs(i, num_beams=beams, eos_token_id=[EOS, often]) for i in range(IMAGES)]
    assert made != plain


@pytest.mark.parametrize("beams", [1, 4])
def test_a_prompt_of_several_ids(beams):
    prompt = (START, 17, 5, 40)
    made = [ours(i, prompt, beams=beams) for i in range(IMAGES)]
    assert made == [theirs(i, prompt, num_beams=beams) for i in range(IMAGES)]
    assert made != [ours(i, beams=beams) for i in range(IMAGES)]


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("limit", [1, 3])
def test_at_most_max_new_tokens_are_made(beams, limit):
    made = [ours(i, beams=beams, max_new_tokens=limit) for i in range(IMAGES)]
    assert made == [theirs(i, num_beams=beams, max_new_tokens=limit) for i in range(IMAGES)]
    assert max(map(len, made)) == limit


@pytest.mark.parametrize("beams", [1, 4])
def test_the_positions_of_the_decoder_end_a_text(beams):
    prompt, never = (START, 17, 5), (EOS,)
    made = ours(0, prompt, beams=beams, max_new_tokens=1000, suppress=never)
    assert len(made) == POSITIONS - len(prompt)
    limit = {"max_new_tokens": POSITIONS - len(prompt), "suppress_tokens": list(never)}
    assert made == theirs(0, prompt, num_beams=beams, **limit)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_prompt_that_leaves_no_position_is_refused(beams):
    assert len(ours(0, (START,) * (POSITIONS - 1), beams=beams, eos=())) == 1
    with pytest.raises(InputError, match=f"the prompt has {POSITIONS} tokens\n  fix: .*{POSITIONS} positions"):
        ours(0, (START,) * POSITIONS, beams=beams)


def test_more_beams_than_tokens():
    assert ours(0, beams=64, max_new_tokens=4) == theirs(0, num_beams=64, max_new_tokens=4)


def test_tokens_come_one_by_one():
    call, spec, known = parts()
    calls = []

    def counted(tensors: Tensors) -> Tensors:
        calls.append(tensors)
        return call(tensors)

    image = max(range(IMAGES), key=lambda i: len(ours(i)))
    stream = tokens(counted, spec, output(), known[image], (START,))
    assert not calls
    first = [next(stream), next(stream)]
    assert len(calls) == 2
    assert [*first, *stream] == ours(image)


def test_the_first_cache_slot_is_hidden_and_the_cache_goes_round_uncopied():
    call, spec, known = parts()
    given, made = [], []

    def recorded(tensors: Tensors) -> Tensors:
        given.append(dict(tensors))
        made.append(call(tensors))
        return made[-1]

    prompt = (START, 9, 4)
    generate(recorded, spec, output(eos=(), max_new_tokens=3), known[0], prompt)
    assert [g["decoder_attention_mask"].tolist() for g in given] == [[[0] + [1] * n] for n in (3, 4, 5)]
    assert [g["position_ids"].tolist() for g in given] == [[[0, 1, 2]], [[3]], [[4]]]
    assert given[0]["decoder_input_ids"].tolist() == [list(prompt)]
    names = {port["name"]: port["shape"] for port in spec["inputs"]}
    for past, present in output()["cache"]:
        assert given[0][past].shape == (1, 4, 1, 4) and not given[0][past].any()
        assert all(g[past] is m[present] for g, m in zip(given[1:], made, strict=False))
    assert all(g.keys() == names.keys() for g in given)
    assert all(g[name] is known[0][name] for g in given for name in names if name.startswith("cross"))


@pytest.mark.parametrize("beams", [1, 4])
def test_the_arrays_of_the_decoder_and_of_the_encoder_stay_as_they_are(beams):
    call, spec, known = parts()
    before = {name: value.copy() for name, value in known[0].items()}

    made: list[Tensors] = []
    copies: list[Tensors] = []

    def watched(tensors: Tensors) -> Tensors:
        made.append(call(tensors))
        copies.append({name: value.copy() for name, value in made[-1].items()})
        return made[-1]

    generate(watched, spec, output(beams=beams, suppress=(3, 5)), known[0], (START,))
    assert all(np.array_equal(m[name], c[name]) for m, c in zip(made, copies, strict=True) for name in m)
    assert all(np.array_equal(value, before[name]) for name, value in known[0].items())
