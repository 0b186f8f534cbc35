"""How wide each layer stays, so that a speed-up is reached at the least loss, by latencies measured on the target.

Each attention layer at each number of heads, and each block at each number of hidden units, is a graph of its own that
is timed once; what the answers lose by it is measured with that layer alone cut and repaired. What to cut is then a
knapsack. After ZipLM (Kurtic et al., NeurIPS 2023, arXiv 2302.04089), which takes the error of the layer for its loss.
How many image tokens stay is decided with it: fewer make the layers behind them cheaper, but choosing them costs time
of its own (arXiv 2407.05941 saw it cost more than it saved), so that the whole model is timed with each number.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemm.artifact import Artifact, build
from edgemm.console import log, progress
from edgemm.data import split
from edgemm.errors import InputError, VerdictError
from edgemm.graph.timing import Shape, measure, timed
from edgemm.host import host
from edgemm.recipe import Recipe, Use
from edgemm.runtime.session import open_directory
from edgemm.stages.compile import compile_engine
from edgemm.stages.export import export
from edgemm.stages.prune import prune
from edgemm.target import Target

if TYPE_CHECKING:
    from edgemm.models._calibration import Calibration

LEVELS, MULTIPLE = 8, 16  # widths that are tried; those of hidden units are whole vectors of 16 floats
TOKENS = (2, 4, 8)  # the whole number of image tokens is divided by each of these
SAMPLES = 32  # on which the answers are compared
STEPS = 2000  # into which the time to be saved is divided
TOKEN_ROW = "key_tokens"  # of the choices: the one number of image tokens that a table is about


@dataclass(frozen=True, slots=True)
class Choice:
    """A width of a layer: what it saves, as a share of the model's latency, and what the answers lose."""

    width: int
    saved: float
    loss: float


