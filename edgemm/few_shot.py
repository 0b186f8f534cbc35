"""Few-shot learning from a user's data file: see runtime/few_shot.py for how."""

from __future__ import annotations

from pathlib import Path

from edgemm.data.manifest import read
from edgemm.errors import InputError
from edgemm.runtime.few_shot import Learned, learn
from edgemm.runtime.session import load_bundle


def learn_from_file(
    bundle: Path, data: Path, tensor: str | None, false_alarms: float, require_signature: Path | None
) -> Learned:
    """What the bundle learns from every row of `data`. InputError for rows that have no label or can't be used."""
    parts = read(data, tolerance=0.0)
    rows = [*parts["train"], *parts["test"]]
    labels = [row.label for row in rows if row.label is not None]
    if len(labels) < len(rows):
        first = next(row.id for row in rows if row.label is None)
        raise InputError(f"{data}: row {first} has no label", fix="give each example a label")
    session = load_bundle(bundle, require_signature=require_signature)
    return learn(session, [row.query for row in rows], labels, tensor, false_alarms)
