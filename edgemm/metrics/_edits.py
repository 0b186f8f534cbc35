"""Edit distances by jiwer as values of samples."""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgemm.errors import InputError, ToolchainError
from edgemm.metrics._answers import Values


def values(references: list[str], texts: list[str], unit: Literal["words", "characters"]) -> Values:
    """1 - errors * n / length of all references: the mean is 1 - the error rate of the corpus, exactly.

    references, texts   [n] normalised; InputError when there is nothing but empty references
    """
    try:
        import jiwer
    except ImportError as e:
        raise ToolchainError("jiwer is not installed", fix="pip install 'edgemm[compress]'") from e
    words = unit == "words"
    aligned = jiwer.process_words(references, texts) if words else jiwer.process_characters(references, texts)
    length = sum(map(len, aligned.references))
    if not length:
        raise InputError(f"the reference texts have no {unit}: all {len(references)} are empty", fix="give other data")
    errors = [
        sum(max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks if c.type != "equal")
        for chunks in aligned.alignments
    ]
    return 1 - np.array(errors, np.float64) * (len(errors) / length)
