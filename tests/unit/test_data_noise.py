"""Noise in the form of a model's inputs: all that the model takes, within its limits, the same for a seed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from edgemm.data.noise import SPECIAL, samples
from edgemm.errors import InputError
from edgemm.runtime.audio import read_audio
from edgemm.runtime.inputs import ImageSpec, TextSpec
from edgemm.runtime.preprocess import image_to_pixels, text_to_tensors

IMAGE = {"tensor": "pixels", "size": [32, 48], "resample": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
TEXT = {"ids": "ids", "max_tokens": 77}
AUDIO = {"tensor": "mel", "sampling_rate": 8000, "seconds": 30}


def port(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def program(*inputs: dict[str, Any], **parts: Any) -> dict[str, Any]:
    sizes = {"batch": 16, "tokens": 7, "side": 20}
    return {"components": [{"name": "model", "inputs": inputs, "outputs": [], "max_sizes": sizes}], **parts}


def decoded(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png), formats=["PNG"])
    image.load()
    return image


def test_only_the_modalities_that_the_program_names() -> None:
    (both,) = samples(program(image=IMAGE, text=TEXT), 1, 0)
    assert both.image and both.text
    assert (both.audio, both.boxes, both.tensors, both.label) == (None, None, None, None)
    (sound,) = samples(program(audio=AUDIO, image=None, text=None, tensors=[]), 1, 0)
    assert sound.audio
    assert (sound.image, sound.text) == (None, None)
    assert samples({"image": IMAGE}, 1, 0)[0].image, "families' programs have no components yet"


def test_a_seed_gives_the_same_samples_and_another_gives_others() -> None:
    whole = program(port("x", "float32", "batch", 3), image=IMAGE, text=TEXT, audio=AUDIO)
    whole["tensors"] = [{"tensor": "x", "kind": "tensor"}]
    first, again, other = samples(whole, 6, 3), samples(whole, 4, 3), samples(whole, 6, 4)
    assert first[:4] == again
    for one, two in zip(first, again, strict=False):
        np.testing.assert_array_equal(one.tensors["x"], two.tensors["x"])
    for group in (first, first + other):
        for field in ("image", "text", "audio"):
            assert len({getattr(s, field) for s in group}) == len(group)
        assert len({s.tensors["x"].tobytes() for s in group}) == len(group)
    assert len({s.id for s in first}) == len({s.group for s in first}) == 6


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, (96, 64)),
        ({"fit": "shortest", "size": [30, 100]}, (80, 60)),
        ({"fit": "shortest", "size": [30, 32]}, (64, 60)),
        ({"size": None, "crop": [11, 13]}, (13, 11)),
        ({"size": None}, (20, 24)),
    ],
)
def test_images_are_smooth_colour_of_a_size_that_the_model_takes(change: dict[str, Any], size: tuple[int, int]) -> None:
    spec = {**IMAGE, **change}
    (sample,) = samples(program(port("pixels", "float32", "batch", 3, 24, "side"), image=spec), 1, 0)
    image = decoded(sample.image)
    assert (image.mode, image.size) == ("RGB", size)
    pixels = np.asarray(image, np.float32)
    assert pixels.std() > 20
    assert np.abs(np.diff(pixels, axis=0)).mean() < pixels.std() / 2
    assert image_to_pixels(sample.image, ImageSpec.model_validate(spec).model_dump()).ndim == 4


@pytest.mark.parametrize("most", [1, 6, 8, 16, 40, 77, 512])
@pytest.mark.parametrize("boxes", [None, "bbox"])
def test_texts_stay_within_max_tokens_even_of_letters(most: int, boxes: str | None) -> None:
    spec = {"ids": "ids", "max_tokens": most, "boxes": boxes}
    for sample in samples(program(text=spec), 20, 0):
        assert len(sample.text) <= max(1, most - SPECIAL)
        words = sample.text.split()
        assert " ".join(words) == sample.text
        assert (sample.boxes is None) == (boxes is None)
        if boxes:
            assert len(sample.boxes) == len(words)
            assert all(0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000 for x0, y0, x1, y1 in sample.boxes)
            assert len(words) > 40 or most < 512, "a document fills what the model takes"
        else:
            assert len(words) <= 12


def test_the_runtime_takes_the_texts_and_boxes() -> None:
    letters = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    spec = TextSpec(ids="ids", boxes="bbox", max_tokens=60)
    (sample,) = samples(program(text=spec.model_dump()), 1, 0)
    tensors = text_to_tensors(sample.text, sample.boxes, spec.model_dump(), tokenizer, 0)
    assert tensors["ids"].shape == (1, len(sample.text.replace(" ", "")))


@pytest.mark.parametrize(("seconds", "rate", "frames"), [(30, 16000, 80000), (0.5, 8000, 4000), (1e-6, 8000, 1)])
def test_audio_is_noise_that_rises_and_falls(seconds: float, rate: int, frames: int) -> None:
    spec = {**AUDIO, "seconds": seconds, "sampling_rate": rate}
    (sample,) = samples(program(audio=spec), 1, 0)
    wave = read_audio(sample.audio, rate)
    assert len(wave) == frames
    assert len(wave) / rate <= max(seconds, 1 / rate)
    if frames == 80000:
        loudness = wave.reshape(20, 10, 400).std(2)  # each quarter of a second in parts of 25 ms
        assert loudness.max() > 0.05
        assert (loudness.min(1) < loudness.max() / 5).all()


def test_ready_made_tensors_follow_the_ports() -> None:
    inputs = [
        port("pixels", "float32", "batch", 3, 4, "side"),
        port("ids", "int64", "batch", "tokens"),
        port("free", "int32", "batch", 5),
        port("mask", "int64", "batch", "tokens"),
        port("flags", "bool", "batch", 2),
        port("scalar", "float32", "batch"),
    ]
    kinds = dict(zip(("pixels", "ids", "free", "mask", "flags", "scalar"), "itmmxx", strict=True))
    names = {"i": "image", "t": "tokens", "m": "mask", "x": "tensor"}
    specs = [{"tensor": n, "kind": names[k]} for n, k in kinds.items()]
    specs[1]["high"] = 3
    specs[2]["kind"] = "tokens"
    made = samples(program(*inputs, tensors=specs), 40, 0)
    shapes = {name: value.shape for name, value in made[0].tensors.items()}
    assert shapes == {"pixels": (3, 4, 20), "ids": (7,), "free": (5,), "mask": (7,), "flags": (2,), "scalar": ()}
    for want in inputs:
        assert {np.asarray(s.tensors[want["name"]]).dtype.name for s in made} == {want["dtype"]}
    ids = np.concatenate([s.tensors["ids"] for s in made])
    assert set(ids.tolist()) == {0, 1, 2}
    assert set(np.concatenate([s.tensors["free"] for s in made]).tolist()) == {0, 1}, "ids that any table has"
    assert all((s.tensors["mask"] == 1).all() for s in made)
    pixels = np.concatenate([s.tensors["pixels"] for s in made])
    assert abs(pixels.mean()) < 0.1
    assert abs(pixels.std() - 1) < 0.1


@pytest.mark.parametrize("n", [0, -1])
def test_no_samples_are_refused(n: int) -> None:
    with pytest.raises(InputError, match=f"random:{n}"):
        samples(program(text=TEXT), n, 0)
