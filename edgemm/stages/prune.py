"""Prune: the recipe's passes, one after the other, on the torch model; smaller shapes, not masks."""

from __future__ import annotations

import json
from pathlib import Path

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.data import split
from edgemm.models import AttentionBlock, find_family, is_torch, read_model, sizes
from edgemm.models._calibration import Calibration
from edgemm.models._hidden_units import hidden_units
from edgemm.recipe import Recipe
from edgemm.report.schema import Layer, Pruning, Units


def prune(source: Artifact, recipe: Recipe, runs: Path) -> Artifact:
    """Apply the recipe's pruners to the model of `source`; without any, or without torch modules, `source` itself.

    The artifact holds model/, smaller, program.json, and pruning.json (report/schema.py: Pruning).
    """
    if not recipe.prune or not is_torch(source.path / "model"):
        return source
    passes = [
        (plugins.plugin("pruners", p.use), plugins.options("pruners", p.use, p.values, f"{recipe.name}: prune.{i}"))
        for i, p in enumerate(recipe.prune)
    ]

    def make(out: Path) -> None:
        directory = source.path / "model"
        family = find_family(directory)
        model = read_model(family, directory)
        before, size_before = family.attentions(model), sizes(family, model)
        hidden = {h.name: h.units for h in hidden_units(model)}
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
        size_after = sizes(family, model)
        report = Pruning(
            layers=tuple(layer(b, scores.get(b.name), kept[b.name]) for b in before),
            hidden=tuple(Units(name=n, units_before=u, units_after=len(kept[n])) for n, u in hidden.items()),
            parameters_before=size_before[0],
            parameters_after=size_after[0],
            macs_before=size_before[1],
            macs_after=size_after[1],
            zero_weights=sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1),
        )
        (out / "pruning.json").write_text(report.model_dump_json(), encoding="utf-8")

    return build(
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


def layer(block: AttentionBlock, scores: list[float] | None, kept: list[int]) -> Layer:
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
        keys_before=block.heads * block.head_dim,
        keys_after=len(kept) * block.head_dim,
        scores=None if scores is None else tuple(scores),
        kept=tuple(kept),
    )
