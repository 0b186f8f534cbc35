"""Share of answers that are the target, but for case, punctuation and white space."""

from __future__ import annotations

import numpy as np

from edgemm.metrics._answers import Outputs, Targets, Values, answers, normalised, required

UNIT = "share"
OUTPUTS = ("labels", "generation", "transcript")


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """1 where the normalised answer is the normalised target. InputError when a target is missing."""
    pairs = zip(answers(outputs), required(targets), strict=True)
    return np.array([_comparable(a) == _comparable(t) for a, t in pairs], np.float64)


def _comparable(text: str) -> str:
    """Normalised; an answer of punctuation alone as it is."""
    return normalised(text) or text.strip()
