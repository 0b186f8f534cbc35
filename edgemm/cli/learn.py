"""edgemm learn"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="The examples: rows with image, audio or text, and a label.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where what was learned is written.")],
    tensor: Annotated[
        Optional[str], typer.Option(help="The output to tell labels apart by. Default: the logits, or the embedding.")
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(metavar="SHARE", help="Of known examples, how many may be taken for a label with few.")
    ] = 0.1,
    require_signature: Annotated[
        Optional[Path], typer.Option(metavar="KEY", help="Refuse a bundle without a signature by this key.")
    ] = None,
) -> None:
    """Learn new classes or answers from a few examples, for `edgemm run --learned`; needs no torch.

    Give all labels that are to be told apart, the known ones too, best with 100 examples each:
    they tell which differences don't count, and how far a label with fewer than 20 may reach.
    Nothing is trained and the bundle stays as it is: what is learned is a prototype a label.

    Exit codes: 0 done, 2 bad input.
    """
    from edgemm.few_shot import learn_from_file

    learned = learn_from_file(bundle, data, tensor, false_alarms, require_signature)
    learned.write(output)
    of = (f"{label} ({n})" for label, n in zip(learned.labels, learned.examples, strict=True))
    console.log(f"learned by {learned.tensor}, with so many examples: {', '.join(of)}")
    console.result(str(output))
