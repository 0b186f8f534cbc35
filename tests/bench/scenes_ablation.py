"""What each part of the scenes reasoner earns: the same short training with one part changed, side by side.

    .venv/bin/python tests/bench/scenes_ablation.py [--set PATH=VALUE]... [--only NAME]... [-o DIR]

Shares of 1 on held-out scenes. `--set train_scenes.scenes=12000` and the like make it longer; a run that was ended
goes on from its last epoch. "image missing" is what is left when a model is given the question and the sound alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgemm import console
from edgemm.cli import assignments
from edgemm.data import scenes
from edgemm.reasoner.scenes_train import train_scenes
from edgemm.reasoner.scenes_validation import by_subset, validate
from edgemm.reasoner.train import keep_freed_memory
from edgemm.recipe import load_recipe

MODEL = "train_scenes.model"
NO_CONTRAST = {"train_scenes.contrastive_weight": 0.0, "train_scenes.triplet_weight": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "(a) contrastive alone": {f"{MODEL}.alignment": []},
    "(b) attention alone": {f"{MODEL}.alignment": ["attention"], **NO_CONTRAST},
    "(c) graph alone": {f"{MODEL}.alignment": ["graph"], **NO_CONTRAST},
    "(a)+(b)": {f"{MODEL}.alignment": ["attention"]},
    "(a)+(c)": {f"{MODEL}.alignment": ["graph"]},
    "(a)+(b)+(c)": {f"{MODEL}.alignment": ["attention", "graph"]},
    "static fusion": {f"{MODEL}.fusion": "static"},
    "top 16 keys": {f"{MODEL}.top_k": 16},
}
SHORT = {
    "train_scenes.scenes": 3_000,
    "train_scenes.validation_scenes": 400,
    "train_scenes.alignment_epochs": 4,
    "train_scenes.reasoning_epochs": 6,
    "train_scenes.caption_epochs": 0,
    "train_scenes.caption_weight": 0.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--only", action="append", default=[], choices=list(VARIANTS))
    parser.add_argument("-o", "--output", type=Path, default=Path("ablation"))
    given = parser.parse_args()
    overrides, _ = assignments(given.set)
    keep_freed_memory()
    rows = []
    for name, changes in VARIANTS.items():
        if given.only and name not in given.only:
            continue
        recipe = load_recipe("reasoner-scenes", {**SHORT, **changes, **overrides})
        assert recipe.train_scenes
        model, corpus = train_scenes(scenes, recipe.train_scenes, recipe.seed, given.output / name.replace(" ", "-"))
        figures, subsets = validate(model, corpus), by_subset(model, corpus)
        shown = (
            figures.accuracy,
            figures.exit_1,
            figures.exit_2,
            figures.recall_at_1,
            figures.hard_negatives,
            figures.matching,
            subsets["text+image+audio"],
            subsets["text+audio"],
        )
        rows.append((name, *(f"{value:.3f}" for value in shown)))
    columns = ("", "QA", "level 1", "level 2", "recall@1", "hard negatives", "matching", "all", "image missing")
    console.table("the same training with one part changed", columns, rows)


if __name__ == "__main__":
    main()
