"""Drawn scenes as tensors: pictures, sounds, captions that are true and that just aren't, questions with answers.

Axes: N scenes, T tokens, P cells of the picture's grid, C concepts, H wrong captions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor

from edgemm.errors import InputError
from edgemm.reasoner.corpus import MEAN, STD, UNKNOWN, build_tokenizer

WRONG = 2  # wrong captions of a scene
INSIDE, OUTSIDE = (
    4.0,
    13.0,
)  # pixels from a thing's centre to a cell's: up to here it is the thing's; from there nothing's
NEEDS = ("scenes", "draw", "tones", "caption", "is_true", "hard_negatives", "questions")


def writing(tokenizer: Tokenizer) -> Tokenizer:
    """A word-level tokenizer that writes marks where captions have them: at the end of the word before."""
    joined = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.decoder = decoders.Sequence([joined, decoders.Fuse(), decoders.Replace(" ;", ";")])
    return tokenizer


@dataclass(slots=True)
class Texts:
    """Token ids, padded with 0, int64[B,T]."""

    ids: Tensor

    @property
    def mask(self) -> Tensor:
        return (self.ids != 0).long()


@dataclass
class ScenesCorpus:
    """What the trainer draws from. `world` is the data set's module: it draws scenes, and says what is true of one.

    scenes      of the world;  training, validation  indices into them
    images      uint8[N,3,S,S];  sounds  int16[N,W], 16 kHz, silence after each
    lengths     samples of each sound
    kinds       of questions;  concepts  words that name what a thing is: colours, shapes, sizes
    """

    world: Any
    scenes: list[Any]
    images: Tensor
    sounds: Tensor
    lengths: list[int]
    answers: tuple[str, ...]
    kinds: tuple[str, ...]
    concepts: tuple[str, ...]
    tokenizer: Tokenizer
    training: list[int]
    validation: list[int]
    seed: int

    @classmethod
    def build(cls, world: ModuleType, train: int, validation: int, seed: int) -> ScenesCorpus:
        """Draw `train` scenes to learn from and `validation` others. InputError for data that draws none."""
        if lacking := [name for name in NEEDS if not hasattr(world, name)]:
            raise InputError(f"{world.__name__} has no {lacking[0]}()", fix="train on data that draws scenes: scenes")
        drawn = list(islice(world.scenes("train", seed), train + validation))
        texts = {world.caption(s) for s in drawn}
        answers, kinds = set(), set()
        for i, scene in enumerate(drawn):
            asked = world.questions(scene, random.Random(f"{seed} words {i}"))
            texts |= {q.text for q in asked}
            answers |= {q.answer for q in asked}
            kinds |= {q.kind for q in asked}
        things = [thing for scene in drawn for thing in scene.things]
        sounds = [(world.tones(s) * 32767).astype(np.int16) for s in drawn]
        padded = np.zeros((len(sounds), max(map(len, sounds))), np.int16)
        for row, sound in zip(padded, sounds, strict=True):
            row[: len(sound)] = sound
        images = torch.from_numpy(np.stack([world.draw(s) for s in drawn]))
        return cls(
            world=world,
            scenes=drawn,
            images=images.permute(0, 3, 1, 2).contiguous(),
            sounds=torch.from_numpy(padded),
            lengths=[len(s) for s in sounds],
            answers=tuple(sorted(answers)),
            kinds=tuple(sorted(kinds)),
            concepts=tuple(sorted({word for t in things for word in (t.colour, t.shape, t.size)})),
            tokenizer=writing(build_tokenizer(sorted(texts), tuple(sorted(answers)))),
            training=list(range(train)),
            validation=list(range(train, train + validation)),
            seed=seed,
        )

    def pixels(self, index: list[int]) -> Tensor:
        """Normalised pixels float32[N,3,S,S]."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (self.images[index].float() / 255 - mean) / std

    def samples(self, index: list[int], least: int = 0) -> int:
        """Length of the longest sound, at least `least`."""
        return max(least, *(self.lengths[i] for i in index))

    def waves(self, index: list[int], least: int = 0) -> Tensor:
        """Waveforms float32[N,W], full scale 1, as long as the longest, at least `least` samples."""
        return self.sounds[index, : self.samples(index, least)].float() / 32768

    def encode(self, texts: list[str]) -> Texts:
        rows = [e.ids for e in self.tokenizer.encode_batch(texts)]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = torch.tensor(values)
        return Texts(ids)

    def captions(self, index: list[int]) -> list[str]:
        return [self.world.caption(self.scenes[i]) for i in index]

    def wrong_captions(self, index: list[int]) -> list[list[str]]:
        """WRONG captions of each scene: just not true where there are such, else those of its neighbours in `index`."""
        found = []
        for at, i in enumerate(index):
            wrong = [n.text for n in self.world.hard_negatives(self.scenes[i])]
            others = (self.world.caption(self.scenes[index[(at + 1 + k) % len(index)]]) for k in range(WRONG))
            found.append([*wrong, *others][:WRONG])
        return found

    def same(self, index: list[int]) -> Tensor:
        """bool[N,N]: whether the same can be said of two scenes."""
        known: dict[str, int] = {}
        meaning = torch.tensor([known.setdefault(self.scenes[i].meaning, len(known)) for i in index])
        return meaning[:, None] == meaning

    def questions(self, index: list[int], each: int, key: str) -> tuple[list[str], Tensor, list[str]]:
        """`each` questions of each scene, those of a scene together, by `key` -> texts, answers int64[B], kinds."""
        texts, answers, kinds = [], [], []
        for i in index:
            rng = random.Random(f"{self.seed} {key} {i}")
            asked: list[Any] = []
            while len(asked) < each:
                asked += self.world.questions(self.scenes[i], rng)
            for question in rng.sample(asked, each):
                texts.append(question.text)
                answers.append(self._places[question.answer])
                kinds.append(question.kind)
        return texts, torch.tensor(answers), kinds

    def counts(self, index: list[int]) -> Tensor:
        """The answer to no question, how many things there are, int64[N]."""
        return torch.tensor([self._places[str(len(self.scenes[i].things))] for i in index])

    def holds(self, index: list[int]) -> Tensor:
        """float32[N,C]: 1 where a thing of the scene is what the concept says."""
        rows = []
        for i in index:
            words = {w for t in self.scenes[i].things for w in (t.colour, t.shape, t.size)}
            rows.append([float(c in words) for c in self.concepts])
        return torch.tensor(rows)

    def grid(self, index: list[int], side: int) -> Tensor:
        """What stands in each cell of a `side` x `side` grid: float32[N,P,C], UNKNOWN where a thing's edge may be."""
        size = self.images.shape[2] / side
        centres = (torch.arange(side) + 0.5) * size
        made = torch.zeros(len(index), side * side, len(self.concepts))
        for row, i in zip(made, index, strict=True):
            for thing in self.scenes[i].things:
                away = torch.maximum((centres[:, None] - thing.y).abs(), (centres[None] - thing.x).abs()).flatten()
                row[away < OUTSIDE] = UNKNOWN
            for thing in self.scenes[i].things:
                away = torch.maximum((centres[:, None] - thing.y).abs(), (centres[None] - thing.x).abs()).flatten()
                named = [float(c in (thing.colour, thing.shape, thing.size)) for c in self.concepts]
                row[away <= max(INSIDE, size / 2)] = torch.tensor(named)
        return made

    @cached_property
    def _places(self) -> dict[str, int]:
        return {a: i for i, a in enumerate(self.answers)}
