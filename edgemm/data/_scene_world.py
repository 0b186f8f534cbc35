"""The world of the scenes: one to three coloured shapes on a plain ground, and which scenes training may see."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgemm.artifact import sha256_text
from edgemm.errors import InputError

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (235, 220, 60),
    "green": (50, 160, 60),
    "cyan": (70, 205, 220),
    "blue": (50, 80, 215),
    "purple": (140, 60, 170),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond")
NEW_SHAPE = "cross"  # the new class of few-shot experiments: in no scene of "train" or "test"
SIZES = {"small": 5, "big": 8}  # from the centre to the edge, pixels
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIDE = 64  # of the picture, pixels
CENTRES = (11, 32, 53)  # of the three columns and of the three rows, pixels
JITTER = 2  # how far a thing stands from its cell's centre at most: things never touch
THINGS = (1, 2, 2, 2, 3, 3)  # how many there are, drawn from these
SPLITS = ("train", "test", "new")
TEST_SHARE = 5  # one of so many is held out of training


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape.

    shape, colour, size   one of SHAPES or NEW_SHAPE, of COLOURS, of SIZES
    x, y                  its centre, pixels from the top left
    """

    shape: str
    colour: str
    size: str
    x: int
    y: int

    @property
    def name(self) -> str:
        """What it is called; no other thing of its scene is."""
        return f"{self.colour} {self.shape}"

    @property
    def cell(self) -> tuple[int, int]:
        """(column, row), each 0 to 2."""
        return self.x * 3 // SIDE, self.y * 3 // SIDE


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in cells of their own, in no particular order; no two have both colour and shape in common.

    wording  seed of the order of words in the caption
    """

    things: tuple[Thing, ...]
    wording: int

    @property
    def in_order(self) -> list[Thing]:
        """The things from left to right, in one column from top to bottom."""
        return sorted(self.things, key=lambda thing: thing.cell)

    @property
    def told(self) -> str:
        """What tones tell of it: the things in order."""
        return ", ".join(f"{thing.size} {thing.name}" for thing in self.in_order)

    @property
    def meaning(self) -> str:
        """What words can say of it: the same for all scenes of which the same can be said."""
        ordered = sorted(self.things, key=lambda thing: thing.name)
        facts = [f"{thing.size} {thing.name}" for thing in ordered]
        facts += [
            f"{a.name} {relation} {b.name}"
            for i, a in enumerate(ordered)
            for b in ordered[i + 1 :]
            for relation in relations(a, b)
        ]
        return "; ".join(facts)


def relations(a: Thing, b: Thing) -> list[str]:
    """Which of OPPOSITES' keys lead from `b` to `a`: ["left of", "above"] when `a` is left of and above `b`."""
    (column, row), (other_column, other_row) = a.cell, b.cell
    held = {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }
    return [relation for relation, holds in held.items() if holds]


def part_of(told: str) -> str:
    """Where a scene or clip belongs of which this is told, "train" or "test", whatever the seed: a digest decides."""
    return "train" if int(sha256_text(told)[:8], 16) % TEST_SHARE else "test"


def draw_things(rng: random.Random, count: int, cells: list[tuple[int, int]]) -> list[Thing]:
    """`count` things, one in each of the first cells; often one has the shape or the colour of another."""
    things: list[Thing] = []
    for column, row in cells[:count]:
        while True:
            shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
            shared = rng.choice(("shape", "colour", "")) if things else ""
            if shared == "shape":
                shape = rng.choice(things).shape
            elif shared == "colour":
                colour = rng.choice(things).colour
            x, y = (CENTRES[at] + rng.randint(-JITTER, JITTER) for at in (column, row))
            thing = Thing(shape, colour, rng.choice(list(SIZES)), x, y)
            if thing.name not in {other.name for other in things}:
                things.append(thing)
                break
    return things


def draw_cells(rng: random.Random) -> list[tuple[int, int]]:
    """The nine cells, shuffled."""
    cells = [(column, row) for column in range(3) for row in range(3)]
    rng.shuffle(cells)
    return cells


def scenes(split: str, seed: int) -> Iterator[Scene]:
    """Scenes without end, each once.

    split  "train"; "test", where tones tell of no two the same, nor what they tell of a training scene, so that
           captions differ as well; or "new", where the first thing of each is a NEW_SHAPE, which no other split has

    Raises InputError.
    """
    if split not in SPLITS:
        raise InputError(f"scenes has no split {split!r}", fix="use train or test")
    rng = random.Random(f"scenes {split} {seed}")
    seen: set[object] = set()
    while True:
        things = draw_things(rng, rng.choice(THINGS), draw_cells(rng))
        if split == "new":
            things[0] = replace(things[0], shape=NEW_SHAPE)
        scene = Scene(tuple(things), rng.getrandbits(32))
        key = scene.told if split == "test" else frozenset(things)
        if key not in seen and split in ("new", part_of(scene.told)):
            seen.add(key)
            yield scene
