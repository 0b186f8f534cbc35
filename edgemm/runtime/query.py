"""What a session is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError

Array = NDArray[Any]
Tensors = Mapping[str, Array]
Call = Callable[[Tensors], dict[str, Array]]
Outputs = dict[str, Array]
ANSWERING = ("labels", "generation", "transcript")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What a model's encoders made of one medium: `Session.encode` makes it, and `run` takes it for the medium.

    tensors   by name, with the batch axis: embeddings, or what the model joins with other modalities
    model     what says that it is of the same model
    """

    modality: str
    tensors: dict[str, Array]
    model: str


@dataclass(frozen=True, slots=True)
class Query:
    """One input; what is absent is None. Media are files, their bytes, or encoded already.

    boxes    a box [x0,y0,x1,y1] in 0..1000 for each word of `text`
    tensors  inputs that come ready made, by name, without the batch axis
    """

    image: Path | str | bytes | Encoded | None = None
    text: str | Encoded | None = None
    audio: Path | str | bytes | Encoded | None = None
    boxes: tuple[tuple[int, int, int, int], ...] | None = None
    tensors: dict[str, Array] | Encoded | None = field(default=None, compare=False)


def query_of(row: Mapping[str, Any]) -> Query:
    """The Query with these fields; InputError for other names, and for media that are no file, bytes or text."""
    if strays := [str(name) for name in row if name not in Query.__dataclass_fields__]:
        raise InputError(f"an input has {strays[0]!r}"[:200], fix=f"give {', '.join(Query.__dataclass_fields__)}")
    for name, kinds in (("image", (Path, str, bytes)), ("text", (str,)), ("audio", (Path, str, bytes))):
        if not isinstance(row.get(name), (*kinds, Encoded, type(None))):
            raise InputError(f"{name} is {row[name]!r}"[:200], fix=f"give {' or '.join(k.__name__ for k in kinds)}")
    return Query(**row)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model made of one input.

    answer       the best label or the text; None for models that only embed
    probability  of the label, or that the two modalities belong together
    outputs      the tensors behind it, by name, without the batch axis
    """

    answer: str | None
    probability: float | None
    outputs: dict[str, Array]

    def as_json(self, kind: str) -> dict[str, Any]:
        """Answer and probability where there are any; the tensors of models that only embed."""
        found: dict[str, Any] = {"answer": self.answer} if self.answer is not None else {}
        if self.probability is not None:
            found["probability"] = round(self.probability, 6)
        return found if kind in ANSWERING else {**found, "outputs": {n: v.tolist() for n, v in self.outputs.items()}}

    def summary(self) -> str:
        """One line for people."""
        if self.probability is not None:
            return f"{self.probability:.4f}"
        return ", ".join(f"{n} {list(v.shape)}, norm {np.linalg.norm(v):.4f}" for n, v in self.outputs.items())


def answer_of(known: Tensors, output: Mapping[str, Any], sources: Iterable[str]) -> Answer:
    """The answer in one sample's tensors [1, ...]: a label, or embeddings and how well they match.

    output   program.json's, of kind labels, embeddings or features;  sources   the modalities that errors name
    """
    needed = InputError("the model needs more than that", fix=f"give {' and '.join(sources)}")
    if output["kind"] == "labels":
        if output["tensor"] not in known:
            raise needed
        logits = known[output["tensor"]][0]
        best = int(logits.argmax())
        probability = float(activate(logits, output["activation"])[best])
        return Answer(output["labels"][best], probability, {output["tensor"]: logits})
    names = list(output["tensors"].values() if output["kind"] == "embeddings" else output["tensors"])
    found = {n: known[n][0] for n in (*names, output.get("match")) if n in known}
    if not found:
        raise needed
    if output["kind"] != "embeddings" or any(n not in found for n in names):
        return Answer(None, None, found)
    if output["match"]:
        return Answer(None, float(activate(found[output["match"]], "softmax")[1]), found)
    if output["activation"] == "sigmoid":
        similarity = np.dot(found[names[0]], found[names[1]])
        return Answer(None, float(activate(output["scale"] * similarity + output["bias"], "sigmoid")), found)
    return Answer(None, None, found)


def activate(logits: Array, activation: str) -> Array:
    """Probabilities of logits float[..., A]: "sigmoid" of each, or "softmax" over the last axis."""
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
