"""What is said of scenes: captions, captions that are just not true, questions with their answers.

Answers can't be guessed from the words: a question is asked only where it could have had another answer, which of
them is drawn, and colours, shapes and directions are alike but for their names.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, islice, permutations

from edgemm.data._scene_world import COLOURS, OPPOSITES, SHAPES, SIZES, Scene, Thing, relations, scenes

DIRECTIONS = {"right": "right of", "left": "left of", "up": "above", "down": "below"}
COUNT_WEIGHTS = {0: 2, 1: 2, 2: 3, 3: 6}  # many of one kind are rare
KINDS = ("existence", "colour", "count", "relation", "implication")
HEARD = ("existence", "colour", "count")  # kinds that tones tell enough for


@dataclass(frozen=True, slots=True)
class Question:
    """kind: one of KINDS; answer: "yes", "no", a colour, a shape or a number in digits."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Negative:
    """A caption in the words of a true one that is not true. kind: "binding" or "relation", what is wrong in it."""

    kind: str
    text: str


def caption(scene: Scene) -> str:
    """What each thing is and how each two of them stand to each other, in an order drawn by `scene.wording`."""
    rng = random.Random(scene.wording)
    order = list(range(len(scene.things)))
    rng.shuffle(order)
    things = [scene.things[i] for i in order]
    sentences = [_listed([f"a {thing.size} {thing.name}" for thing in things])]
    for pair in combinations(things, 2):
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        sentences.append(f"the {a.name} is {' and '.join(relations(a, b))} the {b.name}")
    return "; ".join(sentences)


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def hard_negatives(scene: Scene) -> list[Negative]:
    """Captions in the scene's words, each of another scene: at most one of each kind, none of a lone thing.

    binding   two things have exchanged their colours, or shapes where the colours are the same
    relation  two things have exchanged their places
    """
    rng = random.Random(scene.wording)
    pairs = list(combinations(range(len(scene.things)), 2))
    rng.shuffle(pairs)
    found: dict[str, Negative] = {}
    for i, j in pairs:
        a, b = scene.things[i], scene.things[j]
        edits = [
            ("binding", replace(a, colour=b.colour), replace(b, colour=a.colour)),
            ("binding", replace(a, shape=b.shape), replace(b, shape=a.shape)),
            ("relation", replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)),
        ]
        for kind, *swapped in edits:
            things = list(scene.things)
            things[i], things[j] = swapped
            other = replace(scene, things=tuple(things))
            if len({t.name for t in things}) == len(things) and other.meaning != scene.meaning:
                found.setdefault(kind, Negative(kind, caption(other)))
    return list(found.values())


def asked(split: str, seed: int, count: int) -> Iterator[tuple[str, Scene, list[Question]]]:
    """The first `count` scenes of a split, each with its id and the questions that a data set asks of it."""
    rng = random.Random(f"questions {split} {seed}")
    for i, scene in enumerate(islice(scenes(split, seed), count)):
        yield f"{split}-{i:05d}", scene, questions(scene, rng)


def given(number: int, kind: str) -> tuple[bool, bool]:
    """Whether a question of scene `number` comes with the picture, and with the tones.

    Of five scenes three are shown, one is shown and heard, and of one what can be heard is heard alone.
    """
    heard = number % 5 > 2
    return not (number % 5 == 4 and kind in HEARD), heard


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """At most one question of each of KINDS, in their order; a lone thing has no relation, and few implications."""
    asked = (
        _existence(scene, rng),
        _colour(scene, rng),
        _count(scene, rng),
        _relation(scene, rng),
        _implied(scene, rng),
    )
    return [question for question in asked if question]


def _yes_or_no(kind: str, true: Collection[str], false: Collection[str], rng: random.Random) -> Question | None:
    """One of the questions whose answer is yes or one whose answer is no, each half of the time."""
    if not true or not false:
        return None
    answer = rng.choice(("yes", "no"))
    return Question(kind, rng.choice(sorted(true if answer == "yes" else false)), answer)


