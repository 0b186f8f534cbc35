"""How wide each layer stays, so that a speed-up is reached at the least loss, by latencies measured on the target.

Each attention layer at each number of heads, and each block at each number of hidden units, is a graph of its own that
is timed once; what the answers lose by it is measured with that layer alone cut and repaired. What to cut is then a
knapsack. After ZipLM (Kurtic et al., NeurIPS 2023, arXiv 2302.04089), which takes the error of the layer for its loss.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgemm.artifact import Artifact, build
from edgemm.console import log, progress
from edgemm.data import split
from edgemm.errors import InputError, VerdictError
from edgemm.graph.timing import Shape, measure
from edgemm.host import host
from edgemm.recipe import Recipe, Use
from edgemm.runtime.session import open_directory
from edgemm.stages.compile import compile_engine
from edgemm.stages.export import export
from edgemm.target import Target

if TYPE_CHECKING:
    from edgemm.models._calibration import Calibration

LEVELS, MULTIPLE = 8, 16  # widths that are tried; those of hidden units are whole vectors of 16 floats
SAMPLES = 32  # on which the answers are compared
STEPS = 2000  # into which the time to be saved is divided


@dataclass(frozen=True, slots=True)
class Choice:
    """A width of a layer: what it saves, as a share of the model's latency, and what the answers lose."""

    width: int
    saved: float
    loss: float


def search(source: Artifact, recipe: Recipe, target: Target, runs: Path) -> Recipe:
    """The recipe with a first pass `widths` that its `search` asks for; without one, the recipe itself.

    Raises InputError for a target that can't be timed here and a model without torch modules, and VerdictError when
    not even the narrowest cut reaches the speed-up.
    """
    if (wanted := recipe.search) is None:
        return recipe
    from edgemm.models import is_torch

    if target.backend != "openvino":
        raise InputError(f"search: target {target.name} is not timed on this host", fix="a target with openvino")
    if not is_torch(source.path / "model"):
        raise InputError(f"search: {recipe.model} came as a graph, which is not pruned", fix="remove search")
    table = latencies(source, recipe, target, runs).json("latencies.json")
    choices = {name: options(**layer) for name, layer in table.items()}
    keep = knapsack(choices, wanted.speedup, target.name)
    saved = sum(c.saved for name, row in choices.items() for c in row if c.width == keep[name])
    log(f"search: {wanted.speedup:g}x is asked, and {faster(saved):.2f}x is promised by the latencies of the layers")
    keep = {name: width for name, width in keep.items() if width < max(table[name]["widths"])}
    first = Use.model_validate({"use": "widths", "keep": keep, "repair": wanted.repair})
    return recipe.model_copy(update={"prune": (first, *recipe.prune)})


def latencies(source: Artifact, recipe: Recipe, target: Target, runs: Path) -> Artifact:
    """latencies.json, by layer: its `widths`; `share` of the FP32 model's latency, and `loss`, of each."""

    def make(out: Path) -> None:
        session = open_directory(compile_engine(export(source, recipe.export, runs), target, "f32", runs).path)
        layers, losses = describe(source, recipe)
        log(f"search: {len(layers)} layers of {len({s for s, _ in layers.values()})} shapes are timed")
        calibration, _ = split(recipe, lambda: session.program)
        tensors = session.tensors(calibration[0].query)
        table = measure(layers.values(), target.threads, lambda: session.infer(tensors))
        rows = {
            name: {"widths": widths, "share": [table[shape, w] for w in widths], "loss": losses[name]}
            for name, (shape, widths) in layers.items()
        }
        (out / "latencies.json").write_text(json.dumps(rows), encoding="utf-8")

    return build(
        "latencies",
        runs,
        parents=[source],
        config={
            "calibration": recipe.calibration,
            "seed": recipe.seed,
            "target": {"threads": target.threads, "static": target.static},
            "host": host(),
        },
        tools=("torch", "transformers", "openvino"),
        make=make,
    )


