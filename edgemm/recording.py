"""What each component of a graph meets on calibration samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from edgemm.artifact import Artifact
from edgemm.console import log, progress
from edgemm.data import split
from edgemm.errors import InputError
from edgemm.recipe import Recipe
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import open_directory

STEPS = 4


def record(
    graph: Artifact, recipe: Recipe, wanted: set[str], judged_with: dict[str, Any] | None = None
) -> dict[str, list[Tensors]]:
    """The inputs of each component as the FP32 graph meets them on the calibration samples; none of unwanted ones.

    A decoder meets one input a token: STEPS of each sample are kept, spread over its length.

    judged_with   program.json with the shapes that a target fixes, to which shorter inputs are padded: the samples
                  that a search is judged on; None: those that give ranges
    """
    session = open_directory(graph.path, **({"components": judged_with["components"]} if judged_with else {}))
    session.exits = {}  # what only the unsure reach is to give ranges of all
    recorded: dict[str, list[Tensors]] = {name: [] for name in session.components}
    if not wanted:
        return recorded
    calibration, _ = split(recipe, lambda: graph.json("program.json"))
    if len(calibration) < recipe.calibration:
        log(f"calibration: {len(calibration)} samples, of {recipe.calibration} that the recipe asks for")
    held = spread(calibration, min(recipe.quantize.held if recipe.quantize else 0, len(calibration) // 2))
    ids = {s.id for s in held}
    calibration = held or calibration[:1] if judged_with else [s for s in calibration if s.id not in ids]
    for sample in progress(calibration, "calibration samples"):
        met: dict[str, list[Tensors]] = defaultdict(list)
        session.observe = lambda name, tensors, met=met: met[name].append(dict(tensors))
        tensors = session.tensors(sample.query)
        known = session.infer(tensors)
        if session.decoder in wanted:
            session.complete(tensors, sample.text)
        if broken := [n for n, v in known.items() if v.dtype.kind == "f" and np.isnan(v).any()]:
            raise InputError(
                f"calibration sample {sample.id}: the FP32 model makes NaN of it, first in {broken[0]}",
                fix="leave the row out; if all rows do so, the weights are broken",
            )
        for name in wanted:
            recorded[name] += met[name][:: max(1, len(met[name]) // STEPS)]
    if not_yet := {name for name in wanted if not recorded[name]}:
        # A graph of its own for each set of modalities: what no sample reaches, a part of one may.
        session.observe = lambda name, tensors: recorded[name].append(dict(tensors)) if name in not_yet else None
        for sample in calibration:
            for part in parts(session.tensors(sample.query), session.sources):
                session.infer(part)
    if unmet := sorted(name for name in wanted if not recorded[name]):
        ports = session.components[unmet[0]].spec["inputs"]
        raise InputError(
            f"none of {len(calibration)} calibration samples reaches {unmet[0]}: "
            f"it needs {', '.join(p['name'] for p in ports)}",
            fix=f"give rows with {' and '.join(session.sources)} in the train split",
        )
    return recorded


def parts(tensors: Tensors, sources: Mapping[str, set[str]]) -> list[dict[str, Any]]:
    """The tensors of each smaller set of a sample's modalities."""
    given = [names for names in sources.values() if names <= tensors.keys()]
    subsets = [subset for n in range(1, len(given)) for subset in combinations(given, n)]
    return [{name: tensors[name] for names in subset for name in names} for subset in subsets]


def spread(samples: Sequence[Any], n: int) -> list[Any]:
    """At most `n` of the samples, evenly spread."""
    step = max(1, len(samples) // max(1, n))
    return list(samples[step // 2 :: step])[:n]
