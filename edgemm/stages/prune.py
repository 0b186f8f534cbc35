"""Prune: the recipe's passes, one after the other, on the torch model; smaller shapes, not masks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.data import split
from edgemm.models import AttentionBlock, find_family, is_torch, read_model, sizes
from edgemm.models._calibration import Calibration
from edgemm.models._hidden_units import that_run
from edgemm.recipe import Recipe
from edgemm.recovery import check, recover
from edgemm.report.schema import Layer, Pruning, Units


def prune(source: Artifact, recipe: Recipe, runs: Path) -> Artifact:
    """Apply the recipe's pruners to the model of `source`; without any, or without torch modules, `source` itself.

    With `recover` in the recipe, the pruned model then learns from `source`; InputError where it can't.
    The artifact holds model/, smaller, program.json, and pruning.json (report/schema.py: Pruning).
    """
    torch_modules = is_torch(source.path / "model")
    if recipe.recover:
        check(recipe, source.json("program.json")["output"]["kind"], torch_modules)
    if not recipe.prune or not torch_modules:
        return source
    passes = [
        (plugins.plugin("pruners", p.use), plugins.options("pruners", p.use, p.values, f"{recipe.name}: prune.{i}"))
        for i, p in enumerate(recipe.prune)
    ]

    def make(out: Path) -> None:
        directory = source.path / "model"
        family = find_family(directory)
        model = read_model(family, directory)
        before = family.attentions(model)
        size_before, keys_before = measured(family, model)
        hidden = {h.name: h.units for h in that_run(family, model)}
        calibration, _ = split(recipe, lambda: source.json("program.json"))
        queries = [s.query for s in calibration]
        kept = {name: list(range(n)) for name, n in ({b.name: b.heads for b in before} | hidden).items()}
        scores: dict[str, list[float]] = {}
        origin = {part: name for name, part in model.named_modules()}
        for module, options in passes:
            log(f"prune {recipe.model}: {module.__name__.rpartition('.')[2]} {options.model_dump_json()}")
            run = Calibration(family, model, directory, queries)
            names = {name: origin[part] for name, part in model.named_modules() if part in origin}
            for now, (score, stay) in module.prune(family, model, run, options).items():
                name = names[now]  # where blocks have left, the others have moved up
                if score:
                    scores.setdefault(name, score)
                kept[name] = [kept[name][i] for i in stay]
        family.save(model, out / "model", directory)
        program = {**source.json("program.json"), **family.program(model, out / "model")}
        (out / "program.json").write_text(json.dumps(program), encoding="utf-8")
        size_after, keys_after = measured(family, model)
        report = Pruning(
            layers=tuple(
                layer(b, scores.get(b.name), kept[b.name], keys_before.get(b.name), keys_after.get(b.name))
                for b in before
            ),
            hidden=tuple(Units(name=n, units_before=u, units_after=len(kept[n])) for n, u in hidden.items()),
            parameters_before=size_before[0],
            parameters_after=size_after[0],
            macs_before=size_before[1],
            macs_after=size_after[1],
            zero_weights=sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1),
        )
        (out / "pruning.json").write_text(report.model_dump_json(), encoding="utf-8")

    pruned = build(
        "pruned",
        runs,
        parents=[source],
        config={
            "passes": [
                {"use": p.use, **o.model_dump(mode="json")} for p, (_, o) in zip(recipe.prune, passes, strict=True)
            ]
        },
        tools=("torch", "transformers"),
        make=make,
    )
    return recover(pruned, source, recipe, recipe.recover, runs) if recipe.recover else pruned


def measured(family: ModuleType, model: Any) -> tuple[tuple[int, int], dict[str, int]]:
    """(parameters, multiply-adds) and how many keys each attention layer projects, of one input at its largest size."""
    keys: dict[str, int] = {}

    def see(name: str, _module: nn.Module, _inputs: object, projected: Tensor) -> None:
        keys[name] = projected.shape[-2]

    handles = [b.k.register_forward_hook(partial(see, b.name)) for b in family.attentions(model) if b.k]
    try:
        return sizes(family, model), keys
    finally:
        for handle in handles:
            handle.remove()


def layer(
    block: AttentionBlock, scores: list[float] | None, kept: list[int], keys_before: int | None, keys_after: int | None
) -> Layer:
    """A row of the pruning report: one link a head, since a layer has one modality edge."""
    return Layer(
        name=block.name,
        kind=block.kind,
        queries=block.queries,
        keys=block.keys,
        links_before=block.heads,
        links_after=len(kept),
        heads_before=block.heads,
        heads_after=len(kept),
        keys_before=keys_before,
        keys_after=keys_after,
        scores=None if scores is None else tuple(scores),
        kept=tuple(kept),
    )
