"""A judge of pictures that was trained apart from what made them: what stands in each of nine cells.

Axes: N pictures, S pixels a side, G cells.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.console import progress

SIDE = 3  # cells
BATCH = 32


class Recogniser(nn.Module):
    """Convolutions on the picture, pooled in each cell.

    kinds   what a thing can be: its shapes, colours and sizes, in this order
    """

    def __init__(self, kinds: Sequence[Sequence[str]], channels: int = 64) -> None:
        super().__init__()
        self.kinds = tuple(map(tuple, kinds))
        steps: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, channels, 4, 2, 1)]
        for _ in range(3):
            steps += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.features = nn.Sequential(*steps, nn.ReLU())
        self.head = nn.Linear(2 * channels, 1 + sum(map(len, self.kinds)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels float [N,3,S,S], -1..1 -> logits [N,G,1+..]: that the cell is empty, then of each kind."""
        grid = self.features(pixels)
        pooled = torch.cat([F.adaptive_avg_pool2d(grid, SIDE), F.adaptive_max_pool2d(grid, SIDE)], 1)
        logits: Tensor = self.head(pooled.flatten(2).transpose(1, 2))
        return logits

    def split(self, logits: Tensor) -> list[Tensor]:
        """Of `forward`'s logits those that a cell is empty [N,G], and those of each kind [N,G,..]."""
        first, *others = logits.split([1, *map(len, self.kinds)], -1)
        return [first[..., 0], *others]

    @torch.inference_mode()
    def recognise(self, world: Any, picture: NDArray[np.uint8]) -> list[Any]:
        """The things of uint8[S,S,3], as `world` has them, each in the middle of its cell."""
        empty, *kinds = self.split(self(as_pixels(picture[None])))
        size = picture.shape[0] / SIDE
        found = []
        for cell, (row, column) in enumerate(product(range(SIDE), range(SIDE))):
            if empty[0, cell] < 0:
                words = [names[int(x[0, cell].argmax())] for names, x in zip(self.kinds, kinds, strict=True)]
                found.append(world.Thing(*words, int((column + 0.5) * size), int((row + 0.5) * size)))
        return found


def as_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8[N,S,S,3] -> float32[N,3,S,S], -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_recogniser(world: ModuleType, scenes: Sequence[Any], epochs: int, seed: int) -> Recogniser:
    """One that learned from the drawings of these scenes."""
    torch.manual_seed(seed)
    things = [thing for scene in scenes for thing in scene.things]
    kinds = [sorted({getattr(t, name) for t in things}) for name in ("shape", "colour", "size")]
    model = Recogniser(kinds)
    images = np.stack([world.draw(s) for s in scenes])
    empty = torch.ones(len(scenes), SIDE * SIDE)
    right = torch.full((len(scenes), SIDE * SIDE, len(kinds)), -1)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            column, row = thing.cell
            empty[i, row * SIDE + column] = 0
            names = (thing.shape, thing.colour, thing.size)
            right[i, row * SIDE + column] = torch.tensor([k.index(n) for k, n in zip(kinds, names, strict=True)])
    order = [i for e in range(epochs) for i in random.Random(f"{seed} {e}").sample(range(len(scenes)), len(scenes))]
    steps = -(-len(order) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in progress(range(steps), "recogniser"):
        part = order[step * BATCH : (step + 1) * BATCH]
        absent, *logits = model.split(model(as_pixels(images[part])))
        loss = F.binary_cross_entropy_with_logits(absent, empty[part])
        for k, x in enumerate(logits):
            loss = loss + F.cross_entropy(x.flatten(0, 1), right[part][..., k].flatten(), ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()
