"""The table of a scenes reasoner's card: what it gets right in each of its tasks, on scenes that training never sees.

The figures are those of the deployed graphs: sessions of the FP32 graphs, or of bundles.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.metrics._retrieval import found
from edgemm.runtime.measure import WARM_UP, peak_memory_mb
from edgemm.runtime.query import Query
from edgemm.runtime.session import Session

TASKS = ("answer", "find_image", "find_audio", "caption")
SCENES = 1000
TIMED = 200  # questions
MODALITIES = ("text", "image", "audio")
REASONING = ("relation", "implication")
KS = (1, 5, 10)
NEEDS = ("asked", "caption", "draw", "hard_negatives", "is_true", "png", "tones", "wav")


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of the table. n: of how many; value: a share of 1, unless the name says otherwise."""

    task: str
    name: str
    n: int
    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A scene of the test split as a query, what is asked of it, and what is said of it.

    query   image and audio;  questions  (kind, text, answer);  wrong  captions that are just not true
    """

    scene: Any
    query: Query
    questions: tuple[Any, ...]
    caption: str
    wrong: tuple[str, ...]


def shown(world: ModuleType, count: int = SCENES) -> list[Shown]:
    """The first `count` scenes of the test split. InputError for data that draws none."""
    if lacking := [name for name in NEEDS if not hasattr(world, name)]:
        raise InputError(f"{world.__name__} has no {lacking[0]}()", fix="give data that draws scenes: scenes")
    return [
        Shown(
            scene,
            Query(image=world.png(world.draw(scene)), audio=world.wav(world.tones(scene))),
            tuple(questions),
            world.caption(scene),
            tuple(negative.text for negative in world.hard_negatives(scene)),
        )
        for _, scene, questions in world.asked("test", 0, count)
    ]


def scorecard(task: str, session: Session, world: ModuleType, count: int = SCENES) -> list[Row]:
    """The rows of a task, one of TASKS, on the first `count` scenes of the test split."""
    made = {"answer": answers, "find_image": finding, "find_audio": finding, "caption": captions}[task]
    return [replace(row, task=task) for row in made(session, shown(world, count), world)]


def answers(session: Session, scenes: list[Shown], world: ModuleType) -> Iterator[Row]:
    """Accuracy by kind, by subset of the modalities and by level; how many leave at each exit."""
    del world
    asked = [(s, q) for s in scenes for q in s.questions]
    queries = [replace(s.query, text=q.text, audio=None) for s, q in asked]
    exits, left = session.exits, Counter[str]()

    def count(name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        left[name] += len(next(iter(tensors.values())))

    truth, kinds = np.array([q.answer for _, q in asked]), np.array([q.kind for _, q in asked])
    session.observe = count
    said = labels(session, queries)
    session.observe = None
    yield share("questions", said == truth)
    for kind in dict.fromkeys(kinds.tolist()):
        yield share(kind, (said == truth)[kinds == kind])
    hard = np.isin(kinds, REASONING)
    yield Row("", "macro-F1 of relation and implication", int(hard.sum()), macro_f1(said[hard], truth[hard]))
    for level, ends in (("level 1", "exit_1"), ("level 2", "exit_2"), ("level 3", None)):
        session.exits = {ends: 0.0} if ends else {}
        yield share(f"{level} alone", labels(session, queries) == truth)
    session.exits = exits
    for level in ("level_2", "level_3"):
        if level in session.components:
            name = f"questions that reach {level.replace('_', ' ')}"
            yield Row("", name, len(asked), left[level] / len(asked))
    for given in (subset for n in (3, 2, 1) for subset in combinations(MODALITIES, n)):
        yield share("given " + " + ".join(given), right_of(session, scenes, given))
    yield from cost(session, queries[:: len(queries) // min(TIMED, len(queries))])


def cost(session: Session, queries: list[Query]) -> Iterator[Row]:
    """Of one question at a time, pre-processed: mean latency with exits and without, in turn; memory alone."""
    exits, tensors = session.exits, [session.tensors(q) for q in queries]

    def ms(given: dict[str, NDArray[Any]], used: dict[str, float]) -> float:
        session.exits = used
        begin = time.perf_counter()
        session.complete(given)
        return (time.perf_counter() - begin) * 1e3

    for given in tensors[:WARM_UP]:
        ms(given, exits), ms(given, {})
    times = np.array([(ms(given, {}), ms(given, exits)) for given in tensors])
    session.exits = exits
    whole, early = times.mean(0)
    yield Row("", "ms a question, mean", len(times), float(early))
    yield Row("", "times faster by leaving early", len(times), float(whole / early))
    if not any(name.endswith((".xml", ".onnx")) for name in session.files):
        return  # graphs that were made for this process alone
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**session.files, "program.json": json.dumps(session.program).encode()}.items():
            place = Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        yield Row("", "peak memory of a process, GB", 1, peak_memory_mb(Path(folder), tensors[0]) / 1e3)


def right_of(session: Session, scenes: list[Shown], given: tuple[str, ...]) -> NDArray[np.bool_]:
    """Which answers are right when only these modalities are given; without text: how many things there are."""
    queries, truth = [], []
    for s in scenes:
        media = Query(**{m: getattr(s.query, m) for m in given if m != "text"})
        if "text" in given:
            queries += [replace(media, text=q.text) for q in s.questions]
            truth += [q.answer for q in s.questions]
        else:
            queries.append(media)
            truth.append(str(len(s.scene.things)))
    return labels(session, queries) == np.array(truth)


def labels(session: Session, queries: list[Query]) -> NDArray[np.str_]:
    outputs = session.outputs(queries)
    best: NDArray[np.str_] = outputs["labels"][outputs["logits"].argmax(1)]
    return best


def macro_f1(said: NDArray[np.str_], truth: NDArray[np.str_]) -> float:
    """F1 of each answer that is right somewhere, averaged over answers."""
    f1 = [2 * ((said == c) & (truth == c)).sum() / ((said == c).sum() + (truth == c).sum()) for c in np.unique(truth)]
    return float(np.mean(f1))


def finding(session: Session, scenes: list[Shown], world: ModuleType) -> Iterator[Row]:
    """Recall both ways among all scenes; captions that are just not true told from the true one."""
    del world
    (modality,) = set(session.output["tensors"]) - {"text"}
    pairs = [Query(**{modality: getattr(s.query, modality)}, text=s.caption) for s in scenes]
    outputs = session.outputs(pairs)
    each = np.arange(len(scenes))
    for query, item in (("text", modality), (modality, "text")):
        for k in KS:
            yield share(f"{query} to {item}, recall@{k}", found(outputs, outputs, each, k, query, item))
    if not (told := [s for s in scenes if s.wrong]):
        return
    vectors, matches = [], []
    for s in told:
        medium = {modality: getattr(s.query, modality)}
        made = session.run_many([Query(**medium, text=text) for text in (s.caption, *s.wrong)])
        one, other = (np.stack([a.outputs[session.output["tensors"][m]] for a in made]) for m in (modality, "text"))
        vectors.append((one * other).sum(1))
        matches.append(np.array([a.probability or 0.0 for a in made]))
    yield share("hard negatives, by similarity", first_is_most(vectors))
    if session.output["match"]:
        yield share("hard negatives, by matching", first_is_most(matches))


def first_is_most(rows: Iterable[NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether the first value of each row is over all others."""
    return np.array([row[0] > row[1:].max() for row in rows])


def captions(session: Session, scenes: list[Shown], world: ModuleType) -> Iterator[Row]:
    """Captions that are true, word for word those of the data set, and BLEU-4."""
    texts = session.outputs([Query(image=s.query.image) for s in scenes])
    targets = [s.caption for s in scenes]
    told = zip(texts["text"], scenes, strict=True)
    yield share("true", np.array([world.is_true(text, list(s.scene.things)) for text, s in told]))
    for name, title in (("exact_match", "word for word"), ("bleu", "BLEU-4")):
        yield share(title, plugins.plugin("metrics", name).values(texts, texts, targets))


def share(name: str, right: NDArray[Any]) -> Row:
    return Row("", name, len(right), float(np.mean(right)))


def markdown(rows: list[Row], data: str) -> str:
    """The table of a model card."""
    lines = [f"| Task | On the test split of {data} | n | |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {r.task} | {r.name} | {r.n} | {r.value:.4f} |" for r in rows]
    return "\n".join(lines) + "\n"
