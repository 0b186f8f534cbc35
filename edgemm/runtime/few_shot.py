"""New classes and answers from a few examples, by what a model makes of them: nothing is trained, no torch.

Axes: N examples, C labels, D width of the embedding.

A label's prototype is the mean of its examples' embeddings (Snell et al. 2017), and distances are measured in units
of how embeddings of one label differ (Mahalanobis, as Bateni et al. 2020 have it), which the labels with many examples
tell for those with few. That is a linear classifier, so what is learned are C rows of D + 1 numbers. They are a file
of their own that names the bundle: the bundle stays as it was signed and certified. Probabilities are the softmax of
the scores; nothing calibrates them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from edgemm.artifact import canonical, write_atomic
from edgemm.errors import InputError
from edgemm.plugins import validate
from edgemm.runtime.inputs import Name
from edgemm.runtime.query import Answer, Query, activate
from edgemm.runtime.session import Session
from edgemm.yaml_files import Strict

MAX_BYTES = 1 << 26
FEW = 20  # examples that tell how far a label reaches
FOLDS = 5
FALSE_ALARMS = 0.1
RIDGE = 1e-3
Number = Annotated[float, Field(allow_inf_nan=False)]


class Learned(Strict):
    """A file that `edgemm learn` writes: label c scores weights[c] . embedding + biases[c]; softmax is its probability.

    model     what the embeddings are of: the SHA-256 of a bundle;  tensor  the model's output that is the embedding
    examples  how many each label was learned from
    """

    schema_: Literal[1] = Field(1, alias="schema")
    model: str
    tensor: Name
    labels: tuple[str, ...] = Field(min_length=2)
    examples: tuple[Annotated[int, Field(ge=1)], ...]
    weights: tuple[tuple[Number, ...], ...]
    biases: tuple[Number, ...]

    @model_validator(mode="after")
    def is_whole(self) -> Learned:
        """A row, a bias and a count for each label."""
        if len({len(self.labels), len(set(self.labels)), len(self.examples), len(self.weights), len(self.biases)}) > 1:
            raise ValueError("not one row of weights, bias and count for each of different labels")
        if len({len(row) for row in self.weights}) > 1:
            raise ValueError("rows of weights differ in length")
        return self

    def write(self, path: Path) -> None:
        write_atomic(path, canonical(self.model_dump(by_alias=True, mode="json")).encode())


def read_learned(path: Path) -> Learned:
    """The file at `path`, checked; InputError when it is none."""
    try:
        with path.open("rb") as f:
            content = f.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it is over {MAX_BYTES} bytes")
        values = json.loads(content)
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"cannot read {path}: {e}"[:200], fix="give a file that edgemm learn wrote") from e
    return validate(Learned, values, str(path))


@dataclass(frozen=True, slots=True)
class Linear:
    """weights float64[C,D] and biases float64[C] of the labels."""

    labels: tuple[str, ...]
    weights: NDArray[np.float64]
    biases: NDArray[np.float64]


def prototypes(embeddings: NDArray[Any], labels: Sequence[str], false_alarms: float = FALSE_ALARMS) -> Linear:
    """embeddings float[N,D] and the label of each -> the classifier by distance from prototypes.

    A few examples don't tell how far their label reaches. What labels with FEW examples or more tell is how often
    theirs would be taken for one of the others, by cross-validation: the others get the reach that makes it so often.

    false_alarms  that share, over 0 and under 1

    Raises InputError for fewer than two labels, and for another share.
    """
    if not 0 < false_alarms < 1:
        raise InputError(f"{false_alarms} is no share of false alarms", fix="give a number over 0 and under 1")
    names = tuple(dict.fromkeys(labels))
    if len(names) < 2:
        raise InputError(
            f"the examples have the label {names[0]!r} alone" if names else "there are no examples",
            fix="give examples of two labels or more: the new one, and what it must be told from",
        )
    x, of = np.asarray(embeddings, np.float64), np.array([names.index(label) for label in labels])
    weights, biases = _nearest(x, of)
    few = np.bincount(of) < FEW
    if few.any() and not few.all():
        fold = np.full(len(x), FOLDS)  # those few are in every fit
        for c in np.flatnonzero(~few):
            fold[of == c] = np.arange((of == c).sum()) % FOLDS
        margins = []
        for held_out in (fold == i for i in range(FOLDS)):
            weight, bias = _nearest(x[~held_out], of[~held_out])
            scores = x[held_out] @ weight.T + bias
            margins.append(scores[:, few].max(1) - scores[:, ~few].max(1))
        biases[few] -= np.quantile(np.concatenate(margins), 1 - false_alarms)
    return Linear(names, weights, biases)


def _nearest(x: NDArray[np.float64], of: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x [N,D] of labels int64[N] -> weights [C,D], biases [C]: minus half the squared distance, but for what all share.

    The covariance is that of the examples about their prototypes, and RIDGE of it in all directions alike. A prototype
    of n examples is off by chance, by 1/n of the examples' own squared distance from theirs: that is taken off again.
    """
    counts = np.bincount(of)
    means = np.stack([x[of == c].mean(0) for c in range(len(counts))])
    inside = x - means[of]
    sample, level = inside.T @ inside / max(1, len(x) - len(counts)), (inside**2).mean()
    # Examples that are their prototypes differ in no direction: then in all, by as much as they are apart.
    alike = RIDGE * level if level else x.var(0).mean() or 1.0
    precision = np.linalg.inv(sample + alike * np.eye(x.shape[1]))
    weights = means @ precision
    own = (precision * sample).sum()
    return weights, (own / counts - (weights * means).sum(1)) / 2


