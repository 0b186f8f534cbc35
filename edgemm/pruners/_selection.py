"""Which layers a pass is for, and which of their heads or units stay."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from edgemm.errors import InputError


class Named(Protocol):
    @property
    def name(self) -> str: ...


Block = TypeVar("Block", bound=Named)


def matching(pruner: str, blocks: Sequence[Block], patterns: Sequence[str]) -> list[Block]:
    """The blocks that a glob pattern names; InputError when there is none at all, or a pattern matches nothing."""
    if not blocks:
        raise InputError(f"{pruner}: the model has no layer that it could shrink", fix="remove this pass")
    for pattern in patterns:
        if not any(fnmatchcase(b.name, pattern) for b in blocks):
            raise InputError(
                f"{pruner}: no layer that it could shrink matches {pattern!r}",
                fix=f"layers: {', '.join(b.name for b in blocks)}",
            )
    return [b for b in blocks if named(b, patterns)]


def named(block: Named, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(block.name, p) for p in patterns)


def choose(scores: list[list[float]], keep: float) -> list[list[int]]:
    """The heads or units that stay, a list a layer: the best of each layer first, then the best of all.

    Scores are compared across layers as shares of their layer's mean, since layers differ in scale.
    """
    total = max(len(scores), round(keep * sum(map(len, scores))))
    best = [max(range(len(s)), key=s.__getitem__) for s in scores]
    rest = sorted(
        (-score / (mean or 1.0), layer, unit)
        for layer, s in enumerate(scores)
        for mean in [sum(s) / len(s)]
        for unit, score in enumerate(s)
        if unit != best[layer]
    )
    kept = [[unit] for unit in best]
    for _, layer, unit in rest[: total - len(scores)]:
        kept[layer].append(unit)
    return [sorted(k) for k in kept]
