"""What a picture shows, a sound tells and a caption claims, read by rule: no model, and none of the drawing's records.

It judges pictures that a model made as well: a thing may be a few pixels off, and colours are the nearest ones.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from edgemm.data._scene_media import GAP, GROUND, RATE, paint, tone
from edgemm.data._scene_world import CENTRES, COLOURS, JITTER, NEW_SHAPE, SHAPES, SIZES, Thing, relations

LIKE = 0.6  # of a thing's pixels and a drawing's, the share that both have, from which on they are the same
ALOUD = 0.9  # correlation of a piece of sound with a thing's tones from which on it is that thing
WORD = "|".join
THING = re.compile(rf"a ({WORD(SIZES)}) (({WORD(COLOURS)}) ({WORD((*SHAPES, NEW_SHAPE))}))")
FACT = re.compile(r"the (\w+ \w+) is (\w+(?: of)?)(?: and (\w+))? the (\w+ \w+)")


def nearest_colours(picture: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each pixel of uint8[...,3] which of COLOURS is nearest, from 1 on; 0 where GROUND is nearer."""
    palette = np.array([GROUND, *COLOURS.values()], np.float32)
    distances = np.square(palette).sum(1) - 2 * picture.astype(np.float32) @ palette.T  # less the pixel's own square
    return distances.argmin(-1)


def seen(picture: NDArray[np.uint8]) -> list[Thing]:
    """The things in a picture of still things, uint8[64,64,3]: in each cell the drawing that fits best, if any does."""
    colours = nearest_colours(picture)
    things, masks = _drawings()
    found = []
    for x, y in product(CENTRES, CENTRES):
        cell = colours[_span(y), _span(x)]
        counts = np.bincount(cell[cell > 0], minlength=1)
        if not counts.any():
            continue
        mask = (cell == counts.argmax()).reshape(-1)
        both = masks @ mask.astype(np.int64)
        likeness = both / (masks.sum(1) + mask.sum() - both)
        best = int(likeness.argmax())
        if likeness[best] >= LIKE:
            shape, size, dx, dy = things[best]
            found.append(Thing(shape, list(COLOURS)[int(counts.argmax()) - 1], size, x + dx, y + dy))
    return found


def _span(centre: int) -> slice:
    """The pixels of a row or column of cells."""
    reach = max(SIZES.values()) + JITTER
    return slice(centre - reach, centre + reach + 1)


@cache
def _drawings() -> tuple[list[tuple[str, str, int, int]], NDArray[np.int64]]:
    """Every shape of every size at every place in a cell: what it is, and its pixels int64[N,21*21], 1 or 0."""
    offsets = range(-JITTER, JITTER + 1)
    things = list(product((*SHAPES, NEW_SHAPE), SIZES, offsets, offsets))
    middle = CENTRES[1]
    pictures = [paint([Thing(s, "red", size, middle + dx, middle + dy)]) for s, size, dx, dy in things]
    cells = nearest_colours(np.stack(pictures))[:, _span(middle), _span(middle)]
    return things, (cells > 0).astype(np.int64).reshape(len(things), -1)


def heard(sound: NDArray[np.float32]) -> list[str]:
    """What float32[n] at 16 kHz tells, in its order: ["big red circle", ..]; "" in the place of what is no thing."""
    pieces, at = _pieces(), 0
    found: list[str] = []
    while at < len(sound):
        likeness = {name: _correlation(sound[at : at + len(piece)], piece) for name, piece in pieces.items()}
        best = max(likeness, key=lambda name: likeness[name])
        if likeness[best] < ALOUD:
            return [*found, ""]
        found.append(best)
        at += len(pieces[best]) + round(GAP * RATE)
    return found


@cache
def _pieces() -> dict[str, NDArray[np.float32]]:
    kinds = product((*SHAPES, NEW_SHAPE), COLOURS, SIZES)
    return {f"{size} {colour} {shape}": tone(Thing(shape, colour, size, 0, 0)) for shape, colour, size in kinds}


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    if len(a) < len(b) or not a.any():
        return 0.0
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def is_true(caption: str, things: list[Thing]) -> bool:
    """Whether a caption names just these things, in whatever order, and all that it claims of them holds."""
    listed, *claims = caption.split("; ")
    named = [match.group(1, 2) for match in THING.finditer(listed)]
    if sorted(named) != sorted((t.size, t.name) for t in things):
        return False
    by_name = {thing.name: thing for thing in things}
    for claim in claims:
        match = FACT.fullmatch(claim)
        if not match or not {match[1], match[4]} <= by_name.keys():
            return False
        if sorted(filter(None, match.group(2, 3))) != sorted(relations(by_name[match[1]], by_name[match[4]])):
            return False
    return True


def claims(caption: str, things: list[Thing]) -> list[tuple[int, int, bool]]:
    """What a caption says, claim by claim: its first character, the one behind its last, and whether it holds."""
    by_name = {thing.name: thing for thing in things}
    found = []
    for match in THING.finditer(caption):
        named = by_name.get(match[2])
        found.append((*match.span(), named is not None and named.size == match[1]))
    for match in FACT.finditer(caption):
        holds = {match[1], match[4]} <= by_name.keys()
        said = sorted(filter(None, match.group(2, 3)))
        holds = holds and said == sorted(relations(by_name[match[1]], by_name[match[4]]))
        found.append((*match.span(), holds))
    return found
