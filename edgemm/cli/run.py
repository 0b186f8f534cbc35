"""edgemm run"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    image: Annotated[Path, typer.Option(help="Image file.")],
    text: Annotated[str, typer.Option(help="Question about the image.")],
    json: Annotated[bool, typer.Option("--json", help="Print answer and probability as JSON.")] = False,
) -> None:
    """Answer one question about one image from a bundle; needs no torch.

    Every byte of the bundle is checked before anything in it is loaded.
    """
    from edgemm.runtime.session import load_bundle

    answer = load_bundle(bundle).run(image=image, text=text)
    if json:
        console.result_json({"answer": answer.answer, "probability": round(answer.probability, 6)})
    else:
        console.result(answer.answer)
