"""Many inputs out of a directory or of JSON Lines, and a line for each: its answer, or why there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from edgemm.errors import InputError
from edgemm.runtime.few_shot import FewShot
from edgemm.runtime.preprocess import read_boxes
from edgemm.runtime.query import Query, query_of
from edgemm.runtime.session import MAX_BATCH, Session

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".webp"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
}
MEDIA = ("image", "audio")


@dataclass(frozen=True, slots=True)
class Row:
    """One input, or what is wrong with it; `label` says which it is and begins its line."""

    label: dict[str, Any]
    query: Query | InputError


def directory_rows(query: Query) -> list[Row]:
    """A row for each image or recording of the directory that `query` names for its image or audio, in order of names.

    InputError where it names two, or one that holds none.
    """
    named = [(medium, folder) for medium in MEDIA if isinstance(folder := getattr(query, medium), Path)]
    folders = [(medium, folder) for medium, folder in named if folder.is_dir()]
    if len(folders) > 1:
        raise InputError("image and audio are both directories", fix="pair them in a JSON Lines file: --data FILE")
    ((medium, folder),) = folders
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES[medium])
    if not files:
        raise InputError(f"{folder} holds no {medium}", fix=f"files whose names end in {', '.join(SUFFIXES[medium])}")
    return [Row({medium: str(file)}, _with(query, {medium: file})) for file in files]


def file_rows(path: Path) -> tuple[Iterator[Row], int | None]:
    """The rows of a JSON Lines file, "-" being standard input, and its number of lines where it can be read twice."""
    if str(path) == "-":
        return json_rows(sys.stdin.buffer, Path()), None
    try:
        count = None
        if path.is_file():  # and no pipe, which is read once
            with path.open("rb") as lines:
                count = sum(1 for _ in lines)
        return json_rows(path.open("rb"), path.parent), count
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}", fix="give a JSON Lines file") from e


def json_rows(lines: Iterable[bytes], folder: Path) -> Iterator[Row]:
    """Rows out of JSON Lines: image and audio, files from `folder` unless absolute; text; boxes; id.

    What else is in a row means nothing. Empty lines are none. A row's label is the number of its line, and its id.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            label: dict[str, Any] = {"line": number}
            try:
                row = _object(line)
                label |= {"id": row["id"]} if "id" in row else {}
                yield Row(label, _query(row, folder))
            except InputError as e:
                yield Row(label, e)


def _object(line: bytes) -> dict[str, Any]:
    fix = "write an object a line: image, audio, text"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"the line is no JSON: {e}"[:200], fix=fix) from e
    if not isinstance(row, dict):
        raise InputError(f"the line is no object: {row!r}"[:200], fix=fix)
    return row


def _query(row: dict[str, Any], folder: Path) -> Query:
    given = {name: value for name in (*MEDIA, "text", "boxes") if (value := row.get(name)) not in (None, "")}
    if "boxes" in given:
        given["boxes"] = read_boxes(json.dumps(given["boxes"]))
    query = query_of(given)
    return _with(query, {name: folder / given[name] for name in MEDIA if name in given})


def _with(query: Query, files: Mapping[str, Path]) -> Query:
    return replace(query, **dict[str, Any](files))


def answers(session: Session | FewShot, rows: Iterable[Row], at_once: int = MAX_BATCH) -> Iterator[dict[str, Any]]:
    """The line of each row, in order: its label, then the answer, or `error` and `fix`.

    at_once  rows that are read before the first of them is answered
    """
    waiting = iter(rows)
    while chunk := list(islice(waiting, at_once)):
        good = [row.query for row in chunk if isinstance(row.query, Query)]
        answered = iter(_each(session, good))
        for row in chunk:
            found = row.query if isinstance(row.query, InputError) else next(answered)
            yield row.label | found if isinstance(found, dict) else row.label | _failure(found)


def _each(session: Session | FewShot, queries: list[Query]) -> list[dict[str, Any] | InputError]:
    """All together; one by one where one of them is at fault."""
    try:
        for query in queries:
            _check_files(query)
        found = session.run_many(queries) if queries else []
        return [answer.as_json(session.output["kind"]) for answer in found]
    except InputError as e:
        return [e] if len(queries) == 1 else [each for query in queries for each in _each(session, [query])]


def _check_files(query: Query) -> None:
    for medium in MEDIA:
        if isinstance(file := getattr(query, medium), Path) and not file.is_file():  # a pipe would never end
            raise InputError(
                f"cannot read {medium} {file}: no such file", fix="name a file, from the folder of the rows"
            )


def _failure(error: InputError) -> dict[str, str]:
    what, _, fix = str(error).partition("\n  fix: ")
    return {"error": what, "fix": fix}
