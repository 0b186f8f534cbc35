"""A compiled model and its pre- and post-processing: what answers on the device.

A model is a dataflow of components joined by tensor names: a component runs as soon as its inputs
are there, and one whose inputs can't be had (its modality is absent) is not run.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError
from edgemm.plugins import validate
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.preprocess import image_to_pixels, read_tokenizer, text_to_ids
from edgemm.runtime.program import Program

Tensors = Mapping[str, NDArray[Any]]
MAX_BATCH = 16


@dataclass(frozen=True, slots=True)
class Query:
    """One input: a file of an image (or its bytes) and a question."""

    image: Path | str | bytes
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The best label, its softmax probability, and the logits float32[A]."""

    answer: str
    probability: float
    logits: NDArray[np.float32]


class Session:
    """Runs a model from its files.

    files    name -> bytes: program.json's component files and the tokenizer
    program  program.json; see program.py. Texts are padded where its shapes are fixed
    where    what errors call the model
    """

    def __init__(self, files: Mapping[str, bytes], program: dict[str, Any], where: str) -> None:
        self.program = validate(Program, program, f"{where}: program").model_dump()
        engine = importlib.import_module(f"edgemm.runtime.{self.program['backend']}")
        fixed = {
            (port["name"], axis): size
            for component in self.program["components"]
            for port in component["inputs"]
            for axis, size in enumerate(port["shape"])
            if isinstance(size, int)
        }
        self.batch = fixed.get((self.program["image"]["tensor"], 0), MAX_BATCH)
        self.tokens = fixed.get((self.program["text"]["ids"], 1), 0)
        self.tokenizer = read_tokenizer(files[self.program["text"]["tokenizer"]], "tokenizer.json")
        self.components = [
            (component, engine.compile_component(files, component, self.program["settings"]))
            for component in self.program["components"]
        ]

    def run(self, *, image: Path | str | bytes, text: str) -> Answer:
        """Answer one question about one image."""
        return self.run_many([Query(image, text)])[0]

    def run_many(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer many; each distinct image and text is encoded once, the rest runs in batches of equal length."""
        output = self.program["output"]
        logits = self.logits(queries)
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = shifted / shifted.sum(1, keepdims=True)
        best = logits.argmax(1)
        return [
            Answer(output["labels"][b], float(p[b]), row)
            for b, p, row in zip(best.tolist(), probabilities, logits, strict=True)
        ]

    def logits(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """float32[len(queries), A], in order."""
        image_of = {q.image: i for i, q in enumerate(queries)}
        text_of = {q.text: i for i, q in enumerate(queries)}
        encoded_images = {k: self.infer(self.image_tensors(k)) for k in image_of}
        encoded_texts = {k: self.infer(self.text_tensors(k)) for k in text_of}
        ids = self.program["text"]["ids"]
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, query in enumerate(queries):
            by_length[encoded_texts[query.text][ids].shape[1]].append(i)
        name = self.program["output"]["tensor"]
        out: NDArray[np.float32] | None = None
        for indices in by_length.values():
            for start in range(0, len(indices), self.batch):
                part = indices[start : start + self.batch]
                rows = [{**encoded_images[queries[i].image], **encoded_texts[queries[i].text]} for i in part]
                tensors = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
                values = self.infer(tensors)[name]
                if out is None:
                    out = np.empty((len(queries), values.shape[1]), np.float32)
                out[part] = values
        if out is None:
            raise InputError("there is nothing to run", fix="give at least one image and text")
        return out

    def image_tensors(self, image: Path | str | bytes) -> Tensors:
        spec = self.program["image"]
        return {spec["tensor"]: image_to_pixels(image, spec)}

    def text_tensors(self, text: str) -> Tensors:
        spec = self.program["text"]
        ids = text_to_ids(text, spec, self.tokenizer)
        mask = np.ones_like(ids)
        padding = ((0, 0), (0, max(0, self.tokens - ids.shape[1])))
        return {spec["ids"]: np.pad(ids, padding, constant_values=spec["pad_id"]), spec["mask"]: np.pad(mask, padding)}

    def infer(self, tensors: Tensors) -> dict[str, NDArray[Any]]:
        """All tensors that can be computed from `tensors`, by running the components whose inputs are there."""
        known = dict(tensors)
        for component, call in self.components:
            outputs = [port["name"] for port in component["outputs"]]
            ready = all(port["name"] in known for port in component["inputs"])
            if ready and not all(name in known for name in outputs):
                known.update({name: value.copy() for name, value in call(known).items()})
        return known


class Directory(Mapping[str, bytes]):
    """The files of a directory by name, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def __iter__(self) -> Iterator[str]:
        return (p.name for p in self.path.iterdir())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def open_directory(path: Path, **changes: Any) -> Session:
    """A session over a directory that holds program.json and its files; `changes` replace fields of the program."""
    files = Directory(path)
    return Session(files, {**json.loads(files["program.json"]), **changes}, str(path))


def load_bundle(path: Path | str) -> Session:
    """Check a bundle, every byte of it, and compile it for this device."""
    bundle = read_bundle(Path(path))
    return Session(bundle.files, bundle.manifest["program"], str(path))


def zeros(program: dict[str, Any]) -> Tensors:
    """Inputs of the right shapes for one sample: dynamic batch 1, every other dynamic axis at its largest."""
    made = {port["name"] for c in program["components"] for port in c["outputs"]}
    return {
        port["name"]: np.zeros(
            [1 if n == "batch" else c["max_sizes"].get(n, n) for n in port["shape"]], np.dtype(port["dtype"])
        )
        for c in program["components"]
        for port in c["inputs"]
        if port["name"] not in made
    }
