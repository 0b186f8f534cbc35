"""Drawn scenes as tensors: pictures, sounds, captions that are true and that just aren't, questions with answers.

Axes: N scenes, T tokens, P cells of the picture's grid, C concepts, H wrong captions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
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
NEEDS = ("scenes", "draw", "tones", "caption", "claims", "is_true", "hard_negatives", "questions")


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

    def holding(self, index: list[int], texts: list[str]) -> Tensor:
        """1 at the tokens of claims that hold of a scene, 0 where they don't, else UNKNOWN: float32[N,T].

        texts   of each scene of `index` in turn, as many of each
        """
        encoded = self.tokenizer.encode_batch(texts)
        made = torch.full((len(texts), max(len(e.ids) for e in encoded)), float(UNKNOWN))
        each = len(texts) // len(index)
        for at, (row, text, tokens) in enumerate(zip(made, texts, encoded, strict=True)):
            starts = torch.tensor([first if end > first else -1 for first, end in tokens.offsets])
            for first, end, holds in self.world.claims(text, list(self.scenes[index[at // each]].things)):
                row[: len(starts)][(starts >= first) & (starts < end)] = float(holds)
        return made

    def mentions(self, index: list[int], ids: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where texts name a thing by colour and shape, and where it is, nowhere if it is not there.

        index   scenes;  ids int64[N,H,T]  texts of each
        ->      int64[M,3]: which scene, which text, which token (the shape's); float32[M,P] its cells, UNKNOWN at
                edges; int64[M,2] its column and row, UNKNOWN if it is not there
        """
        where, cells, places = [], [], []
        for n, (i, texts) in enumerate(zip(index, ids.tolist(), strict=True)):
            things = self.scenes[i].things
            known = {t.name: (own, t.cell) for t, own in zip(things, self._cells(i, side), strict=True)}
            nothing = torch.zeros(side * side), (int(UNKNOWN), int(UNKNOWN))
            for k, text in enumerate(texts):
                for at, pair in enumerate(pairwise(text), 1):
                    if (name := self._names.get(pair)) is not None:
                        own, place = known.get(name, nothing)
                        where.append((n, k, at))
                        cells.append(own)
                        places.append(place)
        return torch.tensor(where), torch.stack(cells), torch.tensor(places)

    def _cells(self, scene: int, side: int) -> list[Tensor]:
        """For each thing of a scene the cells that are its own: float32[P], 1, 0 or UNKNOWN."""
        size = self.images.shape[2] / side
        centres = (torch.arange(side) + 0.5) * size
        made = []
        for thing in self.scenes[scene].things:
            away = torch.maximum((centres[:, None] - thing.y).abs(), (centres[None] - thing.x).abs()).flatten()
            own = torch.where(away < OUTSIDE, float(UNKNOWN), 0.0)
            own[away <= max(INSIDE, size / 2)] = 1.0
            made.append(own)
        return made

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
        made = torch.zeros(len(index), side * side, len(self.concepts))
        for row, i in zip(made, index, strict=True):
            cells = self._cells(i, side)
            row[torch.stack(cells).amin(0) == UNKNOWN] = UNKNOWN
            for thing, own in zip(self.scenes[i].things, cells, strict=True):
                named = [float(c in (thing.colour, thing.shape, thing.size)) for c in self.concepts]
                row[own == 1] = torch.tensor(named)
        return made

    @cached_property
    def _names(self) -> dict[tuple[int, int], str]:
        """The ids of a colour and a shape -> what a thing of both is called."""
        ids = {word: i for word, i in self.tokenizer.get_vocab().items() if word in self.concepts}
        things = [t for scene in self.scenes for t in scene.things]
        return {(ids[t.colour], ids[t.shape]): t.name for t in things}

    @cached_property
    def _places(self) -> dict[str, int]:
        return {a: i for i, a in enumerate(self.answers)}
