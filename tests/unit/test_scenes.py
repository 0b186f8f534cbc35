"""Scenes: what is drawn, sounded, said and asked, held to plain rules of its own; splits, balance, files, subtitles."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgemm.data import manifest, scenes, split
from edgemm.data._alignment import drift
from edgemm.data._scene_clips import FPS, FRAMES
from edgemm.data._scene_media import GROUND, spoken
from edgemm.data._scene_world import COLOURS, NEW_SHAPE, SHAPES, SIZES, Scene, Thing, part_of
from edgemm.data.scenes import Clip, Question, Subtitle
from edgemm.errors import InputError, ToolchainError
from edgemm.recipe import Recipe

SEEDS = range(3)
MARGIN = 8  # pixels between two things' centres from which on one is beside the other; in one row it is at most 4
PLURALS = {f"{name}s": name for name in (*SHAPES, "thing")}
SMALL = scenes.Sizes(train=12, test=6, new=4, train_clips=4, test_clips=3)


def drawn(part: str = "train", count: int = 200, seed: int = 0) -> list[Scene]:
    return list(islice(scenes.scenes(part, seed), count))


def drawn_clips(part: str = "train", count: int = 100, seed: int = 0) -> list[Clip]:
    return list(islice(scenes.clips(part, seed), count))


# ---- a second evaluator, by coordinates -----------------------------------------------------------------------------


def stands(a: Thing, relation: str, b: Thing) -> bool:
    signs = {"left of": a.x - b.x, "right of": b.x - a.x, "above": a.y - b.y, "below": b.y - a.y}
    return signs[relation] < -MARGIN


def fits(thing: Thing, words: str) -> bool:
    """Whether "small red star", "red thing" or "stars" is said of it."""
    wanted = [PLURALS.get(w, w) for w in words.split()]
    return all(w in (thing.size, thing.colour, thing.shape, "thing") for w in wanted)


def answer(text: str, things: Iterable[Thing]) -> str:
    """What is right, from the things' coordinates and names alone."""
    things = list(things)

    def yes(holds: bool) -> str:
        return "yes" if holds else "no"

    def the(words: str) -> Thing:
        (found,) = [t for t in things if fits(t, words)]
        return found

    relation = "(left of|right of|above|below)"
    if m := re.fullmatch(r"is there a (.+)\?", text):
        return yes(any(fits(t, m[1]) for t in things))
    if m := re.fullmatch(r"what colour is the (.+)\?", text):
        return the(m[1]).colour
    if m := re.fullmatch(r"how many (.+) are there\?", text):
        return str(sum(fits(t, m[1]) for t in things))
    if m := re.fullmatch(rf"is the (.+?) {relation} the (.+)\?", text):
        return yes(stands(the(m[1]), m[2], the(m[3])))
    if m := re.fullmatch(rf"what shape is {relation} the (.+)\?", text):
        (found,) = [t for t in things if stands(t, m[1], the(m[2]))]
        return found.shape
    if m := re.fullmatch(r"do the (.+) and the (.+) have the same (colour|shape)\?", text):
        return yes(getattr(the(m[1]), m[3]) == getattr(the(m[2]), m[3]))
    m = re.fullmatch(r"if the (.+) moved (right|left|up|down), would it reach the (.+) first\?", text)
    assert m, text
    return yes(reached(the(m[1]), m[2], things) == the(m[3]))


def reached(mover: Thing, direction: str, things: list[Thing]) -> Thing | None:
    """Moves it pixel by pixel until the squares around it and around another thing overlap."""
    dx, dy = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}[direction]
    for step in range(64):
        x, y = mover.x + step * dx, mover.y + step * dy
        for t in things:
            reach = SIZES[t.size] + SIZES[mover.size]
            if t != mover and abs(t.x - x) <= reach and abs(t.y - y) <= reach:
                return t
    return None


