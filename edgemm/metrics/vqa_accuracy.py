"""VQA v2 accuracy: agreement with several people's answers, which the target separates by "|".

Antol et al. 2015, https://visualqa.org/evaluation.html: min(1, people who said so / 3), averaged over the sets
that leave one person out. With fewer than four answers the others must all agree, instead of three of them.
"""

from __future__ import annotations

import re

import numpy as np

from edgemm.errors import InputError
from edgemm.metrics._answers import Outputs, Targets, Values, answers, required

UNIT = "share"
OUTPUTS = ("labels", "generation")

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """Accuracy of each answer, 0..1. InputError when a target is missing or empty."""
    scores = []
    for i, (answer, target) in enumerate(zip(answers(outputs), required(targets), strict=True)):
        people = [normalised(a) for a in target.split("|") if a.strip()]
        if not people:
            raise InputError(
                f"sample {i}: the target {target!r} has no answer", fix="give people's answers: yes|yes|no"
            )
        scores.append(accuracy(normalised(answer), people))
    return np.array(scores, np.float64)


def accuracy(answer: str, people: list[str]) -> float:
    """Mean over people of min(1, others who said `answer` / 3)."""
    said = [a == answer for a in people]
    if len(said) == 1:
        return float(said[0])
    enough = min(3, len(said) - 1)
    return sum(min(1.0, (sum(said) - own) / enough) for own in said) / len(said)


def normalised(text: str) -> str:
    """As the VQA evaluation does it, on both sides: lower case, no punctuation or articles, number words as digits.

    Apostrophes go too, in place of its table of 120 contractions (dont: don't).
    """
    text = " ".join(text.lower().split()).replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    spaced = text
    for mark in PUNCTUATION:
        joins = f"{mark} " in spaced or f" {mark}" in spaced or re.search(r"\d,\d", spaced)
        text = text.replace(mark, "" if joins else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    return " ".join(DIGITS.get(word, word) for word in text.split() if word not in ARTICLES)
