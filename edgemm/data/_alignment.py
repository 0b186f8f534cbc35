"""Whether subtitles stand at the times at which what they tell is seen, and by how many frames they don't.

What happens is found in the frames themselves: where the pixels of a colour come, go, start to move, come to rest or
turn. The offset is where the cross-correlation of these events with the subtitles has its peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgemm.data._scene_clips import Subtitle
from edgemm.data._scene_truth import nearest_colours
from edgemm.data._scene_world import COLOURS
from edgemm.errors import InputError

MOST = 8  # frames of drift that are looked for in either direction
TOLERANCE = 1  # frames of drift that are let be; offsets no farther apart are one
NEIGHBOUR = 0.5  # what an event counts for a subtitle that is one frame off
ENOUGH = 0.5  # share of subtitles that must find their event
VISIBLE = 8  # pixels from which on a colour is there
STILL = 0.5  # pixels a frame up to which a thing is at rest
SORTS = {
    "appears": "come",
    "vanishes": "go",
    "starts": "start",
    "leaves": "start",
    "moves": "arrive",
    "hits": "arrive",
    "stops": "arrive",
}
CHANNELS = [(colour, sort) for colour in COLOURS for sort in ("come", "go", "start", "arrive")]


def events(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What happens in uint8[F,H,W,3] -> float32[F,C]: 1 where a frame is the first to show it; C: CHANNELS.

    A colour comes or goes when its pixels do; it starts in the first frame in which their centre has moved, arrives in
    the last one before it rests or turns back.
    """
    colours = nearest_colours(frames)
    happened = np.zeros((len(frames), len(COLOURS), 4), np.float32)
    rows, columns = np.indices(frames.shape[1:3])
    for number in range(len(COLOURS)):
        mask = colours == number + 1
        area = mask.sum((1, 2))
        there = area >= VISIBLE
        centres = np.stack([(mask * axis).sum((1, 2)) for axis in (columns, rows)], 1) / np.maximum(area, 1)[:, None]
        steps = np.zeros_like(centres)  # from the frame before; none where it was not there in both
        steps[1:] = np.diff(centres, axis=0) * (there[1:] & there[:-1])[:, None]
        moving = np.linalg.norm(steps, axis=1) > STILL
        happened[1:, number, 0] = there[1:] & ~there[:-1]
        happened[1:, number, 1] = there[:-1] & ~there[1:]
        happened[1:, number, 2] = moving[1:] & ~moving[:-1]
        ahead = np.einsum("fa,fa->f", steps[:-1], steps[1:])
        happened[:-1, number, 3] = moving[:-1] & ((ahead <= 0) | ~moving[1:])
    return happened.reshape(len(frames), -1)


def drift(frames: NDArray[np.uint8], subtitles: Sequence[Subtitle], fps: float) -> int:
    """By how many frames subtitles are later than what they tell of; less than 0: earlier.

    frames     uint8[F,H,W,3]
    subtitles  each tells of the first colour that it names; one that names no colour and event is passed over
    fps        frames a second

    Raises InputError where fewer than half of the subtitles have their event at the peak, or where another offset is
    as good.
    """
    happened = events(frames)
    told = [(round(s.start_s * fps), channel) for s in subtitles if (channel := _channel(s.text)) is not None]
    scores = {
        lag: [_score(happened, frame - lag, channel) for frame, channel in told] for lag in range(-MOST, MOST + 1)
    }
    totals = {lag: sum(score) for lag, score in scores.items()}
    best = max(totals, key=lambda lag: (totals[lag], -abs(lag)))
    found = sum(score > 0 for score in scores[best]) / max(1, len(told))
    if not told or found < ENOUGH:
        raise InputError(
            f"{found:.0%} of {len(told)} subtitles have what they tell in the frames, at the best offset",
            fix="give subtitles of this clip, or leave the clip out",
        )
    rivals = [lag for lag, total in totals.items() if total == totals[best] and abs(lag - best) > TOLERANCE]
    if rivals:
        raise InputError(
            f"subtitles fit the frames as well {rivals[0]} as {best} frames late", fix="give more of the subtitles"
        )
    return best


def _channel(text: str) -> int | None:
    """Which of CHANNELS a subtitle tells of."""
    words = text.split()
    colours, sorts = [w for w in words if w in COLOURS], [SORTS[w] for w in words if w in SORTS]
    return CHANNELS.index((colours[0], sorts[0])) if colours and sorts else None


def _score(happened: NDArray[np.float32], frame: int, channel: int) -> float:
    """1 where the event is at `frame`, NEIGHBOUR where it is beside it, else 0."""
    near = {at: happened[at, channel] for at in (frame - 1, frame, frame + 1) if 0 <= at < len(happened)}
    return max((float(value) * (1 if at == frame else NEIGHBOUR) for at, value in near.items()), default=0.0)


def shifted(subtitles: Sequence[Subtitle], frames: int, fps: float) -> tuple[Subtitle, ...]:
    """The subtitles so many frames earlier."""
    seconds = frames / fps
    return tuple(replace(s, start_s=s.start_s - seconds, end_s=s.end_s - seconds) for s in subtitles)
