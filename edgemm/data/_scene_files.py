"""The scenes as a data set on the disk: Parquet in the form that manifest.py reads, PNG and WAV beside it.

questions.parquet  id, split, image, audio (tones), text, label, kind: some without an image, most without audio
captions.parquet   id, split, image, audio (tones), caption
negatives.parquet  id, split, image, text, label, kind: each hard negative ("no") and the true caption ("yes")
speech.parquet     id, split, audio (the caption read aloud), transcript
new.parquet        id, image, audio, caption of scenes with the shape that no other file has
clips.parquet      id, split, frames (PNG, one frame below the other), fps, subtitles, wrong_times, wrong_roles,
                   questions: for read_clips
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.artifact import new_directory
from edgemm.console import progress
from edgemm.data._rows import INSTALL
from edgemm.data._scene_clips import FPS, clip_questions, clips, frames, subtitles, wrong_roles, wrong_times
from edgemm.data._scene_media import draw, png, spoken, tones, wav
from edgemm.data._scene_words import Question, asked, caption, given, hard_negatives
from edgemm.data._scene_world import Scene, scenes
from edgemm.errors import InputError, ToolchainError

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is written: scenes and clips of each split, and of how many scenes the caption is read aloud, too."""

    train: int = 4000
    test: int = 1000
    new: int = 200
    train_clips: int = 1000
    test_clips: int = 200
    train_spoken: int = 0
    test_spoken: int = 0


def write(directory: Path, seed: int, sizes: Sizes) -> None:
    """Write the data set of a seed, the whole of it or nothing; the same seed and sizes give the same bytes.

    directory  where it goes; not there yet

    Raises InputError; ToolchainError without pyarrow, or without espeak-ng where captions are to be read aloud.
    """
    if directory.exists():
        raise InputError(f"{directory} is there already", fix="name a new directory")
    if few := [f"{n} = {v}" for n, v in asdict(sizes).items() if v < (n in ("train", "test"))]:
        raise InputError(f"{few[0]} is too few", fix="give at least 1 scene of train and of test, and 0 of all else")
    with new_directory(directory) as made:
        tables: dict[str, Rows] = {name: [] for name in ("questions", "captions", "negatives", "speech", "clips")}
        for split, count, aloud, clip_count in (
            ("train", sizes.train, sizes.train_spoken, sizes.train_clips),
            ("test", sizes.test, sizes.test_spoken, sizes.test_clips),
        ):
            for i, (name, scene, about) in enumerate(progress(asked(split, seed, count), f"write {split}", count)):
                row = {"id": name, "split": split}
                tables["captions"].append(row | _caption(made, name, scene))
                tables["questions"] += _questions(row, i, about)
                tables["negatives"] += _negatives(row, scene)
                if i < aloud:
                    tables["speech"].append(row | _speech(made, name, scene))
            tables["clips"] += _clips(made, split, seed, clip_count)
        new = islice(scenes("new", seed), sizes.new)
        tables["new"] = [{"id": f"new-{i:05d}"} | _caption(made, f"new-{i:05d}", scene) for i, scene in enumerate(new)]
        for name, rows in tables.items():
            if rows:
                _write_table(made / f"{name}.parquet", rows)


def _put(made: Path, name: str, content: bytes) -> str:
    """Write a medium; what rows call it is its path in the data set, which can be moved."""
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_bytes(content)
    return name


def _caption(made: Path, name: str, scene: Scene) -> dict[str, str]:
    image = _put(made, f"images/{name}.png", png(draw(scene)))
    return {"image": image, "audio": _put(made, f"tones/{name}.wav", wav(tones(scene))), "caption": caption(scene)}


def _speech(made: Path, name: str, scene: Scene) -> dict[str, str]:
    said = caption(scene)
    return {"audio": _put(made, f"speech/{name}.wav", wav(spoken(said))), "transcript": said}


def _questions(row: dict[str, str], number: int, about: list[Question]) -> Rows:
    name = row["id"]
    found: Rows = []
    for q in about:
        seen, heard = given(number, q.kind)
        media = {"image": f"images/{name}.png" if seen else None, "audio": f"tones/{name}.wav" if heard else None}
        found.append({**row, "id": f"{name}-{q.kind}", **media, "text": q.text, "label": q.answer, "kind": q.kind})
    return found


def _negatives(row: dict[str, str], scene: Scene) -> Rows:
    name, image = row["id"], f"images/{row['id']}.png"
    return [
        row | {"id": f"{name}-{wrong.kind}-{label}", "image": image, "text": text, "label": label, "kind": wrong.kind}
        for wrong in hard_negatives(scene)
        for text, label in ((caption(scene), "yes"), (wrong.text, "no"))
    ]


def _clips(made: Path, split: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"clip questions {split} {seed}")
    for i, clip in enumerate(progress(islice(clips(split, seed), count), f"write {split} clips", count)):
        name = f"{split}-clip-{i:05d}"
        yield {
            "id": name,
            "split": split,
            "frames": _put(made, f"clips/{name}.png", png(_strip(frames(clip)))),
            "fps": float(FPS),
            "subtitles": [asdict(s) for s in subtitles(clip)],
            "wrong_times": [asdict(s) for s in wrong_times(clip)],
            "wrong_roles": [asdict(s) for s in wrong_roles(clip)],
            "questions": [asdict(q) for q in clip_questions(clip, rng)],
        }


def _strip(shown: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8[F,H,W,3] as one picture, uint8[F*H,W,3]."""
    return shown.reshape(-1, *shown.shape[2:])


def _write_table(path: Path, rows: Rows) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise ToolchainError("pyarrow is not installed", fix=INSTALL) from e
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
