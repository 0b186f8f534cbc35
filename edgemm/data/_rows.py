"""Rows of a data file as {column: value}, values as the file has them; see manifest.py for what columns mean.

JSON, CSV and tars are not read through the `datasets` library: it makes a date of the text 2020-01-01, 7 of the id
007, nothing of the answers None and NA, shifts the columns of a CSV row that is too long, names no line, and wants
the same members for each sample of a tar.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgemm.console import log
from edgemm.errors import InputError, ToolchainError

MEDIA = ("image", "audio")
LABELS = ("label", "answer", "caption", "transcript")
TEXTS = ("text", *LABELS, "boxes", "split", "id", "kind")
MEMBERS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp"), "image"),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg"), "audio"),
    **{name: name for name in (*TEXTS, "json")},
    "txt": "text",
    "cls": "label",
}
INSTALL = "pip install 'edgemm[compress]'"
Row = dict[str, Any]
NAMED = 10  # broken rows in the log


def read_rows(path: Path) -> list[Row]:
    """The rows of `path`, read by its suffix. Raises InputError."""
    readers = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".tar": _tar}
    if path.is_dir():
        rows = _directory(path)
    elif not path.is_file():
        raise InputError(f"no data file {path}", fix="give the path of a file or directory that is there")
    elif path.suffix.lower() in readers:
        rows = readers[path.suffix.lower()](path)
    else:
        raise InputError(
            f"{path}: unknown extension {path.suffix!r}",
            fix=f"use one of {', '.join(readers)}, or a directory that datasets' save_to_disk wrote",
        )
    if not rows:
        raise InputError(f"{path} has no rows", fix="give rows to calibrate on and to verify with")
    return rows


def tolerate(path: Path, broken: list[str], total: int, tolerance: float) -> None:
    """Log the first broken rows; InputError when they are more than is tolerated."""
    if not broken:
        return
    log(f"{path}: {len(broken)} of {total} rows can't be used: {'; '.join(broken[:NAMED])}")
    if len(broken) / total > tolerance:
        raise InputError(
            f"{path}: {len(broken)} of {total} rows can't be used, first {broken[0]}",
            fix=f"correct them, leave them out, or accept more: data_tolerance in the recipe, now {tolerance}",
        )


def _known(path: Path, names: Iterable[str]) -> list[str]:
    """The columns that mean something; the log names the others. InputError where there is no input, or two answers."""
    names = list(dict.fromkeys(names))
    known = [name for name in names if name in MEDIA or name in TEXTS]
    if names and not set(known) & {*MEDIA, "text"}:
        raise InputError(f"{path} has the columns {', '.join(names)}", fix="name one of them image, audio or text")
    if len(labels := [name for name in known if name in LABELS]) > 1:
        raise InputError(f"{path} has {' and '.join(labels)}", fix="keep the one that says what is right")
    if ignored := [name for name in names if name not in known]:
        log(f"{path}: columns that are not used: {', '.join(ignored)}")
    return known


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {path}: {e}", fix="give a readable file in UTF-8") from e


def _parse(text: str, where: str, line: int = 1) -> Any:
    """The value of a JSON text whose first line is `line` of the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        offset = getattr(e, "lineno", 1) - 1
        shown = text.split("\n")[offset][:80]
        raise InputError(
            f"{where}: line {line + offset}: {getattr(e, 'msg', e)}: {shown!r}", fix="write one JSON object a line"
        ) from e


