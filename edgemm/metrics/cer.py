"""Character error rate of the corpus, of normalised texts; a space between words is a character."""

from __future__ import annotations

from edgemm.metrics import _edits
from edgemm.metrics._answers import Outputs, Targets, Values, answers, normalised, words_required

UNIT = "errors per character"
OUTPUTS = ("generation", "transcript")
ERROR = True


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """1 - character errors, each sample weighted by its characters. InputError when a target is missing or empty."""
    return _edits.values(words_required(targets), [normalised(text) for text in answers(outputs)], "characters")
