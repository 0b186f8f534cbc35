"""Structured removal of attention heads: q, k, v, o really shrink, each layer by as much as it can spare."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgemm.console import log
from edgemm.models import AttentionBlock
from edgemm.pruners._calibration import grams, not_reached, repair
from edgemm.pruners._selection import choose, matching, named
from edgemm.recipe import Strict


class Options(Strict):
    """`keep`: share of the heads of all matched layers that stays; every layer keeps at least one.

    score   attention: on calibration data, attention probability x norm of the value it carries to the
            residual stream (Kobayashi et al. 2020); magnitude: L2 norm of the head's weights, no data
    layers  glob patterns over the names of attention layers; `edgemm inspect MODEL` lists them
    repair  correct the output projections of the heads that stay by least squares on the calibration data
    """

    keep: float = Field(gt=0, le=1)
    score: Literal["attention", "magnitude"] = "magnitude"
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
    matched = matching("attention_heads", [b for b in listed if b.q], options.layers)
    if whole := [b.name for b in listed if not b.q and named(b, options.layers)]:
        log(f"attention_heads: q, k and v are no layers of their own, which stay whole: {', '.join(whole)}")
    scores = magnitude(matched) if options.score == "magnitude" else attention(matched, run)
    kept = choose([scores[b.name] for b in matched], options.keep)
    if options.repair and options.keep < 1:
        found = grams({b.name: b.linears[3] for b in matched}, run)
        for block, heads in zip(matched, kept, strict=True):
            repair(block.linears[3], heads, block.head_dim, found[block.name])
    for block, heads in zip(matched, kept, strict=True):
        block.keep(heads)
    return {b.name: (scores[b.name], heads) for b, heads in zip(matched, kept, strict=True)}


def magnitude(blocks: list[AttentionBlock]) -> dict[str, list[float]]:
    """L2 norm of all weights of each head."""

    def norms(block: AttentionBlock) -> Tensor:
        *inner, o = block.linears
        rows = [linear.weight.detach().unflatten(0, (block.heads, -1)).flatten(1) for linear in inner]
        columns = o.weight.detach().T.unflatten(0, (block.heads, -1)).flatten(1)
        return torch.cat([*rows, columns], 1).norm(dim=1)

    return {b.name: norms(b).tolist() for b in blocks}


@torch.inference_mode()
def attention(blocks: list[AttentionBlock], run: Callable[[], object]) -> dict[str, list[float]]:
    """Mean over queries of sum over keys of probability x ||W_o v||, for each head.

    The calibration data must come without padding: masks are not seen here.
    """
    sums = {b.name: torch.zeros(b.heads) for b in blocks}
    counts = dict.fromkeys(sums, 0)
    handles = []
    for block in blocks:
        seen: dict[str, Tensor] = {}

        def remember(part: str, seen: dict[str, Tensor], _m: nn.Module, _i: object, output: Tensor) -> None:
            seen[part] = output

        def add(b: AttentionBlock, seen: dict[str, Tensor], _m: nn.Module, _i: object) -> None:
            q, k, v = (seen[part].unflatten(-1, (b.heads, b.head_dim)).transpose(1, 2) for part in "qkv")
            probability = (q @ k.transpose(-1, -2) / b.head_dim**0.5).softmax(-1)
            o = b.linears[3].weight.T.unflatten(0, (b.heads, b.head_dim))
            carried = (v @ (o @ o.mT) * v).sum(-1, keepdim=True).clamp(min=0).sqrt()  # ||W_o v||, in H x d and not D
            sums[b.name] += (probability @ carried).sum((0, 2, 3))
            counts[b.name] += q.shape[0] * q.shape[2]

        *inner, o = block.linears
        for part, linear in zip("qkv", inner, strict=True):
            handles.append(linear.register_forward_hook(partial(remember, part, seen)))
        handles.append(o.register_forward_pre_hook(partial(add, block, seen)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if missed := [name for name, count in counts.items() if not count]:
        raise not_reached(missed)
    return {name: (total / counts[name]).tolist() for name, total in sums.items()}
