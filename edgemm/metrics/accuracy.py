"""Share of right labels."""

from __future__ import annotations

import numpy as np

from edgemm.metrics._answers import Outputs, Targets, Values, answers, labels_required

UNIT = "share"
OUTPUTS = ("labels",)


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """1 where the best label is the target. InputError when a target is missing or none is a label."""
    truth = labels_required(outputs, targets)
    return np.array([a == t for a, t in zip(answers(outputs), truth, strict=True)], np.float64)
