"""Structured removal of hidden units: neurons of feed-forward blocks, channels inside ResNet's residual blocks.

Rows of the first layer and columns of the second really leave, from each block as many as it can spare.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from edgemm.models._hidden_units import HiddenUnits, matrix, that_run
from edgemm.pruners._calibration import grams, repair, watch
from edgemm.pruners._scores import fisher
from edgemm.pruners._selection import choose, matching
from edgemm.yaml_files import Strict


class Options(Strict):
    """`keep`: share of the units of all matched blocks that stays; every block keeps at least one.

    each      every block keeps that share of its own, the best of them: a channel of a convolution is read at every
            place of an image and saves more than its share
    multiple  each block is filled up to a multiple of so many units: engines pad to the width of a vector, and a
            convolution of 37 channels takes the time of one of 48 (16 floats in AVX-512)
    score   activation: on calibration data, mean |activation| x norm of the columns that read it; fisher: what the
            answers lose without the unit, by the gradient on calibration data; magnitude: norm of the row that makes
            a unit, its bias and what a batch norm makes of it x norm of those columns, no data
    layers  glob patterns over the names of the blocks; `edgemm inspect MODEL` lists them
    repair  correct what reads the units that stay by least squares on the calibration data
    """

    keep: float = Field(gt=0, le=1)
    score: Literal["activation", "fisher", "magnitude"] = "magnitude"
    layers: tuple[str, ...] = Field(("*",), min_length=1)
    multiple: int = Field(1, ge=1)
    repair: bool = False
    each: bool = False


def prune(
    family: ModuleType, model: Any, run: Callable[[], object], options: Options
) -> dict[str, tuple[list[float], list[int]]]:
    """Remove the lowest-scored units of the matched blocks in place -> name: (scores of all units, units kept).

    run   passes the calibration data through the model once
    Raises InputError when the model has no such block, or a pattern in `layers` matches none.
    """
    blocks = matching("neurons", that_run(family, model), options.layers)
    if options.score == "fisher":
        scores = fisher({b.name: (b.reads, b.units) for b in blocks}, run)
    else:
        scores = magnitude(blocks) if options.score == "magnitude" else activation(blocks, run)
    of_all = [scores[b.name] for b in blocks]
    if options.each:
        chosen = [units for of_one in of_all for units in choose([of_one], options.keep)]
    else:
        chosen = choose(of_all, options.keep)
    kept = [filled(scores[b.name], units, options.multiple) for b, units in zip(blocks, chosen, strict=True)]
    if options.repair and options.keep < 1:
        found = grams({b.name: b.reads for b in blocks}, run)
        for block, units in zip(blocks, kept, strict=True):
            repair(block.reads, units, block.per, found[block.name])
    for block, units in zip(blocks, kept, strict=True):
        block.keep(units)
    return {b.name: (scores[b.name], units) for b, units in zip(blocks, kept, strict=True)}


def filled(scores: list[float], kept: list[int], multiple: int) -> list[int]:
    """`kept` and the best of the others, up to a multiple or to all there are."""
    missing = -len(kept) % multiple
    others = sorted(set(range(len(scores))) - set(kept), key=lambda unit: -scores[unit])
    return sorted([*kept, *others[:missing]])


def columns(block: HiddenUnits) -> Tensor:
    """Norm of what reads each unit, float32[units]."""
    return matrix(block.reads).unflatten(1, (block.units, block.per)).norm(dim=(0, 2))


def magnitude(blocks: list[HiddenUnits]) -> dict[str, list[float]]:
    """Norm of the row that makes a unit x norm of the columns that read it."""

    def norms(block: HiddenUnits) -> Tensor:
        rows, bias = matrix(block.makes), block.makes.bias
        if bias is not None:
            rows = torch.cat([rows, block.makes.get_parameter("bias").detach()[:, None]], 1)
        made = rows.norm(dim=1)
        if norm := block.norm:
            made = made * norm.weight.detach().abs() / (norm.get_buffer("running_var") + norm.eps).sqrt()
        return made * columns(block)

    return {b.name: norms(b).tolist() for b in blocks}


def activation(blocks: list[HiddenUnits], run: Callable[[], object]) -> dict[str, list[float]]:
    """Mean |activation| x norm of the columns that read it."""
    sums = {b.name: torch.zeros(b.units) for b in blocks}
    counts = dict.fromkeys(sums, 0)
    convolutions = {b.name for b in blocks if b.norm is not None}

    def add(name: str, x: Tensor) -> None:
        x = (x.movedim(1, -1) if name in convolutions else x).abs().flatten(0, -2)
        sums[name] += x.sum(0)
        counts[name] += len(x)

    watch({b.name: b.reads for b in blocks}, add, run)
    return {b.name: (sums[b.name] / counts[b.name] * columns(b)).tolist() for b in blocks}
