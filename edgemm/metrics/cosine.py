"""Cosine similarity to the FP32 model's embeddings or features: what can be said without targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError
from edgemm.metrics._answers import Outputs, Targets, Values

UNIT = "cosine"
OUTPUTS = ("embeddings", "features")
NEEDS_TARGETS = False


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """Mean over tensors of the cosine of the sample's values, -1..1.

    Raises InputError when a tensor has another shape than FP32's, as after the removal of tokens.
    """
    for name in reference:
        if outputs[name].shape != reference[name].shape:
            raise InputError(
                f"{name} has the shape {outputs[name].shape}, and {reference[name].shape} in the FP32 model",
                fix="prune no tokens of it, or use another metric",
            )
    return np.mean([similarity(outputs[name], reference[name]) for name in reference], 0)


def similarity(a: NDArray[Any], b: NDArray[Any]) -> Values:
    """Cosine row by row, float64[n]; 1 for two rows of zeros, 0 for one."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    zeros = ~a.any(1) & ~b.any(1)
    return np.where(zeros, 1.0, (a * b).sum(1) / np.where(norms > 0, norms, 1.0))
