"""edgemm evaluate"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console

TRAINED_ON = {"reasoner": "easy_vqa"} | dict.fromkeys(("scenes_reasoner", "scenes_painter", "scenes_watcher"), "scenes")


def command(
    model: Annotated[str, typer.Argument(help="What compress takes, or an .edgemm file.")],
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME|FILE",
            help="Data set by name or file. Default: the bundle's, and what an embedded model was trained on.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    card: Annotated[
        Optional[Path], typer.Option(help="Write every figure of every task as a table of Markdown: scenes_reasoner.")
    ] = None,
) -> None:
    """Accuracy (or what the model's task is judged by) on the verification split, overall and by kind of sample.

    With --card every figure of a model of several tasks, or of bundles TASK.edgemm in a directory.
    """
    from edgemm.inspection import evaluate, score

    if card:
        from edgemm.artifact import write_atomic
        from edgemm.scorecard import markdown

        data = data or "scenes"
        figures = score(model, data)
        write_atomic(card, markdown(figures, data).encode())
        if json:
            console.result_json({"model": model, "data": data, "figures": [asdict(row) for row in figures]})
        else:
            columns = ("task", "figure", "n", "")
            console.table(f"{model} on {data}", columns, ((r.task, r.name, r.n, f"{r.value:.4f}") for r in figures))
        return
    data = data or TRAINED_ON.get(model)
    rows = evaluate(model, data)
    if json:
        console.result_json({"model": model, "data": data, "accuracy": rows})
    else:
        ((metric, _),) = (pair for pair in rows["all"].items() if pair[0] != "n")
        table = ((name, int(row["n"]), f"{row[metric]:.4f}") for name, row in rows.items())
        console.table(f"{model} on the verification split of {data}", ("samples", "n", metric), table)
