"""A user's own data: JSON Lines, CSV, Parquet, a `datasets` directory or a WebDataset tar.

Columns; at least one of the first three:
    image, audio   file, from the manifest's folder unless absolute; Parquet, directories and tars hold bytes, too
    text           question, caption or words; an empty one is none
    label, answer, caption or transcript   what is right; a list of several right ones becomes "a|b"
    boxes          a box [x0,y0,x1,y1] in 0..1000 for each word of `text`; in CSV written as JSON
    split          train or calibration; validation, test or verification
    id             unique; without it the number of the row
    kind           what sort of row it is, for tables

The user wrote the file, so a path may lead anywhere on this machine; what it names is opened only as an image or a
recording, and a URL is no file.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from edgemm.console import progress
from edgemm.data import Sample
from edgemm.data._rows import LABELS, MEDIA, Row, read_rows, tolerate
from edgemm.errors import InputError, ToolchainError
from edgemm.runtime.audio import read_audio
from edgemm.runtime.preprocess import FORMATS, MAX_PIXELS

SPLITS = {"train": "train", "calibration": "train", "validation": "test", "test": "test", "verification": "test"}
CALIBRATION = 5  # one of so many groups of media calibrates
Boxes = tuple[tuple[int, int, int, int], ...]


class _Broken(Exception):
    """Why a row can't be used; such rows are counted."""


@dataclass(frozen=True, slots=True)
class _Usable:
    """A row that can be used; `media`: SHA-256 of its image and recording, or of its text."""

    sample: Sample
    media: tuple[str, ...]
    split: str | None
    where: str


def read(path: Path, tolerance: float) -> dict[str, list[Sample]]:
    """The samples to calibrate on ("train") and to verify with ("test"), each in the file's order.

    tolerance  largest share of rows with missing or broken media that is accepted; these rows are left out

    Samples that share an image, a recording or, where there is neither, a text are one group, and no group is
    in both parts. A column `split` decides; without one the digest of the group does, whatever the order of rows.
    Raises InputError.
    """
    rows = read_rows(path)
    folder = path if path.is_dir() else path.parent
    ids, splits = _ids(path, rows), _splits(path, rows)
    decoded: set[tuple[str, str]] = set()
    usable: list[_Usable] = []
    broken: list[str] = []
    for number, (row, name, split) in enumerate(zip(progress(rows, f"read {path.name}"), ids, splits, strict=True), 1):
        where = f"row {number}" if name == str(number) else f"row {number} ({name})"
        text = _text(row.get("text"), f"{path}: {where}: text") or ""
        kind = _text(row.get("kind"), f"{path}: {where}: kind") or ""
        label = _label(next((row[n] for n in LABELS if n in row), None), f"{path}: {where}: the label")
        try:
            media = {m: found for m in MEDIA if (found := _media(row.get(m), m, folder)) is not None}
            if not media and not text.strip():
                raise _Broken("no image, no audio and no text")
            digests = [_check(found, medium, decoded) for medium, found in media.items()]
            boxes = _boxes(row.get("boxes"), text)
        except _Broken as e:
            broken.append(f"{where}: {e}")
            continue
        sample = Sample(
            name, "", media.get("image"), text if text.strip() else None, label, kind, media.get("audio"), boxes
        )
        usable.append(_Usable(sample, tuple(digests) or (_sha256(text.encode()),), split, where))
    tolerate(path, broken, len(rows), tolerance)
    return _divide(path, usable)


def _ids(path: Path, rows: list[Row]) -> list[str]:
    """The id of each row, or its number; InputError where two have the same."""
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        name = _text(row.get("id"), f"{path}: row {number}: id") or str(number)
        if (other := first.setdefault(name, number)) != number:
            raise InputError(
                f"{path}: row {number} has the id {name!r} of row {other}", fix="give each row an id of its own"
            )
    return list(first)


def _splits(path: Path, rows: list[Row]) -> list[str | None]:
    """What the column `split` says of each row; None of all where there is no such column."""
    if not any("split" in row for row in rows):
        return [None] * len(rows)
    splits = [_text(row.get("split"), f"{path}: row {number}: split") for number, row in enumerate(rows, 1)]
    for number, split in enumerate(splits, 1):
        if split not in SPLITS:
            raise InputError(
                f"{path}: row {number}: split = {split!r}", fix=f"use {', '.join(SPLITS)} in every row, or no split"
            )
    return splits


