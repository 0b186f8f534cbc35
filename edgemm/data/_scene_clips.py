"""Short clips: three things of which one moves and another comes or goes, with subtitles tied to times."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgemm.data._scene_media import paint
from edgemm.data._scene_words import Question
from edgemm.data._scene_world import SIZES, Thing, draw_cells, draw_things, part_of
from edgemm.errors import InputError

FRAMES = 16
FPS = 8  # frames a second
COURSES = ("onto", "onto", "onto", "onto", "hits", "leaves")  # what the mover does, drawn from these
OVERLAP = 7  # from centre to centre when one thing lies on another, pixels: something of both is seen
CLEAR = 18  # pixels from the third thing to the mover's way at least: they never touch
SHORTEST = 12  # pixels that the mover goes at least: it is seen in each frame
SPACING = 2  # frames between two events at least
WORDS = {
    "appears": "the {} appears",
    "vanishes": "the {} vanishes",
    "starts": "the {} starts to move",
    "onto": "the {} moves onto the {}",
    "hits": "the {} hits the {}",
    "leaves": "the {} leaves the {}",
    "stops": "the {} stops",
}
Track = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """frame: the first that shows it; kind: a key of WORDS; subject: a thing's name; target: another's, or ""."""

    frame: int
    kind: str
    subject: str
    target: str = ""

    @property
    def text(self) -> str:
        return WORDS[self.kind].format(self.subject, self.target)


@dataclass(frozen=True, slots=True)
class Subtitle:
    """A text and when it is shown, seconds from the first frame."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Clip:
    """FRAMES frames at FPS; the three things have three colours.

    things  what the clip shows, those behind first: the one that comes or goes, the target, the mover
    tracks  for each thing its centre in each frame, pixels; None where it is not there
    events  in the order of time
    """

    things: tuple[Thing, Thing, Thing]
    tracks: tuple[Track, Track, Track]
    events: tuple[Event, ...]

    @property
    def told(self) -> str:
        """What happens to what, in order, whenever and wherever it does."""
        return "; ".join([*sorted(f"{t.size} {t.name}" for t in self.things), *(e.text for e in self.events)])


def frames(clip: Clip) -> NDArray[np.uint8]:
    """uint8[F,64,64,3], RGB."""
    shown = []
    for at in range(FRAMES):
        places = [(thing, track[at]) for thing, track in zip(clip.things, clip.tracks, strict=True)]
        shown.append(paint(replace(t, x=place[0], y=place[1]) for t, place in places if place))
    return np.stack(shown)


def subtitles(clip: Clip) -> list[Subtitle]:
    """A subtitle for each event, from its frame on until the next, the last until the clip's end."""
    starts = [event.frame / FPS for event in clip.events]
    ends = [*starts[1:], FRAMES / FPS]
    return [Subtitle(a, b, event.text) for a, b, event in zip(starts, ends, clip.events, strict=True)]


def wrong_times(clip: Clip) -> list[Subtitle]:
    """The clip's subtitles in another order at the same times: what comes or goes does so sooner or later."""
    shown = subtitles(clip)
    texts = [s.text for s in shown]
    at = next(i for i, event in enumerate(clip.events) if event.kind in ("appears", "vanishes"))
    to = random.Random(clip.told).choice([i for i in range(len(texts)) if i != at])
    texts.insert(to, texts.pop(at))
    return [replace(s, text=text) for s, text in zip(shown, texts, strict=True)]


def wrong_roles(clip: Clip) -> list[Subtitle]:
    """The clip's subtitles with the mover called by the target's name and the other way round."""
    _, target, mover = clip.things
    swapped = {mover.name: target.name, target.name: mover.name}
    events = [
        replace(e, subject=swapped.get(e.subject, e.subject), target=swapped.get(e.target, e.target))
        for e in clip.events
    ]
    return subtitles(replace(clip, events=tuple(events)))


def clip_questions(clip: Clip, rng: random.Random) -> list[Question]:
    """What is there at the end, what came first, and whether the one thing has just moved onto the other.

    "Just": within the clip's last second, in which every arrival lies; that the one lies on the other does not tell.
    """
    guest, target, mover = clip.things
    change, *others = sorted(clip.events, key=lambda e: e.subject != guest.name)
    at_end = "yes" if change.kind == "appears" else "no"
    found = [Question("existence", f"is there a {guest.name} at the end?", at_end)]
    before = sum(change.frame < event.frame for event in others)
    other = others[rng.random() * 4 > 1 + before]  # the share of each at which no words tell the answer
    word, verb = rng.choice(("before", "after")), "appear" if change.kind == "appears" else "vanish"
    holds = (change.frame < other.frame) == (word == "before")
    found.append(
        Question("relation", f"does the {change.subject} {verb} {word} {other.text}?", "yes" if holds else "no")
    )
    a, b = mover, target
    onto = any(event.kind == "onto" for event in clip.events)
    if onto and rng.random() < 0.25:
        a, b = b, a
    moved = "yes" if onto and a is mover else "no"
    found.append(Question("implication", f"has the {a.name} just moved onto the {b.name}?", moved))
    return found


