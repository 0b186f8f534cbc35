"""Early exits: an answer that is sure enough where it is first made spares the rest of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgemm.runtime.query import Array, Tensors, activate


def exits(output: dict[str, Any]) -> dict[str, float]:
    """Tensor -> the least confidence with which it is the answer, of program.json's `output`."""
    return {e["tensor"]: e["confidence"] for e in output.get("exits", ())}


def leave(
    known: dict[str, Array], tensor: str, confidence: float, answer: str, go_on: Callable[[Tensors], dict[str, Array]]
) -> dict[str, Array] | None:
    """All tensors once the rows that are sure have their answer and the others have gone on; None where none is sure.

    known    tensors [B, ...];  tensor  logits [B,A] of the exit;  answer  the name that the answer goes by
    go_on    from the tensors of the unsure rows to all that the rest of the model makes of them
    """
    logits = known[tensor]
    sure = activate(logits, "softmax").max(-1) >= confidence
    if not sure.any():
        return None
    if sure.all():
        return {**known, answer: logits}
    made = logits.copy()
    made[~sure] = go_on({name: value[~sure] for name, value in known.items()})[answer]
    return {**known, answer: made}
