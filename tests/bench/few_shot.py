"""A shape that training never saw, the cross, learned from 1, 5 and 10 examples: prototypes and soft prompts.

    .venv/bin/python tests/bench/few_shot.py MODEL|BUNDLE [--task find_image] [--soft-prompts MODEL] [--draws 40]

A model that finds pictures is asked which of six shapes the one thing of a picture is; a model that answers is asked
whatever the scenes' questions ask. All is of scenes that training could not see: known labels have up to `--known`
examples each of the first half of the test scenes and are judged on the second, the cross on what a draw did not take
as an example. Each draw has other examples: the mean of all, and between which two figures 95 % of the draws lie.
"known without" is where no cross was learned.

`--soft-prompts`: the checkpoint whose text encoder reads them; the pictures' embeddings are the first model's.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgemm import console
from edgemm.data import scenes as world
from edgemm.inspection import opened
from edgemm.models import find_family, read_model
from edgemm.reasoner.soft_prompts import learn_prompts
from edgemm.runtime.few_shot import Linear, prototypes
from edgemm.runtime.preprocess import read_tokenizer
from edgemm.runtime.query import Query
from edgemm.runtime.session import Session

SHOTS = (1, 5, 10)
SEED = 1000  # no training and no data set has it
NEW = "cross"
Learn = Callable[[Any, Sequence[str]], Linear]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model makes of inputs: embeddings [N,D], the right answers, and the answers of its own, if it has any."""

    x: Any
    right: Any
    own: Any | None

    def take(self, index: Any) -> Asked:
        return Asked(self.x[index], self.right[index], None if self.own is None else self.own[index])


def pictures(split: str, count: int) -> Iterator[tuple[Query, str]]:
    """`count` pictures of one thing, no two alike, with its shape; a test split has few such scenes a seed."""
    seen: set[bytes] = set()
    for seed in range(SEED, SEED + 1000):
        for scene in islice(world.scenes(split, seed), 400):
            if len(scene.things) > 1:
                continue
            picture = world.png(world.draw(scene))
            if picture not in seen:
                seen.add(picture)
                yield Query(image=picture), scene.things[0].shape
                if len(seen) == count:
                    return


def questions(split: str, count: int) -> Iterator[tuple[Query, str]]:
    """Questions about `count` scenes; of the new ones those that a cross answers, which no question names."""
    rng = random.Random(SEED)
    found = 0
    for scene in world.scenes(split, SEED):
        wanted = world.questions(scene, rng)
        if split == "new":
            wanted = [q for q in wanted if q.answer == NEW and NEW not in q.text]
        if wanted:
            picture = world.png(world.draw(scene))
            yield from ((Query(image=picture, text=q.text), q.answer) for q in wanted)
            if (found := found + 1) == count:
                return


def ask(session: Session, rows: Iterator[tuple[Query, str]]) -> Asked:
    queries, right = zip(*rows, strict=True)
    made = session.run_many(queries)
    kind = session.output["kind"]
    tensor = session.output["tensor"] if kind == "labels" else session.output["tensors"]["image"]
    own = np.array([answer.answer for answer in made]) if kind == "labels" else None
    return Asked(np.stack([answer.outputs[tensor] for answer in made]), np.array(right), own)


def judged(found: Linear, asked: Asked) -> Any:
    """The answers: the learned label, but the model's own where it has one and the learned one is not new."""
    best = np.array(found.labels)[(asked.x @ found.weights.T + found.biases).argmax(1)]
    return best if asked.own is None else np.where(best == NEW, best, asked.own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--task", help="of a model that has several, such as find_image")
    parser.add_argument("--soft-prompts", type=Path, metavar="MODEL")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--known", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=1000, help="of each split")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with opened(given.model, given.task) as session:
        compare(session, given)


def compare(session: Session, given: argparse.Namespace) -> None:
    rows = questions if session.output["kind"] == "labels" else pictures
    held_out = ask(session, rows("test", given.scenes))
    half = len(held_out.x) // 2
    base, test = held_out.take(slice(half)), held_out.take(slice(half, None))
    new = ask(session, rows("new", given.scenes // 4))
    learners: dict[str, Learn] = {"prototypes": prototypes}
    if given.soft_prompts:
        model = read_model(find_family(given.soft_prompts), given.soft_prompts)
        words = read_tokenizer((given.soft_prompts / "tokenizer.json").read_bytes(), "tokenizer.json")

        def prompts(x: Any, labels: Sequence[str]) -> Linear:
            names, weights = learn_prompts(model, words, torch.from_numpy(x), labels)
            return Linear(names, weights.double().numpy(), np.zeros(len(names)))

        learners["soft prompts"] = prompts
    table = []
    for name, learn in learners.items():
        figures = [draw(learn, given.known, base, test, new, seed) for seed in range(given.draws)]
        for at, shots in enumerate(SHOTS):
            row = (name, shots, *(spread(column) for column in zip(*(f[at] for f in figures), strict=True)))
            console.log(" ".join(map(str, row)))
            table.append(row)
    title = f"{given.model}: judged on {len(new.x)} inputs with a cross and {len(test.x)} without; {given.draws} draws"
    console.table(title, ("learned by", "examples", "cross", "known", "known without"), table)


def draw(learn: Learn, known: int, pool: Asked, test: Asked, new: Asked, seed: int) -> list[tuple[float, float, float]]:
    """For each of SHOTS the shares of 1: inputs with a cross that are right, those without, and and before a cross."""
    rng = np.random.default_rng(seed)
    labels = np.unique(pool.right)
    base = pool.take(np.concatenate([rng.permutation(np.flatnonzero(pool.right == c))[:known] for c in labels]))
    order = rng.permutation(len(new.x))
    rest = new.take(order[max(SHOTS) :])
    before = judged(learn(base.x, [*base.right]), test) == test.right
    made = []
    for shots in SHOTS:
        few = new.take(order[:shots])
        found = learn(np.concatenate([base.x, few.x]), [*base.right, *few.right])
        cross, after = (judged(found, asked) == asked.right for asked in (rest, test))
        made.append((float(cross.mean()), float(after.mean()), float(before.mean())))
    return made


def spread(values: Sequence[float]) -> str:
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