# ---- pictures and sounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "test", "new"])
def test_each_thing_is_drawn_in_its_colour_at_its_place_and_nothing_else_is(part: str) -> None:
    for scene in drawn(part):
        picture = scenes.draw(scene)
        assert (picture.shape, picture.dtype) == ((64, 64, 3), np.uint8)
        left = picture.copy()
        for thing in scene.things:
            r = SIZES[thing.size]
            assert tuple(picture[thing.y, thing.x]) == COLOURS[thing.colour]
            assert r <= thing.x < 64 - r
            assert r <= thing.y < 64 - r
            box = picture[thing.y - r : thing.y + r + 1, thing.x - r : thing.x + r + 1]
            own = (box == COLOURS[thing.colour]).all(-1)
            assert (own | (box == GROUND).all(-1)).all(), "no other thing in its box"
            assert own.any(0).sum() >= 1.3 * r
            assert own.any(1).sum() >= 1.8 * r
            left[thing.y - r : thing.y + r + 1, thing.x - r : thing.x + r + 1] = GROUND
        assert (left == GROUND).all()
        assert len({thing.name for thing in scene.things}) == len(scene.things)


def test_things_are_never_nearly_in_one_row() -> None:
    for scene in drawn(count=500):
        for a, b in combinations(scene.things, 2):
            for distance in (abs(a.x - b.x), abs(a.y - b.y)):
                assert distance <= 4 or distance >= 2 * MARGIN
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > SIZES[a.size] + SIZES[b.size]


@pytest.mark.parametrize("part", ["train", "new"])
def test_pictures_and_sounds_are_read_back_by_rule(part: str) -> None:
    noise = np.random.default_rng(0)
    for scene in drawn(part, 60):
        picture = scenes.draw(scene)
        assert set(scenes.seen(picture)) == set(scene.things)
        noisy = (picture + noise.normal(0, 12, picture.shape)).clip(0, 255).astype(np.uint8)
        assert {(t.name, t.size) for t in scenes.seen(noisy)} == {(t.name, t.size) for t in scene.things}
        ordered = sorted(scene.things, key=lambda t: (t.x // 21, t.y))
        assert scenes.heard(scenes.tones(scene)) == [f"{t.size} {t.name}" for t in ordered]
    assert scenes.seen(np.full((64, 64, 3), GROUND, np.uint8)) == []
    assert scenes.heard(noise.normal(0, 0.1, 9000).astype(np.float32)) == [""]


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_is_a_pitch_and_a_size_a_length(colour: str) -> None:
    """A third of an octave from each colour to the next, as a Fourier transform sees it."""
    for size, seconds in (("small", 0.2), ("big", 0.4)):
        sound = scenes.tones(Scene((Thing("circle", colour, size, 32, 32),), 0))
        assert (sound.dtype, len(sound)) == (np.float32, seconds * 16_000)
        assert 0.45 < np.abs(sound).max() <= 0.5
        spectrum = np.abs(np.fft.rfft(sound, 160_000))
        assert spectrum.argmax() / 10 == pytest.approx(300 * 2 ** (list(COLOURS).index(colour) / 3), rel=0.01)


def test_captions_are_read_aloud() -> None:
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    short, long = spoken("a red star"), spoken("a red star and a small blue circle, left of it")
    assert short.dtype == np.float32
    assert 0.4 * 16_000 < len(short) < len(long) < 8 * 16_000
    assert 0.05 < np.abs(short).max() <= 1


def test_without_espeak_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="apt-get install espeak-ng"):
        spoken("a red star")
    with pytest.raises(ToolchainError, match="espeak-ng"):
        scenes.write(tmp_path / "out", 0, replace(SMALL, test_spoken=1))
    assert list(tmp_path.iterdir()) == []


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "test", "new"])
def test_answers_are_right(part: str) -> None:
    rng, kinds = random.Random(0), Counter()
    for scene in drawn(part, 800):
        for question in scenes.questions(scene, rng):
            assert answer(question.text, scene.things) == question.answer, (question, scene)
            kinds[question.kind] += 1
    assert kinds.keys() == {"existence", "colour", "count", "relation", "implication"}
    assert min(kinds.values()) > 300


def claims(text: str) -> tuple[list[str], list[tuple[str, str, str]]]:
    """A caption taken apart: what it lists, and (thing, relation, thing)."""
    listed, *sentences = text.split("; ")
    facts = []
    for sentence in sentences:
        a, relations, b = re.fullmatch(r"the (\w+ \w+) is (.+) the (\w+ \w+)", sentence).groups()
        facts += [(a, relation, b) for relation in relations.split(" and ")]
    return re.findall(r"(?:small|big) \w+ \w+", listed), facts


def holds(text: str, scene: Scene) -> bool:
    listed, facts = claims(text)
    by_name = {f"{t.colour} {t.shape}": t for t in scene.things}
    named = sorted(f"{t.size} {name}" for name, t in by_name.items())
    return sorted(listed) == named and all(stands(by_name[a], relation, by_name[b]) for a, relation, b in facts)


