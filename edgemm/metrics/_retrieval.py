"""Retrieval of one modality by the other, among all samples.

Media that several samples share are one item: rows that are bit for bit the same in the FP32 model's outputs.
The judged model's own rows don't decide that, or one that maps everything to one point would always be right.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError
from edgemm.metrics._answers import Outputs, Targets, Values

BLOCK = 256


def recall(outputs: Outputs, reference: Outputs, targets: Targets, k: int) -> Values:
    """For each sample the mean over both directions of: a right item is among the k nearest, float64[n].

    Right is what shares a sample, or a target, with the query. Of equally near items the right one comes last.
    Raises InputError when there are too few items to miss one.
    """
    one, other = sorted(outputs)
    classes = first_rows(i if target is None else target for i, target in enumerate(targets))
    directions = ((one, other), (other, one))
    return np.mean([found(outputs, reference, classes, k, query, item) for query, item in directions], 0)


def found(
    outputs: Outputs, reference: Outputs, classes: NDArray[np.intp], k: int, query: str, item: str
) -> NDArray[np.bool_]:
    """Of each row's `query`: is a right `item`, one of the same row or class, among the k nearest? bool[n]."""
    asked, offered = items(reference[query]), items(reference[item])
    gallery = np.unique(offered)
    vectors = outputs[item][gallery]
    hit, wrong = np.zeros(len(asked), bool), 0
    queries = np.unique(asked)
    for row, scores in zip(queries, similarities(outputs[query][queries], vectors), strict=True):
        same = asked == row
        right = np.isin(gallery, offered[same | np.isin(classes, classes[same])])
        behind = int((scores[~right] < scores[right].max()).sum())
        hit[same] = (~right).sum() - behind < k
        wrong = max(wrong, int((~right).sum()))
    if wrong < k:
        raise InputError(
            f"recall at {k} with {len(gallery)} different {item}s to choose from: no model could miss",
            fix="give more verification samples, or measure recall at a smaller k",
        )
    return hit


def nearest(outputs: Outputs, reference: Outputs, query: str, item: str) -> NDArray[np.intp]:
    """The number of the item nearest to each query, intp[n]."""
    vectors = outputs[item][np.unique(items(reference[item]))]
    return np.array([scores.argmax() for scores in similarities(outputs[query], vectors)])


def similarities(queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Dot product of each query with all vectors, a few queries at a time: all at once may not fit."""
    for block in np.array_split(queries, len(queries) // BLOCK + 1):
        yield from block @ vectors.T


def items(rows: NDArray[np.float32]) -> NDArray[np.intp]:
    """The item that each row shows."""
    return first_rows(row.tobytes() for row in rows)


def first_rows(values: Iterable[Hashable]) -> NDArray[np.intp]:
    """Index of the first value that is equal, for each value."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(value, i) for i, value in enumerate(values)])
