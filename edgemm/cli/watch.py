"""edgemm watch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file of a model that watches.")],
    frames: Annotated[
        Path, typer.Argument(help="A directory of images in the order of their names, or one image of square frames.")
    ],
    text: Annotated[list[str], typer.Option(help="Question, asked after the last frame; may be given often.")],
    require_signature: Annotated[
        Optional[Path], typer.Option(metavar="KEY", help="Refuse a bundle without a signature by this key.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Answer questions on a video of any length from a bundle, in constant memory; needs no torch."""
    from edgemm.runtime.session import load_bundle
    from edgemm.runtime.watching import Watch, frames_of

    session = load_bundle(bundle, require_signature=require_signature)
    watch = Watch(session)
    watch.see(frames_of(frames, watch.side))
    answers = [watch.ask(question) for question in text]
    if json:
        rows = [{"text": t, **a.as_json("labels")} for t, a in zip(text, answers, strict=True)]
        console.result_json({"frames": watch.frames, "answers": rows})
    else:
        for answer in answers:
            console.result(str(answer.answer))
