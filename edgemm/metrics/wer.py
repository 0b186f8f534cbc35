"""Word error rate of the corpus, of normalised texts."""

from __future__ import annotations

from edgemm.metrics import _edits
from edgemm.metrics._answers import Outputs, Targets, Values, answers, normalised, words_required

UNIT = "errors per word"
OUTPUTS = ("generation", "transcript")
ERROR = True


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """1 - word errors, each sample weighted by its words. InputError when a target is missing or empty."""
    return _edits.values(words_required(targets), [normalised(text) for text in answers(outputs)], "words")
