"""Scenes of coloured shapes, drawn by a seed: pictures, tones, captions, questions with answers, short clips.

What tones tell of a test scene, and so all that words do, is told of no training scene, whatever the seeds: a digest
of it decides where a scene belongs. One shape, the cross, is in neither: scenes("new", seed) has it, so that a new
class can be learned from a few pictures.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import fields
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

from edgemm import console
from edgemm.data import Sample
from edgemm.data._scene_check import StoredClip, check, read_clips, read_frames
from edgemm.data._scene_clips import (
    FPS,
    Clip,
    Event,
    Subtitle,
    clip_questions,
    clips,
    frames,
    questions_by,
    subtitles,
    wrong_roles,
    wrong_times,
)
from edgemm.data._scene_files import Sizes, write
from edgemm.data._scene_media import draw, png, spoken, tones, wav
from edgemm.data._scene_truth import claims, heard, is_true, seen
from edgemm.data._scene_words import Negative, Question, asked, caption, given, hard_negatives, questions
from edgemm.data._scene_world import Scene, Thing, scenes
from edgemm.errors import EdgemmError, InputError

__all__ = (
    "FPS",
    "Clip",
    "Event",
    "Negative",
    "Question",
    "Scene",
    "Sizes",
    "StoredClip",
    "Subtitle",
    "Thing",
    "caption",
    "captions",
    "check",
    "claims",
    "clip_questions",
    "clips",
    "draw",
    "frames",
    "hard_negatives",
    "heard",
    "is_true",
    "png",
    "questions",
    "questions_by",
    "read_clips",
    "read_frames",
    "samples",
    "scenes",
    "seen",
    "spoken",
    "subtitles",
    "tones",
    "watched",
    "wav",
    "write",
    "wrong_roles",
    "wrong_times",
)
SCENES = {"train": 4000, "test": 1000}
CLIPS = {"train": 100, "test": 400}


def samples(split: str) -> list[Sample]:
    """Questions about 4,000 scenes ("train") or 1,000 ("test"): up to five of each, one of a kind.

    Most come with the picture, some with the tones, too, or with them alone: see _scene_words.given.
    """
    _known(split)
    return list(_samples(split))


def captions(split: str) -> list[Sample]:
    """The same pictures with what can be said of them as the label, and as sound, for models that embed."""
    _known(split)
    return list(_captions(split))


def watched(split: str) -> list[Sample]:
    """Three questions about each of 100 clips ("train") or 400 ("test"), for models that watch.

    tensors  frames float32[F,3,64,64], -1..1, FPS a second
    """
    _known(split)
    return list(_watched(split))


def _known(split: str) -> None:
    if split not in SCENES:
        raise InputError(f"scenes has no split {split!r}", fix=f"use {' or '.join(SCENES)}")


@cache
def _samples(split: str) -> tuple[Sample, ...]:
    found = []
    for i, (name, scene, about) in enumerate(asked(split, 0, SCENES[split])):
        picture, sound = png(draw(scene)), wav(tones(scene))
        for q in about:
            image, audio = (x if it else None for x, it in zip((picture, sound), given(i, q.kind), strict=True))
            found.append(Sample(f"{name}-{q.kind}", name, image, q.text, q.answer, q.kind, audio=audio))
    return tuple(found)


@cache
def _captions(split: str) -> tuple[Sample, ...]:
    return tuple(
        Sample(name, name, png(draw(scene)), label=caption(scene), kind="caption", audio=wav(tones(scene)))
        for name, scene, _ in asked(split, 0, SCENES[split])
    )


@cache
def _watched(split: str) -> tuple[Sample, ...]:
    rng, found = random.Random(f"clip questions {split} 0"), []
    for i, clip in enumerate(islice(clips(split, 0), CLIPS[split])):
        pixels = frames(clip).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        name = f"{split}-clip-{i:05d}"
        found += [
            Sample(f"{name}-{q.kind}", name, text=q.text, label=q.answer, kind=q.kind, tensors={"frames": pixels})
            for q in clip_questions(clip, rng)
        ]
    return tuple(found)


def main(arguments: list[str]) -> int:
    """`python -m edgemm.data.scenes`: writes or checks a directory -> the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edgemm.data.scenes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    writes = commands.add_parser("write", help="write the data set of a seed: Parquet, PNG, WAV")
    writes.add_argument("directory", type=Path)
    writes.add_argument("--seed", type=int, default=0)
    for field in fields(Sizes):
        writes.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, metavar="N")
    checks = commands.add_parser("check", help="hold captions to pictures and sounds, subtitles to frames")
    checks.add_argument("directory", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.command == "write":
            write(given.directory, given.seed, Sizes(**{f.name: getattr(given, f.name) for f in fields(Sizes)}))
            console.result(str(given.directory))
        else:
            console.result(", ".join(f"{n} {what}" for what, n in check(given.directory).items()) + ": all right")
    except EdgemmError as e:
        console.error(str(e))
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