def _divide(path: Path, usable: list[_Usable]) -> dict[str, list[Sample]]:
    """The two parts; InputError where the user's split has the same media in both."""
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    seen: dict[str, tuple[str, str]] = {}
    for row, group in zip(usable, _groups([row.media for row in usable]), strict=True):
        part = SPLITS[row.split] if row.split else ("test" if int(group, 16) % CALIBRATION else "train")
        for digest in row.media:
            other, where = seen.setdefault(digest, (part, f"{row.where} ({row.split})"))
            if other != part:
                raise InputError(
                    f"{path}: {row.where} ({row.split}) has the same media as {where}",
                    fix="give calibration and verification media of their own, or leave the split out",
                )
        parts[part].append(replace(row.sample, group=group[:16]))
    return parts


def _groups(media: list[tuple[str, ...]]) -> list[str]:
    """For each row the smallest digest of all rows that it shares media with, directly or through others."""
    smaller: dict[str, str] = {}

    def smallest(digest: str) -> str:
        while (step := smaller.setdefault(digest, digest)) != digest:
            smaller[digest] = smaller[step]  # halves the path
            digest = step
        return digest

    for first, *others in media:
        for other in others:
            low, high = sorted((smallest(first), smallest(other)))
            smaller[high] = low
    return [smallest(first) for first, *_ in media]


def _text(value: Any, where: str) -> str | None:
    """A text, or a number or truth value as JSON writes it."""
    if value is None:
        return None
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError) as e:
        raise InputError(f"{where} is no text: {value!r:.80}", fix="give one Unicode text a row") from e
    return value


def _label(value: Any, where: str) -> str | None:
    """A text, or several right ones with | between."""
    if not isinstance(value, list):
        return _text(value, where)
    return "|".join(text for item in value if (text := _text(item, where)) is not None) or None


def _media(value: Any, kind: str, folder: Path) -> Path | bytes | None:
    """Where an image or a recording is, or its bytes; `datasets` writes {"bytes", "path"}."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return folder / value
    if isinstance(value, bytes):
        return value
    raise _Broken(f"{kind} is {type(value).__name__}: neither a path nor bytes")


def _check(media: Path | bytes, kind: str, decoded: set[tuple[str, str]]) -> str:
    """The SHA-256 of media that can be decoded, which is tried once; _Broken says why not."""
    name = f"{kind} {media}" if isinstance(media, Path) else f"{kind} of {len(media)} bytes"
    try:
        if isinstance(media, Path) and not media.is_file():  # a pipe would never end
            raise _Broken(f"{name}: no such file")
        content = media.read_bytes() if isinstance(media, Path) else media
    except OSError as e:
        raise _Broken(f"{name}: {e.strerror}") from e
    digest = _sha256(content)
    if (kind, digest) not in decoded:
        (_decode_image if kind == "image" else _decode_audio)(content, name)
        decoded.add((kind, digest))
    return digest


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _decode_image(content: bytes, name: str) -> None:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _Broken(f"{name} has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
            image.load()
    except UnidentifiedImageError as e:  # its message names the address of our buffer
        raise _Broken(f"{name} is no {', '.join(FORMATS)}") from e
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise _Broken(f"{name}: {e}") from e


def _decode_audio(content: bytes, name: str) -> None:
    try:
        import soundfile
    except (ImportError, OSError) as e:  # OSError: soundfile is there, its libsndfile is not
        raise ToolchainError(f"audio needs soundfile: {e}", fix="pip install 'edgemm[audio]'") from e
    try:
        read_audio(content, soundfile.info(io.BytesIO(content)).samplerate)
    except soundfile.SoundFileError as e:
        raise _Broken(f"{name} is no WAV, FLAC, OGG, MP3") from e
    except InputError as e:
        raise _Broken(f"{name}: {str(e).splitlines()[0]}") from e


def _boxes(value: Any, text: str) -> Boxes | None:
    """Checked boxes, one for each word."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if value is None:
            return None
        boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in value)
    except (TypeError, ValueError, RecursionError) as e:
        raise _Broken(f"boxes = {value!r:.80}: no list of [x0,y0,x1,y1]") from e
    for box in boxes:
        x0, y0, x1, y1 = box
        if not all(type(side) is int for side in box) or not (0 <= x0 <= x1 <= 1000 and 0 <= y0 <= y1 <= 1000):
            raise _Broken(f"box {list(box)}: not whole numbers with 0 <= x0 <= x1 <= 1000, and y the same")
    if len(boxes) != len(text.split()):
        raise _Broken(f"{len(boxes)} boxes for {len(text.split())} words")
    return boxes