def _existence(scene: Scene, rng: random.Random) -> Question | None:
    """Of a colour and a shape, or of a size and a shape; what is not there mixes what is."""
    by_size = rng.random() < 0.5
    there = {((t.size if by_size else t.colour), t.shape) for t in scene.things}
    mixed = {(what, shape) for what, _ in there for _, shape in there}
    what, shape = rng.choice(sorted(there))
    mixed |= {(other, shape) for other in rng.sample(list(SIZES if by_size else COLOURS), 2)}
    mixed |= {(what, other) for other in rng.sample(SHAPES, 2)}
    true, false = ([f"is there a {what} {shape}?" for what, shape in pairs] for pairs in (there, mixed - there))
    return _yes_or_no("existence", true, false, rng)


def _only(scene: Scene) -> list[tuple[str, Thing]]:
    """Each thing that a shape, or a size and a shape, tells from the others, with these words."""
    named: dict[str, list[Thing]] = defaultdict(list)
    for thing in scene.things:
        named[thing.shape].append(thing)
        named[f"{thing.size} {thing.shape}"].append(thing)
    return [(words, things[0]) for words, things in named.items() if len(things) == 1]


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    if not (known := _only(scene)):
        return None
    words, thing = rng.choice(known)
    return Question("colour", f"what colour is the {words}?", thing.colour)


def _count(scene: Scene, rng: random.Random) -> Question:
    shapes = {f"{shape}{'es' if shape == 'cross' else 's'}": _number(scene, shape=shape) for shape in SHAPES}
    colours = {f"{colour} things": _number(scene, colour=colour) for colour in COLOURS}
    sizes = {f"{size} things": _number(scene, size=size) for size in SIZES}
    counts = rng.choice((shapes, colours, sizes))
    possible = sorted(set(counts.values()))
    (number,) = rng.choices(possible, [COUNT_WEIGHTS[n] for n in possible])
    what = rng.choice([words for words, n in counts.items() if n == number])
    return Question("count", f"how many {what} are there?", str(number))


def _number(scene: Scene, **wanted: str) -> int:
    return sum(all(getattr(thing, name) == value for name, value in wanted.items()) for thing in scene.things)


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    """How two things stand to each other, or of what shape the one thing is that stands so to another."""
    true: list[str] = []
    false: list[str] = []
    which: list[Question] = []
    for a, b in permutations(scene.things, 2):
        for relation in OPPOSITES:
            text = f"is the {a.name} {relation} the {b.name}?"
            (true if relation in relations(a, b) else false).append(text)
            if [t for t in scene.things if relation in relations(t, b)] == [a]:
                which.append(Question("relation", f"what shape is {relation} the {b.name}?", a.shape))
    return rng.choice(which) if which and rng.random() < 0.5 else _yes_or_no("relation", true, false, rng)


def _implied(scene: Scene, rng: random.Random) -> Question | None:
    """What a thing would run into, or whether two things are alike: what no single fact tells."""
    ways = [_yes_or_no("implication", *way, rng) for way in (_reached(scene), _alike(scene))]
    possible = [question for question in ways if question]
    return rng.choice(possible) if possible else None


def _reached(scene: Scene) -> tuple[set[str], set[str]]:
    """Questions whether a thing that moved would run into another first: (true, false)."""
    true: set[str] = set()
    false: set[str] = set()
    for a, b in permutations(scene.things, 2):
        for direction in DIRECTIONS:
            text = f"if the {a.name} moved {direction}, would it reach the {b.name} first?"
            (true if first_reached(scene, a, direction) == b else false).add(text)
    return true, false


def first_reached(scene: Scene, thing: Thing, direction: str) -> Thing | None:
    """What `thing` would run into first if it moved right, left, up or down; None: nothing."""
    axis = 1 if direction in ("up", "down") else 0
    ahead = [t for t in scene.things if relations(t, thing) == [DIRECTIONS[direction]]]
    return min(ahead, key=lambda t: abs(t.cell[axis] - thing.cell[axis]), default=None)


def _alike(scene: Scene) -> tuple[set[str], set[str]]:
    """Questions whether two things, told apart by their shapes or by their colours, share the rest: (true, false)."""
    true: set[str] = set()
    false: set[str] = set()
    for a, b in permutations(scene.things, 2):
        if _number(scene, shape=a.shape) == _number(scene, shape=b.shape) == 1:
            text = f"do the {a.shape} and the {b.shape} have the same colour?"
            (true if a.colour == b.colour else false).add(text)
        if _number(scene, colour=a.colour) == _number(scene, colour=b.colour) == 1:
            text = f"do the {a.colour} thing and the {b.colour} thing have the same shape?"
            (true if a.shape == b.shape else false).add(text)
    return true, false