def questions_by(clip: Clip, frame: int) -> list[Question]:
    """All that clip_questions could ask if the clip ended with this frame, and of each thing whether it is there."""
    guest, target, mover = clip.things
    found = [
        Question("existence", f"is there a {thing.name} at the end?", "yes" if track[frame] else "no")
        for thing, track in zip(clip.things, clip.tracks, strict=True)
    ]
    happened = [e for e in clip.events if e.frame <= frame]
    for change in (e for e in happened if e.subject == guest.name):
        verb = "appear" if change.kind == "appears" else "vanish"
        for other in (e for e in happened if e is not change):
            for word, holds in (("before", change.frame < other.frame), ("after", change.frame > other.frame)):
                text = f"does the {guest.name} {verb} {word} {other.text}?"
                found.append(Question("relation", text, "yes" if holds else "no"))
    just = any(e.kind == "onto" and e.frame > frame - FPS for e in happened)
    for a, b in ((mover, target), (target, mover)):
        moved = "yes" if just and a is mover else "no"
        found.append(Question("implication", f"has the {a.name} just moved onto the {b.name}?", moved))
    return found


def clips(split: str, seed: int) -> Iterator[Clip]:
    """Clips without end: "train", or "test", where of no two the same is told, nor what is told of a training clip.

    Raises InputError.
    """
    if split not in ("train", "test"):
        raise InputError(f"clips have no split {split!r}", fix="use train or test")
    rng = random.Random(f"clips {split} {seed}")
    seen: set[object] = set()
    while True:
        made = _clip(rng)
        key = made.told if split == "test" else made
        if key not in seen and part_of(made.told) == split:
            seen.add(key)
            yield made


def _clip(rng: random.Random) -> Clip:
    course, comes, earlier = rng.choice(COURSES), rng.random() < 0.5, rng.randrange(3)
    while True:
        guest, target, mover = draw_things(rng, 3, draw_cells(rng))
        start = rng.randint(1, 6)
        end = start - 1 + rng.randint(5, 8)  # the first frame at rest or in contact
        change = rng.randint(1, FRAMES - 2)
        way = _way(mover, target, course)
        if (
            len({guest.colour, target.colour, mover.colour}) == 3
            and min(abs(change - start), abs(change - end)) >= SPACING
            and (change > start) + (change > end) == earlier
            and 8 <= end <= FRAMES - 2
            and math.dist(*way) >= SHORTEST
            and _distance(guest, *way) >= CLEAR
        ):
            break
    moving = _moves(way, course, start, end)
    there = tuple((guest.x, guest.y) if (at >= change) == comes else None for at in range(FRAMES))
    events = [
        Event(change, "appears" if comes else "vanishes", guest.name),
        Event(start, "leaves", mover.name, target.name) if course == "leaves" else Event(start, "starts", mover.name),
        Event(end, "stops", mover.name) if course == "leaves" else Event(end, course, mover.name, target.name),
    ]
    still: Track = ((target.x, target.y),) * FRAMES
    return Clip((guest, target, mover), (there, still, moving), tuple(sorted(events, key=lambda e: e.frame)))


def _way(mover: Thing, target: Thing, course: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the mover starts and where it arrives: its own cell and the target, in the order of the course."""
    reach = OVERLAP if course != "hits" else SIZES[mover.size] + SIZES[target.size]
    dx, dy = mover.x - target.x, mover.y - target.y
    far = math.hypot(dx, dy)
    near = round(target.x + reach * dx / far), round(target.y + reach * dy / far)
    return (near, (mover.x, mover.y)) if course == "leaves" else ((mover.x, mover.y), near)


def _moves(way: tuple[tuple[int, int], tuple[int, int]], course: str, start: int, end: int) -> Track:
    """Still until `start`, at its end from frame `end` on; what hits goes back as fast as it came."""
    (x0, y0), (x1, y1) = way
    track = []
    for at in range(FRAMES):
        done = min(1.0, max(0.0, (at - start + 1) / (end - start + 1)))
        if course == "hits" and at > end:
            done = max(0.0, 1 - (at - end) / (end - start + 1))
        track.append((round(x0 + done * (x1 - x0)), round(y0 + done * (y1 - y0))))
    return tuple(track)


def _distance(thing: Thing, start: tuple[int, int], end: tuple[int, int]) -> float:
    """From a thing's centre to the nearest point between two others, pixels."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((thing.x - start[0]) * dx + (thing.y - start[1]) * dy) / (dx * dx + dy * dy)
    along = min(1.0, max(0.0, along))
    return math.hypot(start[0] + along * dx - thing.x, start[1] + along * dy - thing.y)
