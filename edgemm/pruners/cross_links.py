"""Removal of links between modalities: heads of cross-attention, and the whole of a layer's where none is left.

A link is (layer, head, query modality -> key modality). It pays when it leaves the shapes: q, k, v and o lose its rows
and columns; where a layer has lost all its heads, none of the four is computed, and it adds the bias of o alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, model_validator

from edgemm.console import log
from edgemm.errors import InputError
from edgemm.models import AttentionBlock
from edgemm.pruners._calibration import grams, repair
from edgemm.pruners._scores import attention, fisher, magnitude
from edgemm.pruners._selection import matching, named
from edgemm.yaml_files import Strict

# tests/bench/merged_links.py, 40 words and 241 patches, width 768, 12 heads, OpenVINO f32, 2 threads.
MERGED = "to split the scores of text -> image off makes the attention layer 1.01x faster, of image -> text 0.99x"


class Options(Strict):
    """One of `keep`, the share of the links of each edge that stays, and `threshold`.

    threshold  a link goes when its score is under so many times the largest of its edge
    score      attention: magnitude of the link on calibration data, which `edgemm inspect --links` shows: mean
               attention probability x norm of the value it carries; fisher: what the answers lose without it, by the
               gradient on calibration data; magnitude: L2 norm of the head's weights, no data
    layers     glob patterns over the names of cross-attention layers
    repair     correct the output projections by least squares on the calibration data, the bias of one that loses
               all its heads too
    Scores are compared as they are among all layers of an edge, whose links all add to the same states. One link of
    each edge stays at least, else the model would no longer see the other modality.
    """

    keep: float | None = Field(None, gt=0, le=1)
    threshold: float | None = Field(None, ge=0, le=1)
    score: Literal["attention", "fisher", "magnitude"] = "attention"
    layers: tuple[str, ...] = Field(("*",), min_length=1)
    repair: bool = False

    @model_validator(mode="after")
    def one_of_both(self) -> Options:
        if (self.keep is None) == (self.threshold is None):
            raise ValueError("give one of keep (a share of the links) and threshold (a share of the largest score)")
        return self


def prune(
    family: ModuleType, model: Any, run: Callable[[], object], options: Options
) -> dict[str, tuple[list[float], list[int]]]:
    """Remove the links that carry least, in place -> name: (scores of all heads, heads kept).

    run   passes the calibration data through the model once
    Raises InputError where there is no cross-attention, or only such whose heads can't leave, with the reason, and
    for a pattern in `layers` that matches none.
    """
    blocks = crossing(family.attentions(model), options.layers)
    if options.score == "fisher":
        scores = fisher({b.name: (b.linears[3], b.heads) for b in blocks}, run)
    else:
        scores = magnitude(blocks) if options.score == "magnitude" else attention(blocks, run)
    kept: dict[str, list[int]] = {b.name: [] for b in blocks}
    for edge in dict.fromkeys((b.queries, b.keys) for b in blocks):
        all_ = [(s, b.name, h) for b in blocks if (b.queries, b.keys) == edge for h, s in enumerate(scores[b.name])]
        best = sorted(all_, key=lambda link: -link[0])
        if options.keep is not None:
            stay = best[: max(1, round(options.keep * len(best)))]
        else:
            assert options.threshold is not None
            stay = [link for link in best if link[0] >= options.threshold * best[0][0]]
        for _, name, head in stay:
            kept[name].append(head)
    less = [b for b in blocks if len(kept[b.name]) < b.heads]
    if options.repair and less:
        found = grams({b.name: b.linears[3] for b in less}, run)
        for block in less:
            repair(block.linears[3], kept[block.name], block.head_dim, found[block.name])
    if gone := [b.name for b in less if not kept[b.name]]:
        log(f"cross_links: no link is left in {', '.join(gone)}")
    for block in less:
        block.keep(kept[block.name])
    return {b.name: (scores[b.name], sorted(kept[b.name])) for b in blocks}


def crossing(listed: list[AttentionBlock], patterns: tuple[str, ...]) -> list[AttentionBlock]:
    """The cross-attentions with heads that can leave and a name that a pattern matches; InputError without any."""
    cross = [b for b in listed if b.kind == "cross"]
    merged = [b.name for b in listed if b.kind == "merged"]
    if merged and not cross:
        raise InputError(
            f"cross_links: {merged[0]} and {len(merged) - 1} more attend within one sequence of two modalities: "
            f"q, k and v serve every edge and stay, and {MERGED}",
            fix="prune heads (attention_heads), neurons, or whole blocks (layers)",
        )
    whole = [b.name for b in cross if not b.q]
    if whole and len(whole) == len(cross):
        raise InputError(
            f"cross_links: q, k and v of {', '.join(whole)} are one matrix, from which no head can leave",
            fix="remove this pass",
        )
    if stay := [b.name for b in cross if not b.q and named(b, patterns)]:
        log(f"cross_links: q, k and v are no layers of their own, which stay whole: {', '.join(stay)}")
    return matching("cross_links", [b for b in cross if b.q and b.heads], patterns)
