"""edgemm compress"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console
from edgemm.cli import assignments


def command(
    model: Annotated[
        Optional[str],
        typer.Argument(
            help="reasoner, scenes_reasoner, scenes_painter, scenes_watcher, a model directory, an .onnx file or a "
            "directory of them, or package.module:factory. Default: the recipe's."
        ),
    ] = None,
    recipe: Annotated[
        Optional[str], typer.Option(help="Recipe by name or file. Default: the model family's, or `default`.")
    ] = None,
    target: Annotated[list[str], typer.Option(help="Target by name or file; may be repeated.")] = ["x86-openvino"],  # noqa: B006
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME|FILE|random:N",
            help="Data set by name, a JSON Lines, CSV, Parquet or .tar file, or noise for latency alone. "
            "Default: the recipe's.",
        ),
    ] = None,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Override one field, e.g. prune.0.keep=0.5 or target.threads=1."
        ),
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option("-o", "--output", help="Directory of the reports and bundles.")] = Path("out"),
    seed: Annotated[Optional[int], typer.Option(help="Seed. Default: the recipe's.")] = None,
    budget_minutes: Annotated[
        Optional[float],
        typer.Option(help="Search the form of each component (quantize.search) for at most so long."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print report.json on stdout.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo every stage, whatever an earlier run left.")] = False,
) -> None:
    """Prune, quantize, compile, prove and pack a model for one or more targets.

    Exit codes: 0 all targets pass, 2 bad input, 3 a toolchain is absent, 4 FAIL, 5 INCONCLUSIVE, or UNVERIFIED below
    the level that the target asks for.
    """
    from edgemm.recipe import default_recipe, load_recipe
    from edgemm.target import load_target

    of_recipe, of_target = assignments(set_)
    given = {"model": model, "data": data, "seed": seed, "quantize.search.budget_minutes": budget_minutes}
    of_recipe |= {k: v for k, v in given.items() if v is not None}
    chosen = load_recipe(recipe or default_recipe(model), of_recipe)
    targets = [load_target(t, of_target) for t in target]

    from edgemm.pipeline import compress
    from edgemm.report.markdown import comparison, row_cells
    from edgemm.verdict import raise_verdict

    report = compress(chosen, targets, out, fresh=fresh)
    if json:
        console.result_json(report.model_dump(mode="json", by_alias=True))
    else:
        for row in report.targets:
            title = f"{row.verdict}: {report.model} on {row.name}"
            console.table(title, ("", "FP32", "compressed", "change"), map(row_cells, comparison(row)))
            if row.level:
                console.result(f"level {row.level}. {row.established}")
            console.result(f"bundle: {row.bundle.path}" if row.bundle else "; ".join(row.notes))
    raise_verdict(report.targets)
