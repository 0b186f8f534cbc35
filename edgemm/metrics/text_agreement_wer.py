"""Word error rate against the FP32 model's own text: what can be said without transcripts."""

from __future__ import annotations

from edgemm.metrics import _edits
from edgemm.metrics._answers import Outputs, Targets, Values, answers, normalised

UNIT = "errors per word"
OUTPUTS = ("generation", "transcript", "picture")
ERROR = True
NEEDS_TARGETS = False


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """1 - word errors, each sample weighted by its words; what is said where FP32 is silent counts as errors.

    Raises InputError when the FP32 model says nothing at all.
    """
    texts, own = ([normalised(text) for text in answers(o)] for o in (outputs, reference))
    return _edits.values(own, texts, "words")
