"""Data sets, one a file. Each has `samples(split) -> list[Sample]` for the splits "train" and "test".

Calibration, tuning and training read "train"; only verify and evaluate read "test".
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from edgemm import plugins
from edgemm.errors import InputError


@dataclass(frozen=True, slots=True)
class Sample:
    """One input with its answer.

    id     unique in its split
    group  samples of one group share media: the cluster of the paired bootstrap
    image  file of the image
    text   question
    label  the right answer
    kind   what sort of question it is, for tables
    """

    id: str
    group: str
    image: Path
    text: str
    label: str
    kind: str


def split(name: str, calibration: int, seed: int, limit: int | None) -> tuple[list[Sample], list[Sample]]:
    """(calibration, verification): a seeded draw from the train split; the first `limit` of the test split."""
    data = plugins.plugin("data", name)
    train, test = data.samples("train"), data.samples("test")
    if calibration > len(train):
        raise InputError(f"calibration = {calibration}: too many", fix=f"{name} has {len(train)} samples to train on")
    return random.Random(seed).sample(train, calibration), test[:limit]
