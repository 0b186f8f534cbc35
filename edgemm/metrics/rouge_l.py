"""ROUGE-L of each text against its target: F-measure of the longest common subsequence of words."""

from __future__ import annotations

import re

import numpy as np

from edgemm.errors import InputError, ToolchainError
from edgemm.metrics._answers import Outputs, Targets, Values, answers, required

UNIT = "ROUGE-L, 0..1"
OUTPUTS = ("generation", "transcript")


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """ROUGE-L of each text (Lin 2004), lower case, no stemming.

    Raises InputError when a target is missing or has no word of a-z and 0-9, which are all that ROUGE sees.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as e:
        raise ToolchainError("rouge_score is not installed", fix="pip install 'edgemm[compress]'") from e
    truth = required(targets)
    for i, target in enumerate(truth):
        if not re.search("[a-z0-9]", target.lower()):
            raise InputError(f"sample {i}: the target {target!r} has no letter a-z and no digit", fix="use bleu or cer")
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(truth, answers(outputs), strict=True)
    return np.array([scorer.score(target, text)["rougeL"].fmeasure for target, text in pairs], np.float64)