def search(source: Artifact, recipe: Recipe, target: Target, runs: Path) -> Recipe:
    """The recipe with the first passes that its `search` asks for; without one, the recipe itself.

    They are `widths`, and `key_tokens` before it where fewer tokens lose less than narrower layers.
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
    found: list[tuple[float, Recipe, str]] = []
    for tokens in (None, *fewer_tokens(source)) if wanted.key_tokens else (None,):
        first = () if tokens is None else (Use.model_validate({"use": "key_tokens", "keep": tokens}),)
        begun = prune(source, recipe.model_copy(update={"prune": first, "recover": None}), runs)
        table = latencies(begun, source, recipe, target, runs).json("latencies.json")
        layers: dict[str, Any] = table["layers"]
        choices = {name: options(**layer) for name, layer in layers.items()}
        choices |= {TOKEN_ROW: [Choice(tokens or 0, 1 - table["share"], table["loss"])]}
        try:
            keep = knapsack(choices, wanted.speedup, target.name)
        except VerdictError as e:
            short = e  # the fewest tokens come last, and get furthest
            continue
        taken = [c for name, row in choices.items() for c in row if c.width == keep[name]]
        keep = {name: keep[name] for name, layer in layers.items() if keep[name] < max(layer["widths"])}
        widths = (Use.model_validate({"use": "widths", "keep": keep, "repair": wanted.repair}),) if keep else ()
        said = f"{faster(sum(c.saved for c in taken)):.2f}x" + (f" with {tokens} image tokens" if tokens else "")
        passes = (*first, *widths, *recipe.prune)
        found.append((sum(c.loss for c in taken), recipe.model_copy(update={"prune": passes}), said))
    if not found:
        raise short
    _, best, said = min(found, key=lambda one: one[0])
    log(f"search: {wanted.speedup:g}x is asked, and {said} is promised by the latencies of the layers")
    return best


def fewer_tokens(source: Artifact) -> list[int]:
    """How many image tokens may stay, the most first. InputError for a model of which none can leave."""
    from edgemm.models import find_family, read_model

    family = find_family(source.path / "model")
    layers = family.token_layers(read_model(family, source.path / "model")) if hasattr(family, "token_layers") else []
    if not layers:
        name = family.__name__.rpartition(".")[2]
        raise InputError(f"search: no image tokens can leave this {name}", fix="search.key_tokens: false")
    return [layers[0].tokens // n for n in TOKENS if layers[0].tokens >= n]


def latencies(begun: Artifact, source: Artifact, recipe: Recipe, target: Target, runs: Path) -> Artifact:
    """latencies.json of `begun`, which is `source` or it with fewer tokens, as shares of the FP32 latency of `source`.

    share, loss   of `begun` as a whole, against the answers of `source`
    layers        name: `widths`; `share`, and `loss` against the answers of `begun`, of each
    """

    def make(out: Path) -> None:
        whole, less = (
            open_directory(compile_engine(export(x, recipe.export, runs), target, "f32", runs).path)
            for x in (source, begun)
        )
        layers, lost, loss = describe(begun, source, recipe)
        log(f"search: {len(layers)} layers of {len({s for s, _ in layers.values()})} shapes are timed")
        calibration, _ = split(recipe, lambda: whole.program)
        tensors = whole.tensors(calibration[0].query)
        base, took = timed([lambda: whole.infer(tensors), lambda: less.infer(tensors)])
        table = measure(layers.values(), target.threads, lambda: whole.infer(tensors))
        rows = {
            name: {"widths": widths, "share": [table[shape, w] for w in widths], "loss": lost[name]}
            for name, (shape, widths) in layers.items()
        }
        found = {"share": 1.0 if begun is source else took / base, "loss": loss, "layers": rows}
        (out / "latencies.json").write_text(json.dumps(found), encoding="utf-8")

    return build(
        "latencies",
        runs,
        parents=[begun, source],
        config={
            "calibration": recipe.calibration,
            "seed": recipe.seed,
            "target": {"threads": target.threads, "static": target.static},
            "host": host(),
        },
        tools=("torch", "transformers", "openvino"),
        make=make,
    )


def describe(
    begun: Artifact, source: Artifact, recipe: Recipe
) -> tuple[dict[str, tuple[Shape, list[int]]], dict[str, list[float]], float]:
    """Each layer that can shrink: (its shape, widths to try); what the answers lose at each; and have lost so far.

    Shapes are those of one input at its largest size. Raises InputError for a model whose answers are texts.
    """
    import torch
    from torch import nn

    from edgemm.models import find_family, read_model
    from edgemm.models._calibration import Calibration
    from edgemm.models._hidden_units import that_run

    directory = begun.path / "model"
    family = find_family(directory)
    model = read_model(family, directory)
    heads = [b for b in family.attentions(model) if b.q and b.heads]
    units = that_run(family, model)
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
    lost = losses(data, {name: widths for name, (_, widths) in found.items()})
    if begun is source:
        return found, lost, 0.0
    few = replace(data, queries=data.queries[:SAMPLES])
    wanted = answers(replace(few, model=read_model(family, source.path / "model")))
    return found, lost, change(answers(few), wanted)


def losses(data: Calibration, tried: dict[str, list[int]]) -> dict[str, list[float]]:
    """Mean squared change of the model's outputs with one layer at each width, the last of which is its whole."""
    from edgemm.pruners._calibration import grams
    from edgemm.pruners._scores import fisher
    from edgemm.pruners.widths import best, shrinkable

    layers = shrinkable(data.family, data.model)
    scores = fisher({n: (x.reads, x.units) for n, x in layers.items()}, data)
    found = grams({n: x.reads for n, x in layers.items()}, data)
    few = replace(data, queries=data.queries[:SAMPLES])
    whole = answers(few)
    lost: dict[str, list[float]] = defaultdict(list)
    for name, width in progress([(n, w) for n, widths in tried.items() for w in widths[:-1]], "widths tried"):
        trial = copy.deepcopy(data.model)
        shrinkable(data.family, trial)[name].shrink(best(scores[name], width), found[name])
        lost[name].append(change(answers(replace(few, model=trial)), whole))
    return {name: [*lost[name], 0.0] for name in tried}


def answers(of: Calibration) -> NDArray[np.float64]:
    """What the model answers, a row a sample. InputError where that is no numbers of one size."""
    rows = [v.reshape(len(v), -1) for v in of().values() if v.dtype.kind == "f"]
    if not rows:
        raise InputError(
            "search: the model's answers are no numbers of one size that could be compared",
            fix="remove search, and give the pass widths",
        )
    return np.concatenate(rows, 1, dtype=np.float64)


def change(now: NDArray[np.float64], whole: NDArray[np.float64]) -> float:
    """Mean squared difference. InputError where fewer image tokens have made the answers themselves fewer."""
    if now.shape != whole.shape:
        raise InputError(
            "search: the model's answers are a row for each image token, and fewer tokens leave others",
            fix="search.key_tokens: false",
        )
    return float(np.square(now - whole).mean())


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
