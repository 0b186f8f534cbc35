"""BLEU-4 of each text against its target, mean over sentences, as sacrebleu's defaults have it (13a, mixed case)."""

from __future__ import annotations

import numpy as np

from edgemm.errors import ToolchainError
from edgemm.metrics._answers import Outputs, Targets, Values, answers, required, words_required

UNIT = "BLEU, 0..1"
OUTPUTS = ("generation", "transcript")


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """Sentence BLEU of each text, smoothed (exp), orders that a short text lacks left out (Post 2018).

    Raises InputError when a target is missing or empty.
    """
    try:
        from sacrebleu import BLEU
    except ImportError as e:
        raise ToolchainError("sacrebleu is not installed", fix="pip install 'edgemm[compress]'") from e
    words_required(targets)
    bleu = BLEU(effective_order=True)
    pairs = zip(answers(outputs), required(targets), strict=True)
    return np.array([min(1.0, bleu.sentence_score(text, [target]).score / 100) for text, target in pairs], np.float64)
