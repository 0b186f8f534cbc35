"""Share of answers that are the FP32 model's own: what can be said without targets."""

from __future__ import annotations

import numpy as np

from edgemm.metrics._answers import Outputs, Targets, Values, answers
from edgemm.metrics._retrieval import nearest

UNIT = "share"
OUTPUTS = ("labels", "embeddings", "generation", "transcript")
NEEDS_TARGETS = False


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """1 where the best label, the text or the nearest item is FP32's; 0.5 where one direction's nearest is."""
    if "logits" in outputs:
        same = outputs["logits"].argmax(1) == reference["logits"].argmax(1)
    elif set(outputs) == {"text"}:
        same = np.array([a == b for a, b in zip(answers(outputs), answers(reference), strict=True)])
    else:
        one, other = sorted(outputs)
        directions = ((one, other), (other, one))
        same = np.mean([nearest(outputs, reference, *d) == nearest(reference, reference, *d) for d in directions], 0)
    return same.astype(np.float64)
