"""What the metrics share: the answers of a model, targets that are there, and texts made comparable."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError

Outputs: TypeAlias = Mapping[str, Any]
Targets: TypeAlias = Sequence["str | None"]
Values: TypeAlias = NDArray[np.float64]


def answers(outputs: Outputs) -> list[str]:
    """The best label, or the text, of each sample."""
    if "logits" in outputs:
        return [str(outputs["labels"][i]) for i in outputs["logits"].argmax(1)]
    return [str(text) for text in outputs["text"]]


def required(targets: Targets) -> list[str]:
    """The targets. InputError naming the first sample without one."""
    for i, target in enumerate(targets):
        if target is None:
            raise InputError(
                f"sample {i} has no target",
                fix="give every row its label, answer, caption or transcript, or measure agreement, which needs none",
            )
    return [str(target) for target in targets]


def labels_required(outputs: Outputs, targets: Targets) -> list[str]:
    """The targets of a classifier. InputError when none is among its labels: no model could lose on those."""
    truth, labels = required(targets), [str(label) for label in outputs["labels"]]
    if not set(truth) & set(labels):
        raise InputError(
            f"no target is one of the model's labels: {truth[0]!r} of sample 0 is none",
            fix=f"write targets as the model's config does: {', '.join(map(repr, labels[:5]))} ...",
        )
    return truth


def words_required(targets: Targets) -> list[str]:
    """The targets, normalised. InputError naming the first sample whose target has no word."""
    texts = [normalised(target) for target in required(targets)]
    for i, text in enumerate(texts):
        if not text:
            raise InputError(f"sample {i}: the target {targets[i]!r} has no word", fix="leave it out or transcribe it")
    return texts


def normalised(text: str) -> str:
    """Lower case, Unicode punctuation (categories P*) dropped, white space collapsed; the same for both sides.

    jiwer's ToLowerCase, RemovePunctuation and RemoveMultipleSpaces. Numbers and spelling stay as they are:
    error rates are higher than with Whisper's English normaliser.
    """
    return " ".join("".join(c for c in text.lower() if unicodedata.category(c)[0] != "P").split())