def learn(
    session: Session,
    queries: Sequence[Query],
    labels: Sequence[str],
    tensor: str | None = None,
    false_alarms: float = FALSE_ALARMS,
) -> Learned:
    """Prototypes of the examples `queries` with their `labels`; see `prototypes`.

    tensor  the output that is the embedding; None: the logits of a model that answers, the one output that the
            examples give of another

    Raises InputError for a model that writes text, for examples that make no such output or of several lengths.
    """
    if not queries:
        raise InputError("there are no examples", fix="give rows with an input and a label")
    made = _run(session, queries)
    names = set.intersection(*(set(answer.outputs) for answer in made))
    tensor = tensor or (min(names) if len(names) == 1 else None)
    if tensor not in names:
        what = f"no output {tensor!r} of all examples" if tensor else "examples do not give one output"
        raise InputError(what, fix=f"name one of {', '.join(sorted(names)) or 'what each of them gives'}")
    rows = [answer.outputs[tensor].ravel() for answer in made]
    if len(sizes := {len(row) for row in rows}) > 1:
        raise InputError(f"{tensor} has {min(sizes)} to {max(sizes)} values", fix="learn on an output of one size")
    found = prototypes(np.stack(rows), labels, false_alarms)
    return learned(session.model, tensor, found, labels)


def learned(model: str, tensor: str, found: Linear, labels: Sequence[str]) -> Learned:
    """What is written of a classifier that was learned from examples with these `labels`."""
    counts = tuple(list(labels).count(name) for name in found.labels)
    weights = tuple(tuple(row) for row in found.weights.tolist())
    biases = tuple(found.biases.tolist())
    return Learned(model=model, tensor=tensor, labels=found.labels, examples=counts, weights=weights, biases=biases)


class FewShot:
    """A session that answers with what was learned, too: it runs as the session does.

    Where the model has answers of its own, a label that is among them leaves the model's answer as it is.
    Raises InputError for what another model learned.
    """

    def __init__(self, session: Session, known: Learned) -> None:
        if known.model != session.model:
            raise InputError(
                f"it was learned by the bundle {known.model[:12]!r}, and this is {session.model[:12]!r}",
                fix="use the bundle that learned it, or run edgemm learn with this one",
            )
        self.session, self.known = session, known
        self.output = {"kind": "labels"}
        self.own = set(session.output.get("labels", ()))
        self.weights, self.biases = np.array(known.weights), np.array(known.biases)

    def run_many(self, queries: Sequence[Query | Mapping[str, Any]]) -> list[Answer]:
        """As Session.run_many; `probability` is the learned label's where that is the answer."""
        return [self._answer(answer) for answer in _run(self.session, queries)]

    def answer(self, query: Query) -> Answer:
        return self.run_many([query])[0]

    def _answer(self, answer: Answer) -> Answer:
        embedding = answer.outputs.get(self.known.tensor)
        if embedding is None or embedding.size != self.weights.shape[1]:
            have = "no" if embedding is None else f"{embedding.size} values of"
            raise InputError(
                f"the input gives {have} {self.known.tensor}, and {self.weights.shape[1]} values were learned",
                fix="give inputs of the modalities that the examples had",
            )
        chances = activate(self.weights @ embedding.ravel() + self.biases, "softmax")
        best = int(chances.argmax())
        label = self.known.labels[best]
        return answer if label in self.own else Answer(label, float(chances[best]), answer.outputs)


def _run(session: Session, queries: Sequence[Query | Mapping[str, Any]]) -> list[Answer]:
    if session.output["kind"] in ("generation", "transcript"):
        raise InputError("the model writes text and embeds nothing", fix="use a model that answers or embeds")
    return session.run_many(queries)
