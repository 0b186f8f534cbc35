"""edgemm run"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from edgemm import console

if TYPE_CHECKING:
    from edgemm.runtime.few_shot import FewShot
    from edgemm.runtime.query import Query
    from edgemm.runtime.session import Session


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    image: Annotated[Optional[Path], typer.Option(help="Image file, or a directory: each image in it.")] = None,
    text: Annotated[Optional[str], typer.Option(help="Question, caption, or the words of a document.")] = None,
    audio: Annotated[Optional[Path], typer.Option(help="Audio file, or a directory: each recording in it.")] = None,
    boxes: Annotated[
        Optional[str], typer.Option(help="For documents: a JSON list with x0, y0, x1, y1 in 0..1000 for each word.")
    ] = None,
    data: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="JSON Lines of inputs: image, audio, text, boxes, id; - is standard input."),
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option("-o", "--output", metavar="FILE", help="PNG of the picture, of models that paint.")
    ] = None,
    learned: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="Answer with what edgemm learn wrote, too.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print a generated text as it is made.")] = False,
    require_signature: Annotated[
        Optional[Path], typer.Option(metavar="KEY", help="Refuse a bundle without a signature by this key.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer and what is behind it as JSON.")] = False,
) -> None:
    """Answer one input from a bundle, of whichever modalities its model takes, or many; needs no torch.

    Every byte of the bundle is checked before anything in it is loaded.

    Of a directory or --data, a line of JSON is printed for each input, in order: which it is, and
    its answer, or `error` and `fix`. Exit code 2 says that one has an error; the others are
    answered all the same.
    """
    from edgemm.errors import InputError
    from edgemm.runtime.few_shot import FewShot, read_learned
    from edgemm.runtime.preprocess import read_boxes
    from edgemm.runtime.query import Query
    from edgemm.runtime.session import load_bundle

    query = Query(image, text, audio, None if boxes is None else read_boxes(boxes))
    many = data is not None or any(path is not None and path.is_dir() for path in (image, audio))
    if stream and (many or json or boxes is not None or learned is not None):
        raise InputError("--stream is for one text", fix="leave out --data, directories, --boxes, --learned and --json")
    if data is not None and query != Query():
        raise InputError("--data says what goes in", fix="leave out --image, --text, --audio and --boxes")
    if out is not None and (many or stream):
        raise InputError("--output is for one picture", fix="leave out --data, directories and --stream")
    session = load_bundle(bundle, require_signature=require_signature)
    if out is not None and not session.output.get("picture"):
        raise InputError(f"{bundle} makes no picture", fix="leave --output out")
    answering = session if learned is None else FewShot(session, read_learned(learned))
    if many:
        _lines(answering, query, data)
    elif stream:
        console.result_pieces(session.stream(image=image, text=text, audio=audio))
    else:
        answer = answering.answer(query)
        if out is not None:
            from edgemm.artifact import write_atomic
            from edgemm.runtime.pictures import png

            write_atomic(out, png(answer.outputs[session.output["picture"]["tensor"]]))
            answer = replace(answer, answer=str(out))
        if json:
            console.result_json(answer.as_json(answering.output["kind"]))
        else:
            console.result(answer.answer if answer.answer is not None else answer.summary())


def _lines(session: Session | FewShot, query: Query, data: Path | None) -> None:
    """Print the line of each input; InputError, after the last, where one has an error."""
    from edgemm.errors import InputError
    from edgemm.runtime.rows import answers, directory_rows, file_rows
    from edgemm.runtime.session import MAX_BATCH

    rows, count = (listed := directory_rows(query), len(listed)) if data is None else file_rows(data)
    total = failed = 0
    # From a pipe one by one: whoever writes it may wait for the answer.
    lines = answers(session, rows, MAX_BATCH if count else 1)
    for line in console.progress(lines, "inputs", count, printing=True):
        console.result_line(line)
        total, failed = total + 1, failed + ("error" in line)
    if failed:
        raise InputError(f"{failed} of {total} inputs have no answer", fix="see `error` and `fix` in their lines")
