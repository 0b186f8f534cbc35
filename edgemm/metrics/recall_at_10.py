"""Recall at 10 of retrieval, both directions: see _retrieval.py."""

from __future__ import annotations

from edgemm.metrics._answers import Outputs, Targets, Values
from edgemm.metrics._retrieval import recall

UNIT = "share"
OUTPUTS = ("embeddings",)
NEEDS_TARGETS = False  # the pairs say what is right; samples with the same target are right for each other, too


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """1 where both directions find a right item among the 10 nearest, 0.5 where one does."""
    return recall(outputs, reference, targets, 10)
