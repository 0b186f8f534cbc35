"""Removal of whole transformer blocks: those that turn the stream of states least on the calibration data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from edgemm.console import log
from edgemm.errors import InputError
from edgemm.models._blocks import Stack, stacks
from edgemm.models._hidden_units import running, that_run
from edgemm.pruners._calibration import not_reached
from edgemm.pruners._selection import matching
from edgemm.yaml_files import Strict


class Options(Strict):
    """One of `keep`, the share of the matched blocks that stays, and `drop`, how many of them go.

    layers  glob patterns over the names of blocks
    A block's score is 1 - cosine between the states that it is given and those that it makes, mean over calibration
    positions (block influence, Men et al. 2024, arXiv 2403.03853). Every stack of blocks keeps at least one.
    """

    keep: float | None = Field(None, gt=0, le=1)
    drop: int | None = Field(None, ge=0)
    layers: tuple[str, ...] = Field(("*",), min_length=1)

    @model_validator(mode="after")
    def one_of_both(self) -> Options:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("give one of keep (a share) and drop (a number of blocks)")
        return self


@dataclass(frozen=True, slots=True)
class Block:
    """Block `index` of `stack`."""

    name: str
    stack: Stack
    index: int

    @property
    def module(self) -> nn.Module:
        return self.stack.layers[self.index]


def prune(
    family: ModuleType, model: Any, run: Callable[[], object], options: Options
) -> dict[str, tuple[list[float], list[int]]]:
    """Remove the blocks that matter least -> name of each attention layer and hidden units in them: ([], []).

    run   passes the calibration data through the model once
    Raises InputError when the model has no block, a pattern in `layers` matches none, or so many can't go.
    """
    names = [b.name for b in family.attentions(model)] + [h.name for h in that_run(family, model)]
    called = running(family, model)
    found = [s for s in stacks(model) if all(called.intersection(block.modules()) for block in s.layers)]
    blocks = [Block(f"{s.name}.{i}", s, i) for s in found for i in range(len(s.layers))]
    matched = matching("layers", blocks, options.layers)
    if getattr(getattr(model, "config", None), "use_weighted_layer_sum", False):
        raise InputError(
            "layers: the model reads a weighted sum of all its layers (use_weighted_layer_sum), so none can go",
            fix="remove this pass",
        )
    left = {s.name: len(s.layers) for s in found}
    spare = sum(min(left[s.name] - 1, sum(b.stack is s for b in matched)) for s in found)
    if options.drop is not None and options.drop > spare:
        raise InputError(
            f"layers: drop = {options.drop}: of {len(matched)} blocks at most {spare} can go, one of each stack stays",
            fix=f"drop: {spare} or less",
        )
    wanted = options.drop
    if wanted is None:
        assert options.keep is not None
        wanted = min(spare, len(matched) - round(options.keep * len(matched)))
    if not wanted:
        return {}
    scores = influence(matched, run)
    gone: list[Block] = []
    for block in sorted(matched, key=lambda b: scores[b.name]):
        if len(gone) < wanted and left[block.stack.name] > 1:
            left[block.stack.name] -= 1
            gone.append(block)
    log(f"layers: removed {', '.join(f'{b.name} (turns the states by {scores[b.name]:.4f})' for b in gone)}")
    inside = [n for n in names if any(f"{n}.".startswith(f"{b.name}.") for b in gone)]
    for stack in found:
        stack.keep([i for i in range(len(stack.layers)) if not any(b.stack is stack and b.index == i for b in gone)])
    return {name: ([], []) for name in inside}


@torch.inference_mode()
def influence(blocks: list[Block], run: Callable[[], object]) -> dict[str, float]:
    """1 - cosine of the states before and after each block, mean over the positions that pass it.

    Decoders call a block's parts from a module of their own, which holds the block: it is watched in its place.
    """
    names = {b.module: b.name for b in blocks}
    sums = dict.fromkeys(names.values(), 0.0)
    counts = dict.fromkeys(names.values(), 0)

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        for part in (module, *module.children()):
            if (name := names.get(part)) is not None:
                before, after = inputs[0], output if isinstance(output, Tensor) else output[0]
                cosine = F.cosine_similarity(before, after, dim=-1)
                sums[name] += float((1 - cosine).sum())
                counts[name] += cosine.numel()

    handle = register_module_forward_hook(see)
    try:
        run()
    finally:
        handle.remove()
    if missed := [name for name, count in counts.items() if not count]:
        raise not_reached(missed)
    return {name: sums[name] / counts[name] for name in sums}
