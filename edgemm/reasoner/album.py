"""What the painter learns from: drawn scenes, their captions, and for each the plainest scene of which it is true.

Axes: N scenes, S pixels a side, K words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from edgemm.errors import InputError
from edgemm.reasoner.corpus import build_tokenizer
from edgemm.reasoner.recogniser import SIDE

NEEDS = ("scenes", "draw", "caption", "is_true", "seen")


@dataclass(slots=True)
class Album:
    """Scenes as a painter sees them.

    scenes    of the world, those to learn from before those to judge by (`held` of them, whose like is never learned)
    images    uint8[N,S,S,3];  captions  of each;  ids int64[N,K]  their tokens, padded with 0
    plain     uint8[N,S,S,3]  images of the plainest scenes of which the captions are true, see `plainest`
    mentions  int64[N,K]  which thing, in the order of the caption, each of its tokens is of; -1: of none
    told      the things of the plainest scenes, in the order of the caption
    kinds     words for sizes, colours and shapes
    """

    world: Any
    scenes: list[Any]
    images: NDArray[np.uint8]
    plain: NDArray[np.uint8]
    captions: list[str]
    ids: Tensor
    mentions: Tensor
    told: list[list[Any]]
    kinds: tuple[str, ...]
    tokenizer: Tokenizer
    held: int

    @classmethod
    def build(cls, world: ModuleType, train: int, held: int, seed: int) -> Album:
        """Draw `train` scenes to learn from and `held` of the test split. InputError for data that draws none."""
        if lacking := [name for name in NEEDS if not hasattr(world, name)]:
            raise InputError(f"{world.__name__} has no {lacking[0]}()", fix="train on data that draws scenes: scenes")
        drawn = [s for split, n in (("train", train), ("test", held)) for s in islice(world.scenes(split, seed), n)]
        captions = [world.caption(s) for s in drawn]
        tokenizer = build_tokenizer(sorted(set(captions[:train])), ())
        rows = tokenizer.encode_batch(captions)
        ids = torch.zeros(len(rows), max(len(e.ids) for e in rows), dtype=torch.int64)
        mentions = torch.full_like(ids, -1)
        for i, (encoded, scene, said) in enumerate(zip(rows, drawn, captions, strict=True)):
            ids[i, : len(encoded.ids)] = torch.tensor(encoded.ids)
            for k, thing in enumerate(as_told(scene, said)):
                spans = [match.span() for match in re.finditer(thing.name, said)]
                of = [any(a < end and start < b for a, b in spans) for start, end in encoded.offsets]
                mentions[i, : len(of)][torch.tensor(of)] = k
        images = np.stack([world.draw(s) for s in drawn])
        moved = [plainest(s, images.shape[1]) for s in drawn]
        plain = np.stack([world.draw(s) for s in moved])
        told = [as_told(scene, said) for scene, said in zip(moved, captions, strict=True)]
        kinds = sorted({word for things in told for t in things for word in (t.size, t.colour, t.shape)})
        return cls(world, drawn, images, plain, captions, ids, mentions, told, tuple(kinds), tokenizer, held)

    @property
    def training(self) -> list[int]:
        return list(range(len(self.scenes) - self.held))

    @property
    def validation(self) -> list[int]:
        return list(range(len(self.scenes) - self.held, len(self.scenes)))

    def said(self, index: list[int]) -> tuple[Tensor, Tensor]:
        """The captions' ids and mask int64[N,K], as long as the longest."""
        ids = self.ids[index]
        ids = ids[:, : int((ids != 0).sum(1).max())]
        return ids, (ids != 0).long()


def as_told(scene: Any, caption: str) -> list[Any]:
    """The things of a scene in the order in which its caption names them."""
    return sorted(scene.things, key=lambda thing: caption.index(thing.name))


def plainest(scene: Any, side: int) -> Any:
    """A scene of which the same can be said: things in the middle of their cells, spread as far as `side` pixels allow.

    Of columns and rows only their order is kept: one is the middle one, two are the outer ones.
    """
    middle = [round((i + 0.5) * side / SIDE) for i in range(SIDE)]
    spread = {1: middle[1:2], 2: middle[::2], 3: middle}
    columns, rows = (sorted({t.cell[axis] for t in scene.things}) for axis in (0, 1))
    xs, ys = (dict(zip(cells, spread[len(cells)], strict=True)) for cells in (columns, rows))
    return replace(scene, things=tuple(replace(t, x=xs[t.cell[0]], y=ys[t.cell[1]]) for t in scene.things))
