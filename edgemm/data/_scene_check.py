"""Whether a data set of scenes is what it says: text against picture and sound, subtitles against frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgemm.console import log, progress
from edgemm.data import Sample
from edgemm.data._alignment import TOLERANCE, drift, shifted
from edgemm.data._rows import INSTALL, tolerate
from edgemm.data._scene_clips import Subtitle
from edgemm.data._scene_media import RATE
from edgemm.data._scene_truth import heard, is_true, seen
from edgemm.data._scene_words import Question
from edgemm.data._scene_world import SIDE, Thing
from edgemm.data.manifest import read
from edgemm.errors import InputError, ToolchainError
from edgemm.runtime.audio import read_audio

COLUMNS = ("id", "split", "frames", "fps", "subtitles", "wrong_times", "wrong_roles", "questions")


@dataclass(frozen=True, slots=True)
class StoredClip:
    """A clip of a data set, its subtitles at their right times.

    frames       file of its frames, for read_frames;  fps  how many of them a second shows
    wrong_times  subtitles in another order at the same times;  wrong_roles  with two things exchanged
    late         how many frames too late the file has the subtitles, where that was repaired, else 0
    """

    id: str
    frames: Path
    fps: float
    subtitles: tuple[Subtitle, ...]
    wrong_times: tuple[Subtitle, ...]
    wrong_roles: tuple[Subtitle, ...]
    questions: tuple[Question, ...]
    late: int


def read_frames(path: Path) -> NDArray[np.uint8]:
    """Square frames, one below the other in an image -> uint8[F,S,S,3], RGB. Raises InputError."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            strip = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read {path}: {e}", fix="give a whole PNG") from e
    side = strip.shape[1]
    if strip.shape[0] % side:
        raise InputError(
            f"{path}: {strip.shape[0]} rows of pixels, {side} wide, are no square frames", fix="write whole frames"
        )
    return strip.reshape(-1, side, side, 3)


def read_clips(path: Path, tolerance: float) -> dict[str, list[StoredClip]]:
    """The clips of a clips.parquet, "train" and "test"; subtitles that drift are set right, which the log tells.

    tolerance  largest share of clips that is accepted with frames that are broken or subtitles that don't fit them;
               these are left out

    Raises InputError.
    """
    parts: dict[str, list[StoredClip]] = {"train": [], "test": []}
    broken: list[str] = []
    rows = _rows(path)
    for row in progress(rows, f"read {path.name}"):
        try:
            parts[row["split"]].append(_clip(row, path.parent))
        except InputError as e:
            broken.append(f"{row['id']}: {str(e).splitlines()[0]}")
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            broken.append(f"{row['id']}: not as it was written: {e!r}")
    tolerate(path, broken, len(rows), tolerance)
    if late := {clip.id: clip.late for part in parts.values() for clip in part if clip.late}:
        name = max(late, key=lambda n: abs(late[n]))
        log(f"{path}: subtitles of {len(late)} of {len(rows)} clips set right, {name}'s by {-late[name]} frames")
    return parts


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise ToolchainError("pyarrow is not installed", fix=INSTALL) from e
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise InputError(f"cannot read {path}: {e}", fix="give the clips.parquet of a data set of scenes") from e
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise InputError(f"{path} has no column {missing[0]}", fix=f"give a table with {', '.join(COLUMNS)}")
    return table.to_pylist()


def _clip(row: dict[str, Any], folder: Path) -> StoredClip:
    path, fps = folder / row["frames"], row["fps"]
    texts = {n: [Subtitle(**s) for s in row[n]] for n in ("subtitles", "wrong_times", "wrong_roles")}
    late = drift(read_frames(path), texts["subtitles"], fps)
    late = late if abs(late) > TOLERANCE else 0
    right = {n: shifted(subtitles, late, fps) for n, subtitles in texts.items()}
    return StoredClip(
        row["id"], path, fps, **right, questions=tuple(Question(**q) for q in row["questions"]), late=late
    )


def check(directory: Path) -> dict[str, int]:
    """What is right in a data set that `write` wrote -> how many captions, negatives and clips.

    Captions hold of their pictures, which show what their sounds tell; negatives hold or not as their labels say;
    subtitles stand at the times of what they tell. Raises InputError with the first that are wrong.
    """
    counts = {}
    for name, is_right in (("captions", _caption_is_right), ("negatives", _label_is_right)):
        path = directory / f"{name}.parquet"
        samples = [sample for part in read(path, 0.0).values() for sample in part]
        wrong = [f"{s.id}: {s.text or s.label}" for s in progress(samples, f"check {name}") if not is_right(s)]
        tolerate(path, wrong, len(samples), 0.0)
        counts[name] = len(samples)
    if (path := directory / "clips.parquet").exists():
        counts["clips"] = sum(map(len, read_clips(path, 0.0).values()))
    return counts


def _shown(sample: Sample) -> list[Thing]:
    if not isinstance(sample.image, Path):
        return []
    with Image.open(sample.image) as image:
        return seen(np.array(image.convert("RGB"))) if image.size == (SIDE, SIDE) else []


def _caption_is_right(sample: Sample) -> bool:
    things = sorted(_shown(sample), key=lambda thing: thing.cell)
    told = heard(read_audio(sample.audio, RATE)) if sample.audio else []
    return is_true(sample.label or "", things) and told == [f"{thing.size} {thing.name}" for thing in things]


def _label_is_right(sample: Sample) -> bool:
    return is_true(sample.text or "", _shown(sample)) == (sample.label == "yes")