def _json(path: Path) -> list[Row]:
    """JSON Lines, or one list of objects."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        found = [(f"item {n}", row) for n, row in enumerate(_parse(text, str(path)), 1)]
    else:  # not splitlines(), which splits at the U+2028 of a text, too
        lines = enumerate(text.split("\n"), 1)
        found = [(f"line {n}", _parse(line, str(path), n)) for n, line in lines if line.strip()]
    for where, row in found:
        if not isinstance(row, dict):
            raise InputError(f"{path}: {where} is {row!r:.80}", fix='write an object: {"image": .., "text": ..}')
    _known(path, (name for _, row in found for name in row))
    return [row for _, row in found]


def _csv(path: Path) -> list[Row]:
    """Comma-separated, with a header; an empty field is none."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows = []
    try:
        header = list(reader.fieldnames or ())
        _known(path, header)
        if len(set(header)) < len(header):
            raise InputError(f"{path} has a column twice: {', '.join(header)}", fix="name each column once")
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}: line {reader.line_num} has not the {len(header)} fields of the header",
                    fix='put a text with commas in quotes: "red, green"',
                )
            rows.append({name: value or None for name, value in row.items()})
    except csv.Error as e:
        raise InputError(f"{path}: line {reader.reader.line_num}: {e}", fix='quote a text as "say ""hi"""') from e
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        from datasets import Features
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise ToolchainError("the datasets library is not installed", fix=INSTALL) from e
    try:
        with ParquetFile(path) as file:
            table = file.read(columns=_known(path, file.schema_arrow.names))
        return _named(table, Features.from_arrow_schema(table.schema))
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise InputError(f"cannot read {path}: {e}", fix="give a whole Parquet file") from e


def _directory(path: Path) -> list[Row]:
    """What `save_to_disk` of a Dataset wrote, or of a DatasetDict, whose keys become a column `split`.

    It is mapped, not copied: no cache is made, and nothing but these files is asked.
    """
    try:
        import pyarrow
        from datasets import load_from_disk
    except ImportError as e:
        raise ToolchainError("the datasets library is not installed", fix=INSTALL) from e
    rows: list[Row] = []
    try:
        found = load_from_disk(str(path))
        for split, part in found.items() if isinstance(found, dict) else [("", found)]:
            part = part.select_columns(_known(path / split, part.column_names))
            named = _named(part.with_format("arrow")[:], part.features)
            rows += [{"split": split, **row} for row in named] if split else named
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"cannot read {path}: {e}", fix="give a directory that datasets' save_to_disk wrote") from e
    return rows


def _named(table: Any, features: dict[str, Any]) -> list[Row]:
    """Rows of an Arrow table: media as bytes, the numbers of a ClassLabel as its names."""
    rows: list[Row] = table.to_pylist()
    for column, feature in features.items():
        if names := getattr(feature, "names", None):
            for row in rows:
                number = row[column]
                row[column] = names[number] if number is not None and 0 <= number < len(names) else None
    return rows


def _tar(path: Path) -> list[Row]:
    """WebDataset: members of one name but for the extension make a row. They are read, never extracted."""
    samples: dict[str, Row] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                base, _, extension = name.partition(".")
                content = tar.extractfile(member) if base and extension and member.isreg() else None
                if content is None:
                    continue
                row = samples.setdefault(folder + slash + base, {})
                column = MEMBERS.get(extension.lower(), extension)
                if column in row:
                    raise InputError(f"{path}: {member.name} is a second {column}", fix="keep one of them")
                row[column] = content.read() if extension.lower() in MEMBERS else None
    except (tarfile.TarError, OSError) as e:
        raise InputError(f"cannot read {path}: {e}", fix="give a whole tar, not compressed") from e
    rows = [_fields(row, key, f"{path}: {key}") for key, row in samples.items()]
    _known(path, (name for row in rows for name in row))
    return rows


def _fields(members: Row, key: str, where: str) -> Row:
    """A tar's members as columns; what .json says but for media is added, and yields to members."""
    try:
        texts = {n: v.decode().strip() for n, v in members.items() if n not in MEDIA and v is not None}
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: {e}", fix="write texts in UTF-8") from e
    said = _parse(texts.pop("json", "{}"), f"{where}.json")
    if not isinstance(said, dict):
        raise InputError(f"{where}.json is {said!r:.80}", fix='write an object: {"label": ..}')
    said = {name: value for name, value in said.items() if name not in MEDIA}
    return {"id": key, **said, **{name: value for name, value in members.items() if name != "json"}, **texts}
