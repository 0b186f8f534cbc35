"""edgemm train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console
from edgemm.cli import assignments


def command(
    recipe: Annotated[str, typer.Option(help="Recipe with a train section, by name or file.")] = "reasoner-easy-vqa",
    data: Annotated[Optional[str], typer.Option(help="Data set by name. Default: the recipe's.")] = None,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="PATH=VALUE", help="Override one field, e.g. train.threads=1.")
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option("-o", "--output", help="Directory of model/, log.csv, checkpoint.pt.")] = Path(
        "trained"
    ),
    seed: Annotated[Optional[int], typer.Option(help="Seed. Default: the recipe's.")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A trial of two minutes, by the recipe's smoke section.")
    ] = False,
) -> None:
    """Train the reference model; the same command resumes an interrupted run.

    Prints the path of the model directory.
    """
    from edgemm.errors import InputError
    from edgemm.recipe import load_recipe

    overrides, _ = assignments(set_)
    overrides |= {k: v for k, v in {"data": data, "seed": seed}.items() if v is not None}
    chosen = load_recipe(recipe, overrides)
    if smoke:
        if not chosen.smoke:
            raise InputError(f"recipe {chosen.name} has no smoke section", fix="write what a trial overrides there")
        chosen = load_recipe(recipe, {**chosen.smoke, **overrides})

    from edgemm.pipeline import train
    from edgemm.reasoner.train import keep_freed_memory

    keep_freed_memory()
    console.result(str(train(chosen, out)))
