"""edgemm evaluate"""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    model: Annotated[str, typer.Argument(help="What compress takes, or an .edgemm file.")],
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME|FILE", help="Data set by name or file. Default: the bundle's, and easy_vqa for reasoner."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Accuracy (or what the model's task is judged by) on the verification split, overall and by kind of sample."""
    from edgemm.inspection import evaluate

    data = data or ("easy_vqa" if model == "reasoner" else None)
    rows = evaluate(model, data)
    if json:
        console.result_json({"model": model, "data": data, "accuracy": rows})
    else:
        ((metric, _),) = (pair for pair in rows["all"].items() if pair[0] != "n")
        table = ((name, int(row["n"]), f"{row[metric]:.4f}") for name, row in rows.items())
        console.table(f"{model} on the verification split of {data}", ("samples", "n", metric), table)
