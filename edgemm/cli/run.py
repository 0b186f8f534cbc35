"""edgemm run"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    image: Annotated[Optional[Path], typer.Option(help="Image file.")] = None,
    text: Annotated[Optional[str], typer.Option(help="Question, caption, or the words of a document.")] = None,
    audio: Annotated[Optional[Path], typer.Option(help="Audio file.")] = None,
    boxes: Annotated[
        Optional[str], typer.Option(help="For documents: a JSON list with [x0,y0,x1,y1] in 0..1000 for each word.")
    ] = None,
    require_signature: Annotated[
        Optional[Path], typer.Option(metavar="KEY", help="Refuse a bundle without a signature by this key.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer and what is behind it as JSON.")] = False,
) -> None:
    """Answer one input from a bundle, of whichever modalities its model takes; needs no torch.

    Every byte of the bundle is checked before anything in it is loaded.
    """
    from edgemm.runtime.preprocess import read_boxes
    from edgemm.runtime.session import load_bundle

    session = load_bundle(bundle, require_signature=require_signature)
    answer = session.run(image=image, text=text, audio=audio, boxes=None if boxes is None else read_boxes(boxes))
    if json:
        console.result_json(answer.as_json(session.output["kind"]))
    else:
        console.result(answer.answer if answer.answer is not None else answer.summary())
