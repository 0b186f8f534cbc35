"""The only writer to stdout and stderr: the result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

_out = Console(soft_wrap=True, highlight=False, markup=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
T = TypeVar("T")


def log(message: str) -> None:
    """A line about what happens now, on stderr."""
    _err.print(message, style="dim")


def error(message: str) -> None:
    _err.print(f"error: {message}", style="red")


def result(text: str) -> None:
    """The result alone, on stdout."""
    _out.print(text)


def result_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def result_line(document: Any) -> None:
    """One line of JSON, at once."""
    line = json.dumps(document, ensure_ascii=False)
    if not line.isascii() and not _writable(line):
        line = json.dumps(document)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _writable(text: str) -> bool:
    """Not so half of a surrogate pair, and what the terminal's encoding has no letter for."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def result_pieces(pieces: Iterable[str]) -> None:
    """A text as it is made, and a line's end."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; the first column is left-aligned, the others right-aligned."""
    grid = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    _out.print(grid)


def progress(items: Iterable[T], what: str, total: int | None = None, *, printing: bool = False) -> Iterator[T]:
    """Iterate with a progress bar on stderr, drawn only on a TTY.

    total     how many there are, where `items` does not tell
    printing  results are printed meanwhile: no bar where they go to a TTY, too
    """
    if not _err.is_terminal or (printing and _out.is_terminal):
        yield from items
    else:
        yield from track(items, description=what, total=total, console=_err, transient=True)
