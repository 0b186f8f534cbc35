"""Stacks of transformer blocks: lists of modules that one stream of states runs through, any of which may leave.

A block is found as what holds a feed-forward step (_hidden_units.py) and stands in a list with others that do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from edgemm.models._hidden_units import hidden_units


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks in the order they run.

    name    dotted path of the list in the model: block i is `name`.i
    layers  the list
    beside  what else has an entry for each block
    """

    name: str
    layers: nn.ModuleList
    beside: tuple[list[Any], ...] = ()

    def keep(self, blocks: list[int]) -> None:
        """Let the other blocks go, in place; those that stay move up, in their names too."""
        lists: tuple[Any, ...] = (self.layers, *self.beside)
        for entries in lists:
            left = [entries[i] for i in sorted(blocks)]
            del entries[:]
            entries.extend(left)


def stacks(model: nn.Module) -> list[Stack]:
    """All of a model. Of lists within lists (Swin's stages) only the innermost: between stages the shape changes."""
    steps = [f"{h.name}." for h in hidden_units(model) if h.norm is None]
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and all(any(step.startswith(f"{name}.{i}.") for step in steps) for i in range(len(module)))
    }
    columns = getattr(getattr(model, "config", None), "bias_heads", None)  # LayoutLMv3's, a list a block
    return [
        Stack(name, module, () if columns is None else (columns,))
        for name, module in lists.items()
        if len(module) and not any(other.startswith(f"{name}.") for other in lists if other != name)
    ]
