"""Structured removal of attention heads: q, k, v, o really shrink, each layer by as much as it can spare."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from edgemm.console import log
from edgemm.pruners._calibration import grams, repair
from edgemm.pruners._scores import attention, fisher, magnitude
from edgemm.pruners._selection import choose, matching, named
from edgemm.yaml_files import Strict


class Options(Strict):
    """`keep`: share of the heads of all matched layers that stays; every layer keeps at least one.

    score   attention: on calibration data, attention probability x norm of the value it carries to the
            residual stream (Kobayashi et al. 2020); fisher: what the answers lose without the head, by the gradient
            on calibration data (no right answers needed); magnitude: L2 norm of the head's weights, no data
    layers  glob patterns over the names of attention layers; `edgemm inspect MODEL` lists them
    repair  correct the output projections of the heads that stay by least squares on the calibration data
    """

    keep: float = Field(gt=0, le=1)
    score: Literal["attention", "fisher", "magnitude"] = "magnitude"
    layers: tuple[str, ...] = Field(("*",), min_length=1)
    repair: bool = False


def prune(
    family: ModuleType, model: Any, run: Callable[[], object], options: Options
) -> dict[str, tuple[list[float], list[int]]]:
    """Remove the lowest-scored heads of the matched layers in place -> name: (scores of all heads, heads kept).

    run   passes the calibration data through the model once
    Layers whose q, k and v are one matrix stay whole, and the log names them.
    Raises InputError when no layer can be pruned, or a pattern in `layers` matches none that can.
    """
    listed = family.attentions(model)
    matched = matching("attention_heads", [b for b in listed if b.q and b.heads], options.layers)
    if whole := [b.name for b in listed if not b.q and named(b, options.layers)]:
        log(f"attention_heads: q, k and v are no layers of their own, which stay whole: {', '.join(whole)}")
    if options.score == "fisher":
        scores = fisher({b.name: (b.linears[3], b.heads) for b in matched}, run)
    else:
        scores = magnitude(matched) if options.score == "magnitude" else attention(matched, run)
    kept = choose([scores[b.name] for b in matched], options.keep)
    if options.repair and options.keep < 1:
        found = grams({b.name: b.linears[3] for b in matched}, run)
        for block, heads in zip(matched, kept, strict=True):
            repair(block.linears[3], heads, block.head_dim, found[block.name])
    for block, heads in zip(matched, kept, strict=True):
        block.keep(heads)
    return {b.name: (scores[b.name], heads) for b, heads in zip(matched, kept, strict=True)}