def describe(source: Artifact, recipe: Recipe) -> tuple[dict[str, tuple[Shape, list[int]]], dict[str, list[float]]]:
    """Each layer that can shrink: (its shape, widths to try); and what the answers lose at each of these widths.

    Shapes are those of one input at its largest size. Raises InputError for a model whose answers are texts.
    """
    import torch
    from torch import nn

    from edgemm.models import find_family, read_model
    from edgemm.models._calibration import Calibration
    from edgemm.models._hidden_units import hidden_units

    directory = source.path / "model"
    family = find_family(directory)
    model = read_model(family, directory)
    heads = [b for b in family.attentions(model) if b.q and b.heads]
    units = hidden_units(model)
    seen: dict[nn.Module, tuple[int, ...]] = {}
    watched = [part for b in heads for part in b.linears[:2]] + [h.makes for h in units]
    handles = [m.register_forward_pre_hook(lambda m, args: seen.update({m: tuple(args[0].shape)})) for m in watched]
    with torch.inference_mode():
        for component in family.components(model):
            component.module(**component.example(batch=1))
    for handle in handles:
        handle.remove()
    found: dict[str, tuple[Shape, list[int]]] = {}
    for b in heads:
        q, k, _, _ = b.linears
        found[b.name] = ("attention", seen[q], seen[k], b.head_dim, b.kind == "cross"), levels(b.heads, 1)
    for h in units:
        shape: Shape = ("linear", seen[h.makes])
        if isinstance(h.makes, nn.Conv2d) and isinstance(h.reads, nn.Conv2d):
            sides = [(c.kernel_size[0], c.stride[0], int(c.padding[0])) for c in (h.makes, h.reads)]
            shape = "convolution", seen[h.makes], *sides, h.reads.out_channels
        found[h.name] = shape, levels(h.units, MULTIPLE)
    calibration, _ = split(recipe, lambda: source.json("program.json"))
    data = Calibration(family, model, directory, [s.query for s in calibration])
    return found, losses(data, {name: widths for name, (_, widths) in found.items()})


def losses(data: Calibration, tried: dict[str, list[int]]) -> dict[str, list[float]]:
    """Mean squared change of the model's outputs with one layer at each width, the last of which is its whole."""
    from edgemm.pruners._calibration import grams
    from edgemm.pruners._scores import fisher
    from edgemm.pruners.widths import best, shrinkable

    layers = shrinkable(data.family, data.model)
    scores = fisher({n: (x.reads, x.units) for n, x in layers.items()}, data)
    found = grams({n: x.reads for n, x in layers.items()}, data)
    few = replace(data, queries=data.queries[:SAMPLES])

    def answers(of: Calibration) -> NDArray[np.float64]:
        rows = [v.reshape(len(v), -1) for v in of().values() if v.dtype.kind == "f"]
        if not rows:
            raise InputError(
                "search: the model's answers are no numbers of one size that could be compared",
                fix="remove search, and give the pass widths",
            )
        return np.concatenate(rows, 1, dtype=np.float64)

    whole = answers(few)
    lost: dict[str, list[float]] = defaultdict(list)
    for name, width in progress([(n, w) for n, widths in tried.items() for w in widths[:-1]], "widths tried"):
        trial = copy.deepcopy(data.model)
        shrinkable(data.family, trial)[name].shrink(best(scores[name], width), found[name])
        lost[name].append(float(np.square(answers(replace(few, model=trial)) - whole).mean()))
    return {name: [*lost[name], 0.0] for name in tried}


def levels(units: int, multiple: int) -> list[int]:
    """Widths to try of so many units, the last of which is all of them."""
    wanted = (round(units * i / LEVELS / multiple) * multiple for i in range(1, LEVELS))
    return sorted({w for w in wanted if 0 < w < units} | {units})


def options(widths: list[int], share: list[float], loss: list[float]) -> list[Choice]:
    """What each width of a layer saves and loses."""
    return [Choice(w, max(share) - took, lost) for w, took, lost in zip(widths, share, loss, strict=True)]


def faster(saved: float) -> float:
    """The speed-up of saving such a share of the latency."""
    return 1 / max(1 - saved, 1e-3)


def knapsack(choices: dict[str, list[Choice]], speedup: float, where: str) -> dict[str, int]:
    """Name -> width of each layer, of least loss in sum, with which the whole is so much faster.

    Dynamic programming over the share saved, in STEPS; each saving is rounded down.
    Raises VerdictError that says how far it got when nothing reaches the speed-up.
    """
    asked = 1 - 1 / speedup
    best: NDArray[np.float64] = np.full(STEPS + 1, np.inf)
    best[0] = 0.0
    taken: list[NDArray[np.intp]] = []
    for row in choices.values():
        new, pick = np.full(STEPS + 1, np.inf), np.zeros((STEPS + 1, 2), np.intp)
        for index, choice in enumerate(row):
            step = int(choice.saved / asked * STEPS)
            for before, loss in enumerate(best + choice.loss):
                after = min(before + step, STEPS)
                if loss < new[after]:
                    new[after], pick[after] = loss, (index, before)
        best = new
        taken.append(pick)
    if not np.isfinite(best[STEPS]):
        got = faster(sum(max(c.saved for c in row) for row in choices.values()))
        raise VerdictError(
            f"search: speedup = {speedup:g}: on {where} the narrowest layers give {got:.2f}x by their latencies",
            fix=f"ask for less than {got:.2f}, or let other passes (key_tokens, layers) and INT8 do the rest",
        )
    keep, at = {}, STEPS
    for (name, row), pick in zip(reversed(choices.items()), reversed(taken), strict=True):
        index, at = pick[at]
        keep[name] = row[index].width
    return keep
