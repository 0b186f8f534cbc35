"""edgemm evaluate"""

from __future__ import annotations

from typing import Annotated

import typer

from edgemm import console


def command(
    model: Annotated[str, typer.Argument(help="reasoner, a model directory, or an .edgemm file.")],
    data: Annotated[str, typer.Option(help="Data set by name.")] = "easy_vqa",
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Accuracy of a model or a bundle on the test split, overall and by kind of question."""
    from edgemm.inspection import evaluate

    rows = evaluate(model, data)
    if json:
        console.result_json({"model": model, "data": data, "accuracy": rows})
    else:
        table = ((name, row["n"], f"{row['accuracy']:.4f}") for name, row in rows.items())
        console.table(f"{model} on the test split of {data}", ("questions", "n", "accuracy"), table)
