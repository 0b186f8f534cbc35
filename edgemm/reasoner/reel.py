"""Drawn clips as a watcher learns from them: frames, what stands where, what has happened, questions.

Axes: F frames, P cells of a frame's grid, W words, E EVENTS.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from edgemm.errors import InputError
from edgemm.reasoner.corpus import build_tokenizer
from edgemm.reasoner.watcher import CELL, EVENTS

NEEDS = ("clips", "frames", "clip_questions", "questions_by", "FPS")


@dataclass(slots=True)
class Reel:
    """Clips as a watcher sees them: those to learn from before the `held` ones of the test split.

    names   things by colour and shape;  words  colours, shapes and sizes
    """

    world: Any
    clips: list[Any]
    held: int
    seed: int
    fps: float
    names: tuple[str, ...]
    words: tuple[str, ...]
    answers: tuple[str, ...]
    tokenizer: Tokenizer

    @classmethod
    def build(cls, world: ModuleType, train: int, held: int, seed: int) -> Reel:
        """InputError for data that makes no clips."""
        if lacking := [name for name in NEEDS if not hasattr(world, name)]:
            raise InputError(f"{world.__name__} has no {lacking[0]}()", fix="train on data that makes clips: scenes")
        drawn = [c for split, n in (("train", train), ("test", held)) for c in islice(world.clips(split, seed), n)]
        things = [thing for clip in drawn for thing in clip.things]
        asked = [q for i, c in enumerate(drawn[:train]) for q in world.clip_questions(c, random.Random(f"{seed} {i}"))]
        answers = tuple(sorted({q.answer for q in asked}))
        return cls(
            world=world,
            clips=drawn,
            held=held,
            seed=seed,
            fps=world.FPS,
            names=tuple(sorted({t.name for t in things})),
            words=tuple(sorted({word for t in things for word in (t.colour, t.shape)})),
            answers=answers,
            tokenizer=build_tokenizer(sorted({q.text for q in asked}), answers),
        )

    @property
    def training(self) -> list[int]:
        return list(range(len(self.clips) - self.held))

    @property
    def validation(self) -> list[int]:
        return list(range(len(self.clips) - self.held, len(self.clips)))

    def frames(self, i: int) -> Tensor:
        """float32[F,3,S,S], -1..1."""
        return torch.from_numpy(self.world.frames(self.clips[i])).permute(0, 3, 1, 2).float() / 127.5 - 1

    def where(self, i: int, side: int) -> Tensor:
        """In which cell of the grid each thing's centre is, -1 where it is not there, int16[F,3]."""

        def cell(place: tuple[int, int] | None) -> int:
            if place is None:
                return -1
            column, row = (min(side - 1, max(0, at // CELL)) for at in place)
            return row * side + column

        tracks = zip(*self.clips[i].tracks, strict=True)
        return torch.tensor([[cell(place) for place in places] for places in tracks], dtype=torch.int16)

    def grid(self, i: int, frame: int, side: int) -> Tensor:
        """1 where a thing's centre is, and where what stands there is spelled with the word, float32[P,1+W]."""
        made = torch.zeros(side * side, 1 + len(self.words))
        for thing, cell in zip(self.clips[i].things, self.where(i, side)[frame].tolist(), strict=True):
            if cell >= 0:
                words = [float(w in (thing.colour, thing.shape)) for w in self.words]
                made[cell] = torch.tensor([1.0, *words])
        return made

    def facts(self, i: int, frame: int) -> Tensor:
        """Of each thing at a frame, float32[3,1+2E]: whether it is there, whether each of EVENTS has happened to it,
        the logarithm of one and the seconds since."""
        clip = self.clips[i]
        made = torch.zeros(3, 1 + 2 * len(EVENTS))
        names = self.named(i)
        for thing, track in enumerate(clip.tracks):
            made[thing, 0] = track[frame] is not None
        for event in clip.events:
            told = [(names.index(self.names.index(event.subject)), EVENTS.index(event.kind))]
            if event.kind == "onto":
                told.append((names.index(self.names.index(event.target)), EVENTS.index("is moved onto")))
            if event.frame <= frame:
                for thing, kind in told:
                    made[thing, 1 + kind] = 1
                    made[thing, 1 + len(EVENTS) + kind] = math.log1p((frame - event.frame) / self.fps)
        return made

    def named(self, i: int) -> list[int]:
        """Which of `names` the three things have."""
        return [self.names.index(thing.name) for thing in self.clips[i].things]

    def mentions(self, ids: Tensor) -> Tensor:
        """Where texts int64[N,T] name a thing: row, place of the name's last word, which name, int64[M,3]."""
        known = {tuple(self.tokenizer.token_to_id(w) for w in n.split()): q for q, n in enumerate(self.names)}
        found = [
            (row, at, known[pair])
            for row, text in enumerate(ids.tolist())
            for at, pair in enumerate(pairwise(text), 1)
            if pair in known
        ]
        return torch.tensor(found, dtype=torch.int64).view(-1, 3)

    def questions(self, i: int, key: str) -> list[Any]:
        found: list[Any] = self.world.clip_questions(self.clips[i], random.Random(f"{self.seed} {key} {i}"))
        return found

    def drawn(self, i: int, frame: int, rng: random.Random) -> Any:
        """A question about a clip that ends with this frame: a kind, then one of it."""
        kinds = defaultdict(list)
        for question in self.world.questions_by(self.clips[i], frame):
            kinds[question.kind].append(question)
        return rng.choice(kinds[rng.choice(sorted(kinds))])

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64[N,T]."""
        rows = [e.ids for e in self.tokenizer.encode_batch(list(texts))]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = torch.tensor(values)
        return ids, (ids != 0).long()