def test_claims_of_a_caption_hold_and_of_one_just_not_true_some_dont() -> None:
    for scene in drawn(count=300):
        things = list(scene.things)
        said = scenes.caption(scene)
        found = scenes.claims(said, things)
        assert all(held for *_, held in found)
        spans = [said[first:end] for first, end, _ in found]
        listed, facts = said.partition("; ")[0], said.split("; ")[1:]
        assert [span.removeprefix("a ") for span in spans[: len(things)]] == claims(listed)[0]
        assert spans[len(things) :] == facts
        for wrong in scenes.hard_negatives(scene):
            assert not all(held for *_, held in scenes.claims(wrong.text, things))
            listed = [wrong.text[a:b] for a, b, held in scenes.claims(wrong.text, things)[: len(things)] if held]
            assert all(any(t.name in text and t.size in text for t in things) for text in listed)
            if wrong.kind == "relation":
                assert len(listed) == len(things)


@pytest.mark.parametrize("part", ["train", "test", "new"])
def test_captions_are_true_and_hard_negatives_false(part: str) -> None:
    kinds: Counter[str] = Counter()
    for scene in drawn(part, 400):
        said, things = scenes.caption(scene), scenes.seen(scenes.draw(scene))
        assert holds(said, scene)
        assert scenes.is_true(said, things)
        _, facts = claims(said)
        told = {(a, b) for a, _, b in facts}
        assert len({frozenset(pair) for pair in told}) == math.comb(len(scene.things), 2), "each pair is told of"
        wrong = scenes.hard_negatives(scene)
        for negative in wrong:
            assert not holds(negative.text, scene), negative
            assert not scenes.is_true(negative.text, things)
            listed = [sorted(w for name in claims(text)[0] for w in name.split()) for text in (said, negative.text)]
            assert listed[0] == listed[1], "the same words for the things"
            kinds[negative.kind] += 1
        assert len({negative.kind for negative in wrong}) == len(wrong)
        assert len(wrong) == (0 if len(scene.things) == 1 else 2)
    assert kinds["binding"] == kinds["relation"] > 200


def test_captions_tell_scenes_apart_that_differ_in_anything_but_place_in_a_cell() -> None:
    scene = next(s for s in drawn() if len(s.things) == 2)
    a, b = scene.things
    moved = replace(scene, things=(replace(a, x=a.x + (1 if a.x % 21 < 11 else -1)), b))
    assert scenes.caption(moved) == scenes.caption(scene)
    for other in (replace(a, size="big" if a.size == "small" else "small"), replace(a, shape=NEW_SHAPE)):
        assert scenes.caption(replace(scene, things=(other, b))) != scenes.caption(scene)


@pytest.mark.parametrize("text", ["", "a big red star", "a small red star; the red star is left of the blue star", "?"])
def test_a_caption_that_says_another_thing_is_not_true(text: str) -> None:
    assert not scenes.is_true(text, [Thing("star", "red", "small", 11, 11)])
    assert scenes.is_true("a small red star", [Thing("star", "red", "small", 11, 11)])


def template(text: str) -> str:
    """A question without the names of colours, shapes and sizes."""
    for word, names in (("COLOUR", COLOURS), ("SHAPE", (*SHAPES, NEW_SHAPE)), ("SIZE", SIZES)):
        text = re.sub(rf"\b({'|'.join(names)})(e?s)?\b", word, text)
    return text


