"""What pruning left of a model's shapes, as data, and a fresh model shrunk to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from edgemm.models import AttentionBlock
from edgemm.models._blocks import stacks
from edgemm.models._hidden_units import hidden_units

Attentions = Callable[[Any], list[AttentionBlock]]


def left(model: nn.Module, attentions: Attentions) -> dict[str, dict[str, int]]:
    """Blocks of each stack, heads of each attention layer, hidden units of each step, by name."""
    return {
        "blocks": {s.name: len(s.layers) for s in stacks(model)},
        "heads": {b.name: b.heads for b in attentions(model) if b.q is not None},
        "units": {h.name: h.units for h in hidden_units(model)},
    }


def shrink(model: nn.Module, attentions: Attentions, sizes: dict[str, dict[str, int]]) -> None:
    """Make a model, whole and with any weights, as small as `left` found one."""
    for stack in stacks(model):
        stack.keep(list(range(sizes["blocks"][stack.name])))
    for block in attentions(model):
        if (heads := sizes["heads"].get(block.name)) is not None:
            block.keep(list(range(heads)))
    for hidden in hidden_units(model):
        hidden.keep(list(range(sizes["units"][hidden.name])))
