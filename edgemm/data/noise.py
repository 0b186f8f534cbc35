"""Seeded noise in the form of a model's inputs, for latency alone: nothing can be said of its answers."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from edgemm.data import Sample
from edgemm.errors import InputError
from edgemm.runtime.inputs import AudioSpec, ImageSpec, TensorSpec, TextSpec
from edgemm.runtime.program import ComponentSpec, Port

SECONDS = 5.0  # of audio, where the model takes as many
WORDS = 12  # of a question or caption; a document fills what the model takes
SPECIAL = 4  # tokens that a tokenizer may add to the text's
ENGLISH = (
    "a about after all an and are as at be big bird black blue book boy brown but by can car cat chair child city "
    "color come day dog door down eat face field find fire fish food for from girl give glass go grass green hand "
    "has have he head her here his home horse house how in into is it kitchen large light like little long look "
    "make man many more mountain near new night no not of old on one open or orange other out over paper part "
    "people person picture place play red road room run school see she sign sit sky small snow some stand street "
    "sun table tell that the their there they thing this time to train tree two under up wall walk water way we "
    "what when where which white who will window with woman word work year yellow yes you young"
)


def samples(program: dict[str, Any], n: int, seed: int) -> list[Sample]:
    """`n` samples with every modality that `program` names; the first ones are the same for any `n`.

    image    PNG of smooth noise, twice the model's size, or 4:3 where the model keeps the ratio
    text     English words of at most `max_tokens` letters, so that no tokenizer makes more tokens; boxes if wanted
    audio    WAV of noise that rises and falls like syllables, 5 seconds or what the model takes
    tensors  normal where they are float; ids under `high`; masks of ones; dynamic axes at their largest

    program  program.json; without `components` where all inputs are image, text or audio
    Raises InputError when `n` is 0.
    """
    if n < 1:
        raise InputError(f"random:{n} has no samples", fix="use random:64")
    image = ImageSpec.model_validate(program["image"]) if program.get("image") else None
    text = TextSpec.model_validate(program["text"]) if program.get("text") else None
    audio = AudioSpec.model_validate(program["audio"]) if program.get("audio") else None
    tensors = [TensorSpec.model_validate(t) for t in program.get("tensors", ())]
    components = [ComponentSpec.model_validate(c) for c in program.get("components", ())]
    shapes = {p.name: shape(p, c.max_sizes) for c in components for p in c.inputs}
    dtypes = {p.name: p.dtype for c in components for p in c.inputs}
    made = []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        words = random_words(rng, text) if text else []
        made.append(
            Sample(
                id=str(i),
                group=str(i),
                image=random_image(rng, image, shapes) if image else None,
                text=" ".join(words) or None,
                audio=random_audio(rng, audio) if audio else None,
                boxes=random_boxes(rng, len(words)) if text and text.boxes else None,
                tensors={t.tensor: random_tensor(rng, t, shapes[t.tensor], dtypes[t.tensor]) for t in tensors} or None,
            )
        )
    return made


def shape(port: Port, max_sizes: dict[str, int]) -> list[int]:
    """The shape of an input without its first axis, the batch, and at its largest."""
    return [max_sizes[size] if isinstance(size, str) else size for size in port.shape[1:]]


def random_image(rng: Generator, spec: ImageSpec, shapes: dict[str, list[int]]) -> bytes:
    """A PNG; of the size that the model wants where it doesn't resize."""
    if spec.size is None:
        height, width = spec.crop or shapes[spec.tensor][1:]
    else:
        height, width = (2 * side for side in spec.size)
        width = min(width, height * 4 // 3) if spec.fit == "shortest" else width
    coarse = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(png, "PNG")
    return png.getvalue()


def random_words(rng: Generator, spec: TextSpec) -> list[str]:
    """Words whose letters and spaces are at most `max_tokens`, less what the tokenizer adds; at least "a"."""
    words: list[str] = []
    room = spec.max_tokens - SPECIAL
    while spec.boxes or len(words) < WORDS:
        word = str(rng.choice(ENGLISH.split()))
        room -= len(word) + 1
        if room < 0:
            break
        words.append(word)
    return words or ["a"]


def random_boxes(rng: Generator, words: int) -> tuple[tuple[int, int, int, int], ...]:
    """A page in lines of eight words, read from the top left."""
    line = 1000 // (words // 8 + 1)
    boxes = []
    for i in range(words):
        x, y = i % 8 * 125, i // 8 * line
        boxes.append((x, y, x + int(rng.integers(20, 120)), y + max(1, line // 2)))
    return tuple(boxes)


def random_audio(rng: Generator, spec: AudioSpec) -> bytes:
    frames = max(1, int(min(SECONDS, spec.seconds) * spec.sampling_rate))
    seconds = np.arange(frames) / spec.sampling_rate
    syllables = np.arange(0, SECONDS + 0.25, 0.125)  # four a second: loud, quiet, loud ...
    loudness = np.interp(seconds, syllables, rng.uniform(0, 1, len(syllables)) * (np.arange(len(syllables)) % 2))
    signal = 0.2 * rng.standard_normal(frames) * loudness
    wav = io.BytesIO()
    with wave.open(wav, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(spec.sampling_rate)
        file.writeframes((signal.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return wav.getvalue()


def random_tensor(rng: Generator, spec: TensorSpec, size: list[int], dtype: str) -> NDArray[Any]:
    if spec.kind == "mask":
        return np.ones(size, dtype)
    if spec.kind == "tokens" or dtype != "float32":
        return rng.integers(0, spec.high or 2, size).astype(dtype)
    return rng.standard_normal(size, np.float32)
