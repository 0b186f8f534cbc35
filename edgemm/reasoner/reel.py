"""Drawn clips as a watcher learns from them: frames, what stands where, what has happened, questions.

Axes: F frames, W words, Q names.
"""

from __future__ import annotations

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
from edgemm.reasoner.watcher import STATUSES

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
            words=tuple(sorted({word for t in things for word in (t.colour, t.shape, t.size)})),
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

    def grid(self, i: int, frame: int, side: int) -> Tensor:
        """1 where a thing's centre is, and where what stands there is what the word says, float32[side*side,1+W]."""
        made = torch.zeros(side, side, 1 + len(self.words))
        clip = self.clips[i]
        for thing, track in zip(clip.things, clip.tracks, strict=True):
            if (place := track[frame]) is not None:
                column, row = (min(side - 1, max(0, at // 8)) for at in place)
                words = [float(w in (thing.colour, thing.shape, thing.size)) for w in self.words]
                made[row, column] = torch.tensor([1.0, *words])
        return made.flatten(0, 1)

    def told(self, i: int, frame: int, since: int) -> Tensor:
        """What holds of each name at a frame, and of its moves since another one, float32[STATUSES,Q]."""
        made = torch.zeros(len(STATUSES), len(self.names))
        clip = self.clips[i]
        for thing, track in zip(clip.things, clip.tracks, strict=True):
            q = self.names.index(thing.name)
            happened = [e for e in clip.events if e.frame <= frame]
            made[0, q] = track[frame] is not None
            made[1, q] = track[frame] is not None and track[frame] != track[since]
            for status, kind in enumerate(("appears", "vanishes", "onto"), 2):
                made[status, q] = any(e.kind == kind and e.subject == thing.name for e in happened)
            made[5, q] = any(e.kind == "onto" and e.target == thing.name for e in happened)
        return made

    def ago(self, i: int, frame: int) -> Tensor:
        """Seconds at a frame since something last happened to each name, -1 where nothing has, float32[Q]."""
        made = torch.full((len(self.names),), -1.0)
        for event in sorted(self.clips[i].events, key=lambda e: e.frame):
            if event.frame <= frame:
                made[self.names.index(event.subject)] = (frame - event.frame) / self.fps
        return made

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