def by_words_alone(train: list[Question], test: list[Question]) -> dict[str, float]:
    """Accuracy a kind of the answer that each text, or else its template, had most often in training."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for q in train:
        for words in (q.text, template(q.text)):
            answers[words][q.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for q in test:
        words = q.text if sum(answers[q.text].values()) >= 20 else template(q.text)
        right[q.kind].append(answers[words].most_common(1)[0][0] == q.answer)
    return {kind: float(np.mean(r)) for kind, r in right.items()}


def test_questions_come_with_pictures_tones_or_both_and_with_tones_alone_where_they_tell_enough() -> None:
    media = Counter((s.image is not None, s.audio is not None) for s in scenes.samples("test"))
    assert set(media) == {(True, False), (True, True), (False, True)}
    assert min(media.values()) > 300
    assert {s.kind for s in scenes.samples("test") if s.image is None} == {"existence", "colour", "count"}


def test_no_answer_can_be_guessed_from_the_words() -> None:
    train, test = ([Question(s.kind, s.text, s.label) for s in scenes.samples(part)] for part in ("train", "test"))
    yes_no = [[q for q in part if q.answer in ("yes", "no")] for part in (train, test)]
    assert max(by_words_alone(*yes_no).values()) < 0.55
    assert by_words_alone(*yes_no).keys() == {"existence", "relation", "implication"}
    others = [[q for q in part if q.answer not in ("yes", "no")] for part in (train, test)]
    guessed = by_words_alone(*others)
    assert guessed["colour"] < 1 / 8 + 0.05
    assert guessed["relation"] < 1 / 5 + 0.1
    assert guessed["count"] < 0.5
    for part in (train, test):
        said = Counter((q.kind, q.answer) for q in part)
        for kind in ("existence", "relation", "implication"):
            assert 0.45 < said[kind, "yes"] / (said[kind, "yes"] + said[kind, "no"]) < 0.55


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_train_and_test_share_no_scene_and_no_caption() -> None:
    train, test = drawn("train", 3000), drawn("test", 1000)
    assert len({s.meaning for s in test}) == len({scenes.caption(s) for s in test}) == 1000
    assert len({scenes.tones(s).tobytes() for s in test}) == 1000
    assert len({frozenset(s.things) for s in train}) == 3000
    for seed in (0, 1):
        other = drawn("train", 3000, seed)
        assert not {s.meaning for s in other} & {s.meaning for s in test}
        for of in (scenes.caption, lambda s: scenes.tones(s).tobytes(), lambda s: scenes.draw(s).tobytes()):
            assert not {of(s) for s in other} & {of(s) for s in test}
    test_clips, train_clips = drawn_clips("test", 300), drawn_clips("train", 1000)
    assert len({c.told for c in test_clips}) == 300
    assert not {c.told for c in test_clips} & {c.told for c in train_clips}
    assert 0.15 < np.mean([part_of(f"x{i}") == "test" for i in range(2000)]) < 0.25


def test_the_new_shape_is_in_new_scenes_alone() -> None:
    assert all(s.things[0].shape == NEW_SHAPE for s in drawn("new", 300))
    texts = [scenes.caption(s) for part in ("train", "test") for s in drawn(part, 1000)]
    texts += [f"{s.text} {s.label}" for part in ("train", "test") for s in scenes.samples(part)]
    assert not any(NEW_SHAPE in text for text in texts)


def test_each_seed_gives_its_own_scenes_and_always_the_same() -> None:
    for draw in (drawn, drawn_clips):
        assert draw("train", 20, 1) == draw("train", 20, 1) != draw("train", 20, 2)


@pytest.mark.parametrize("call", [scenes.samples, scenes.captions, lambda s: next(scenes.clips(s, 0))])
def test_an_unknown_split_is_refused(call: object) -> None:
    with pytest.raises(InputError, match="no split 'new'"):
        call("new")
    with pytest.raises(InputError, match="use train or test"):
        call("validation")


def test_a_model_that_embeds_gets_captions_and_others_questions() -> None:
    image = {"output": {"kind": "embeddings"}, "image": {"size": 8}, "text": {"max_tokens": 64}, "audio": None}
    recipe = Recipe(name="r", data="scenes", calibration=16)
    calibration, verification = split(recipe, lambda: image)
    assert len(calibration) == 16
    assert len(verification) == len({s.text for s in verification}) == 1000
    assert all(s.text == s.label and s.image and s.audio is None for s in [*calibration, *verification])
    sound = {**image, "image": None, "audio": {"rate": 16_000}}
    assert all(s.audio and s.image is None and s.text for s in split(recipe, lambda: sound)[1])
    labels = {**image, "output": {"kind": "labels"}}
    assert {s.kind for s in split(recipe, lambda: labels)[1]} > {"relation", "implication"}


# ---- clips ----------------------------------------------------------------------------------------------------------


def area(picture: np.ndarray, thing: Thing) -> int:
    return int((picture == COLOURS[thing.colour]).all(-1).sum())


def test_clips_show_what_their_subtitles_tell() -> None:
    courses: Counter[str] = Counter()
    for clip in drawn_clips():
        shown, (guest, target, mover) = scenes.frames(clip), clip.things
        assert (shown.shape, shown.dtype) == ((FRAMES, 64, 64, 3), np.uint8)
        assert len({t.colour for t in clip.things}) == 3
        assert all(area(picture, t) > 5 for picture in shown for t in (target, mover)), "both are seen throughout"
        _, still, track = clip.tracks
        assert len(set(still)) == 1
        reach = SIZES[mover.size] + SIZES[target.size]
        for event, subtitle in zip(clip.events, scenes.subtitles(clip), strict=True):
            at, before, after = event.frame, shown[event.frame - 1], shown[event.frame]
            assert subtitle.start_s == at / FPS < subtitle.end_s <= FRAMES / FPS
            assert subtitle.text.startswith(f"the {event.subject} {'moves ' * (event.kind == 'onto')}{event.kind}")
            apart = math.dist(track[at], still[at])
            if event.kind in ("appears", "vanishes"):
                assert (area(before, guest) > 5, area(after, guest) > 5) == (
                    event.kind != "appears",
                    event.kind == "appears",
                )
            elif event.kind in ("starts", "leaves"):
                assert len(set(track[:at])) == 1
                assert track[at] != track[at - 1]
                assert (math.dist(track[0], still[0]) < 9) == (event.kind == "leaves")
            else:
                assert track[at] != track[at - 1]
                assert event.kind == "stops" or apart < (9 if event.kind == "onto" else reach + 2)
                assert (len(set(track[at:])) == 1) == (event.kind != "hits")
            courses[event.kind] += 1
    assert min(courses[kind] for kind in ("appears", "vanishes", "starts", "onto", "hits", "leaves", "stops")) > 5


def test_wrong_times_and_roles_are_false_of_the_clip() -> None:
    for clip in drawn_clips():
        told = {(event.frame / FPS, event.text) for event in clip.events}
        times = scenes.wrong_times(clip)
        assert sorted(s.text for s in times) == sorted(event.text for event in clip.events)
        assert [(s.start_s, s.end_s) for s in times] == [(s.start_s, s.end_s) for s in scenes.subtitles(clip)]
        assert sum((s.start_s, s.text) not in told for s in times) >= 2
        roles = scenes.wrong_roles(clip)
        mover, target = clip.things[2].name, clip.things[1].name
        assert sum((s.start_s, s.text) not in told for s in roles) == 2, "all but what comes or goes"
        assert {s.text for s in roles} == {
            event.text.replace(mover, "#").replace(target, mover).replace("#", target) for event in clip.events
        }


def test_questions_about_clips_are_right_and_can_not_be_guessed() -> None:
    rng, asked = random.Random(0), []
    for clip in drawn_clips(count=1500):
        shown, last = {}, scenes.frames(clip)[-1] if len(asked) < 300 else None
        for event in clip.events:
            shown[event.text] = event.frame
        for q in scenes.clip_questions(clip, rng):
            asked.append(q)
            if q.kind == "existence" and last is not None:
                assert q.text == f"is there a {clip.things[0].name} at the end?"
                assert q.answer == ("yes" if area(last, clip.things[0]) else "no")
            elif q.kind == "relation":
                who, what, word, other = re.fullmatch(
                    r"does (.+) (appear|vanish) (before|after) (.+)\?", q.text
                ).groups()
                first = shown[f"{who} {what}{'s' if what == 'appear' else 'es'}"]
                right = first < shown[other] if word == "before" else first > shown[other]
                assert q.answer == ("yes" if right else "no")
            elif q.kind == "implication":
                who, whom = re.fullmatch(r"has (.+) just moved onto (.+)\?", q.text).groups()
                at = shown.get(f"{who} moves onto {whom}")
                assert q.answer == ("no" if at is None else "yes")
                assert at is None or FRAMES - 1 - at < FPS, "within the last second"
    guessed = by_words_alone(asked[::2], asked[1::2])
    assert guessed.keys() == {"existence", "relation", "implication"}
    assert max(guessed.values()) < 0.57


def late(clip: Clip, by: int, keep: float, rng: random.Random) -> list[Subtitle]:
    told = scenes.subtitles(clip)
    kept = [s for s in told if rng.random() < keep] or [rng.choice(told)]
    return [replace(s, start_s=s.start_s + by / FPS, end_s=s.end_s + by / FPS) for s in kept]


@pytest.mark.parametrize(("keep", "noise"), [(1.0, 0), (0.7, 0), (0.4, 0), (0.7, 10)])
def test_a_planted_offset_is_found_within_a_frame_on_95_percent_of_clips(keep: float, noise: int) -> None:
    rng, pixels, found = random.Random(1), np.random.default_rng(1), []
    for clip in drawn_clips("test", 200):
        shown, by = scenes.frames(clip), rng.randint(-8, 8)
        shown = (shown + pixels.normal(0, noise, shown.shape)).clip(0, 255).astype(np.uint8) if noise else shown
        try:
            found.append(abs(drift(shown, late(clip, by, keep, rng), FPS) - by) <= 1)
        except InputError:
            found.append(False)
    assert np.mean(found) >= 0.95


def test_subtitles_of_another_clip_are_refused() -> None:
    first, other = drawn_clips(count=2)
    with pytest.raises(InputError, match="have what they tell in the frames"):
        drift(scenes.frames(first), scenes.subtitles(other), FPS)
    with pytest.raises(InputError, match="0% of 0"):
        drift(scenes.frames(first), [Subtitle(0, 1, "silence")], FPS)


# ---- files ----------------------------------------------------------------------------------------------------------


def content(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def rows(path: Path) -> list[dict[str, object]]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def rewrite(path: Path, changed: list[dict[str, object]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(changed), path)


def change(path: Path, **values: object) -> None:
    rewrite(path, [row | values for row in rows(path)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scenes") / "data"
    scenes.write(directory, 0, SMALL)
    return directory


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_a_seed_is_written_the_same_each_time(written: Path, tmp_path: Path) -> None:
    scenes.write(tmp_path / "again", 0, SMALL)
    scenes.write(tmp_path / "other", 1, SMALL)
    assert content(tmp_path / "again") == content(written)
    assert content(tmp_path / "other") != content(written)


def test_what_is_written_is_read_as_a_users_data(written: Path) -> None:
    parts = manifest.read(written / "questions.parquet", 0.0)
    by_name = {part: {s.id: s for s in scenes.samples(part)} for part in ("train", "test")}
    for part, count in (("train", SMALL.train), ("test", SMALL.test)):
        assert len({s.group for s in parts[part]}) == count
        for sample in parts[part]:
            same = by_name[part][sample.id]
            assert (sample.text, sample.label, sample.kind) == (same.text, same.label, same.kind)
            for there, kept in ((sample.image, same.image), (sample.audio, same.audio)):
                assert (there and there.read_bytes()) == kept
    captions = manifest.read(written / "captions.parquet", 0.0)
    assert {part: len(found) for part, found in captions.items()} == {"train": SMALL.train, "test": SMALL.test}
    same = {s.id: s for s in scenes.captions("test")}
    assert all(s.audio.read_bytes() == same[s.id].audio and s.label == same[s.id].label for s in captions["test"])
    negatives = Counter(s.label for part in manifest.read(written / "negatives.parquet", 0.0).values() for s in part)
    assert negatives["yes"] == negatives["no"] > 10
    assert len(rows(written / "new.parquet")) == SMALL.new
    assert not (written / "speech").exists()


def test_clips_come_back_as_they_were(written: Path) -> None:
    parts = scenes.read_clips(written / "clips.parquet", 0.0)
    for part, count in (("train", SMALL.train_clips), ("test", SMALL.test_clips)):
        for stored, clip in zip(parts[part], drawn_clips(part, count), strict=True):
            np.testing.assert_array_equal(scenes.read_frames(stored.frames), scenes.frames(clip))
            assert stored.subtitles == tuple(scenes.subtitles(clip))
            assert stored.wrong_times == tuple(scenes.wrong_times(clip))
            assert stored.wrong_roles == tuple(scenes.wrong_roles(clip))
            assert (stored.fps, stored.late, len(stored.questions)) == (FPS, 0, 3)


def test_speech_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    if not shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    scenes.write(tmp_path / "data", 0, replace(SMALL, train_spoken=1, test_spoken=2))
    parts = manifest.read(tmp_path / "data/speech.parquet", 0.0)
    assert [len(parts[part]) for part in ("train", "test")] == [1, 2]
    assert parts["test"][0].label == scenes.captions("test")[0].label


def test_all_or_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="is there already"):
        scenes.write(tmp_path / "there", 0, SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        scenes.write(tmp_path / "file/data", 0, SMALL)
    monkeypatch.setattr("edgemm.data._scene_files._write_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scenes.write(tmp_path / "data", 0, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


@pytest.mark.parametrize("sizes", [replace(SMALL, train=0), replace(SMALL, test=0), replace(SMALL, new=-1)])
def test_sizes_that_make_no_data_set_are_refused(tmp_path: Path, sizes: scenes.Sizes) -> None:
    with pytest.raises(InputError, match="is too few"):
        scenes.write(tmp_path / "data", 0, sizes)


def test_check_counts_what_is_right(written: Path) -> None:
    negatives = len(rows(written / "negatives.parquet"))
    assert scenes.check(written) == {"captions": 18, "negatives": negatives, "clips": 7}


@pytest.mark.parametrize("column", ["image", "audio", "caption"])
def test_check_finds_text_that_is_not_of_its_picture_or_sound(copied: Path, column: str) -> None:
    found = rows(copied / "captions.parquet")
    a, b = (row for row in found if row["split"] == "test" and row["id"] in ("test-00000", "test-00001"))
    a[column], b[column] = b[column], a[column]
    rewrite(copied / "captions.parquet", found)
    with pytest.raises(InputError, match="2 of 18 rows can't be used, first test-00000: a "):
        scenes.check(copied)


def test_check_finds_a_negative_that_is_true(copied: Path) -> None:
    found = rows(copied / "negatives.parquet")
    found[3]["label"] = "no" if found[3]["label"] == "yes" else "yes"
    rewrite(copied / "negatives.parquet", found)
    with pytest.raises(InputError, match=f"first {found[3]['id']}"):
        scenes.check(copied)


def test_drift_is_repaired_said_and_what_can_not_be_repaired_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "clips.parquet"
    before, found = scenes.read_clips(path, 0.0), rows(path)
    for row, frames in zip(found, (4, -3, 1, 0, 0, 0, 0), strict=True):
        for name in ("subtitles", "wrong_times", "wrong_roles"):
            for subtitle in row[name]:
                subtitle["start_s"] += frames / FPS
                subtitle["end_s"] += frames / FPS
    rewrite(path, found)
    after = scenes.read_clips(path, 0.0)
    assert "subtitles of 2 of 7 clips set right, train-clip-00000's by -4 frames" in capsys.readouterr().err
    assert [clip.late for clip in after["train"]] == [4, -3, 0, 0]
    for i in (0, 1, 3):
        assert replace(after["train"][i], late=0) == before["train"][i]
    found[6]["subtitles"] = found[5]["subtitles"]
    rewrite(path, found)
    with pytest.raises(InputError, match=r"1 of 7 rows can't be used, first test-clip-00002: .*subtitles") as e:
        scenes.read_clips(path, 0.1)
    assert "data_tolerance" in str(e.value)
    assert len(scenes.read_clips(path, 0.2)["test"]) == 2


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda d: (d / "clips.parquet").write_bytes(b"PAR1"), "cannot read"),
        (lambda d: rewrite(d / "clips.parquet", [{"id": "x"}]), "no column split"),
        (lambda d: (d / "clips/train-clip-00001.png").unlink(), "train-clip-00001.*No such file"),
        (lambda d: (d / "clips/train-clip-00001.png").write_bytes(b"\x89PNG"), "train-clip-00001.*cannot read"),
        (lambda d: change(d / "clips.parquet", split="dev"), "not as it was written: KeyError.'dev'"),
        (lambda d: change(d / "clips.parquet", fps=0.0), "7 of 7 rows can't be used"),
        (lambda d: change(d / "clips.parquet", subtitles=[{"text": "x"}]), "not as it was written: TypeError"),
        (lambda d: Image.new("RGB", (64, 100)).save(d / "clips/test-clip-00000.png"), "no square frames"),
    ],
)
def test_broken_clips_are_refused(copied: Path, damage: object, match: str) -> None:
    damage(copied)
    with pytest.raises(InputError, match=match):
        scenes.read_clips(copied / "clips.parquet", 0.0)


def test_the_command_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--train", "3", "--test", "2", "--new", "0", "--train-clips", "1", "--test-clips", "0"]
    out = str(tmp_path / "data")
    assert scenes.main(["write", out, "--seed", "5", *few]) == 0
    assert scenes.main(["check", out]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == out
    assert "5 captions" in shown.out
    assert scenes.main(["write", out]) == 2
    assert "fix: name a new directory" in capsys.readouterr().err
    assert scenes.main(["check", str(tmp_path)]) == 2
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["data"]'
