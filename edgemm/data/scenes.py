"""Scenes of coloured shapes, drawn by a seed: pictures, sounds, captions, questions with answers, short clips."""

from __future__ import annotations

import random
from functools import cache
from itertools import islice

from edgemm.data import Sample
from edgemm.data._scene_clips import Clip as Clip
from edgemm.data._scene_clips import Event as Event
from edgemm.data._scene_clips import Subtitle as Subtitle
from edgemm.data._scene_clips import clip_questions as clip_questions
from edgemm.data._scene_clips import clips as clips
from edgemm.data._scene_clips import frames as frames
from edgemm.data._scene_clips import subtitles as subtitles
from edgemm.data._scene_clips import wrong_roles as wrong_roles
from edgemm.data._scene_clips import wrong_times as wrong_times
from edgemm.data._scene_media import draw as draw
from edgemm.data._scene_media import png as png
from edgemm.data._scene_media import spoken as spoken
from edgemm.data._scene_media import tones as tones
from edgemm.data._scene_media import wav as wav
from edgemm.data._scene_words import Negative as Negative
from edgemm.data._scene_words import Question as Question
from edgemm.data._scene_words import caption as caption
from edgemm.data._scene_words import hard_negatives as hard_negatives
from edgemm.data._scene_words import questions as questions
from edgemm.data._scene_world import Scene as Scene
from edgemm.data._scene_world import Thing as Thing
from edgemm.data._scene_world import scenes as scenes
from edgemm.errors import InputError

SCENES = {"train": 4000, "test": 1000}


def samples(split: str) -> list[Sample]:
    """Questions about 4,000 pictures ("train") or 1,000 ("test"), each picture with up to five kinds of them."""
    if split not in SCENES:
        raise InputError(f"scenes has no split {split!r}", fix="use train or test")
    return list(_samples(split))


@cache
def _samples(split: str) -> tuple[Sample, ...]:
    rng = random.Random(f"questions {split}")
    found = []
    for i, scene in enumerate(islice(scenes(split, seed=0), SCENES[split])):
        picture, group = png(draw(scene)), f"{split}-{i}"
        for asked in questions(scene, rng):
            found.append(Sample(f"{group}-{asked.kind}", group, picture, asked.text, asked.answer, asked.kind))
    return tuple(found)
