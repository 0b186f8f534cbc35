"""A compiled model and its pre- and post-processing: what answers on the device.

A model is a dataflow of components joined by tensor names: a component runs as soon as its inputs
are there, and one whose inputs can't be had (its modality is absent) is not run.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgemm.errors import InputError
from edgemm.plugins import validate
from edgemm.runtime.audio import audio_to_features
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.generation import generate
from edgemm.runtime.preprocess import image_to_pixels, read_tokenizer, text_to_tensors
from edgemm.runtime.program import Generation, Program
from edgemm.runtime.query import Answer, Array, Call, Outputs, Query, Tensors, answer_of

MAX_BATCH = 16


class Session:
    """Runs a model from its files.

    files    name -> bytes: program.json's component files and the tokenizer
    program  program.json; see program.py. Texts are padded where its shapes are fixed
    where    what errors call the model
    compile_component  spec of a component -> its call; by default what the program's backend makes of `files`
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        program: dict[str, Any],
        where: str,
        compile_component: Callable[[dict[str, Any]], Call] | None = None,
    ) -> None:
        checked = validate(Program, program, f"{where}: program")
        self.program = checked.model_dump()
        self.sources = checked.sources()
        self.output = self.program["output"]
        self.needs = checked.output.needs
        self.own = checked.output.own if isinstance(checked.output, Generation) else set()
        if compile_component is None:
            engine = importlib.import_module(f"edgemm.runtime.{self.program['backend']}")

            def compile_component(spec: dict[str, Any]) -> Call:
                return engine.compile_component(files, spec, self.program["settings"])

        self.tokenizer: Tokenizer | None = None
        if self.program["text"] or "tokenizer" in self.output:
            self.tokenizer = read_tokenizer(files["tokenizer.json"], "tokenizer.json")
        self.components = {spec["name"]: (spec, compile_component(spec)) for spec in self.program["components"]}
        self.decoder = self.output["decoder"] if self.output["kind"] == "generation" else None
        self.fixed = {
            (port["name"], axis): size
            for spec, _ in self.components.values()
            for port in spec["inputs"]
            for axis, size in enumerate(port["shape"])
            if isinstance(size, int)
        }
        self.observe: Callable[[str, Tensors], None] | None = None

    def run(
        self,
        *,
        image: Path | str | bytes | None = None,
        text: str | None = None,
        audio: Path | str | bytes | None = None,
        boxes: tuple[tuple[int, int, int, int], ...] | None = None,
        tensors: dict[str, Array] | None = None,
    ) -> Answer:
        """Answer one input, of whichever modalities the model takes."""
        return self.answer(Query(image, text, audio, boxes, tensors))

    def run_many(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer many, in order; each distinct image, text and recording is encoded once."""
        rows = zip(queries, self._evaluate(queries), strict=True)
        if self.output["kind"] in ("generation", "transcript"):
            return [Answer(self._text_of(q, known), None, {}) for q, known in rows]
        return [answer_of(known, self.output, self.sources) for _, known in rows]

    def answer(self, query: Query) -> Answer:
        return self.run_many([query])[0]

    def outputs(self, queries: Sequence[Query]) -> Outputs:
        """What metrics judge, of all queries in order; edgemm/metrics/__init__.py lists it by output kind."""
        kind = self.output["kind"]
        if kind in ("generation", "transcript"):  # a few at a time: what a text is made of is megabytes
            texts = []
            for start in range(0, len(queries), MAX_BATCH):
                chunk = queries[start : start + MAX_BATCH]
                texts += [self._text_of(q, r) for q, r in zip(chunk, self._evaluate(chunk), strict=True)]
            return {"text": np.array(texts)}
        rows = self._evaluate(queries)
        if kind == "labels":
            logits = np.concatenate([r[self.output["tensor"]] for r in rows])
            return {"logits": logits, "labels": np.array(self.output["labels"])}
        names = self.output["tensors"]
        if kind == "embeddings":
            for query, row in zip(queries, rows, strict=True):
                if absent := [m for m, name in names.items() if name not in row]:
                    raise InputError(f"a sample has no {absent[0]}: {query}"[:200], fix=f"give pairs of {set(names)}")
            return {modality: np.concatenate([r[name] for r in rows]) for modality, name in names.items()}
        return {name: _stack([r[name] for r in rows]) for name in names}

    def tensors(self, query: Query) -> dict[str, Array]:
        """Pre-process what the query holds. InputError when it holds nothing that the model takes."""
        return {name: value for part in self._parts(query).values() for name, value in part().items()}

    def _parts(self, query: Query) -> dict[tuple[str, Any], Callable[[], dict[str, Array]]]:
        """(modality, medium) -> how to pre-process it, for each modality that the query holds."""
        image, text, audio, tensors = query.image, query.text, query.audio, query.tensors
        given = {"image": image, "text": text, "audio": audio, "tensors": tensors}
        for modality, value in given.items():
            if value is not None and modality not in self.sources:
                raise InputError(f"the model takes no {modality}", fix=f"it takes {' and '.join(self.sources)}")
        if all(value is None for value in given.values()):
            raise InputError("there is nothing to run", fix=f"give {' and '.join(self.sources)}")
        parts: dict[tuple[str, Any], Callable[[], dict[str, Array]]] = {}
        if image is not None:
            parts["image", image] = lambda: self.image_tensors(image)
        if text is not None and not self.output.get("text_prompt"):
            parts["text", (text, query.boxes)] = lambda: self.text_tensors(text, query.boxes)
        if audio is not None:
            parts["audio", audio] = lambda: audio_to_features(audio, self.program["audio"])
        if tensors is not None:
            parts["tensors", id(tensors)] = lambda: self._ready_made(tensors)
        return parts

    def image_tensors(self, image: Path | str | bytes) -> dict[str, Array]:
        spec = self.program["image"]
        return {spec["tensor"]: image_to_pixels(image, spec)}

    def text_tensors(self, text: str, boxes: tuple[tuple[int, int, int, int], ...] | None = None) -> dict[str, Array]:
        spec = self.program["text"]
        assert self.tokenizer
        return text_to_tensors(text, boxes, spec, self.tokenizer, self.fixed.get((spec["ids"], 1), 0))

    def _ready_made(self, tensors: dict[str, Array]) -> dict[str, Array]:
        wanted = self.sources["tensors"]
        if wanted != tensors.keys():
            raise InputError(f"tensors are {', '.join(tensors)}", fix=f"the model takes {', '.join(sorted(wanted))}")
        return {name: np.asarray(value)[None] for name, value in tensors.items()}

    def infer(self, tensors: Tensors) -> dict[str, Array]:
        """All tensors that can be computed from `tensors`, by running the components whose inputs are there.

        A decoder that generates is not run: `generate` does that.
        """
        known = dict(tensors)
        for name, (spec, call) in self.components.items():
            ready = all(port["name"] in known for port in spec["inputs"])
            if name != self.decoder and ready and not all(port["name"] in known for port in spec["outputs"]):
                if self.observe:
                    self.observe(name, {port["name"]: known[port["name"]] for port in spec["inputs"]})
                known.update({out: value.copy() for out, value in call(known).items()})
        return known

    def generate(self, known: Tensors, prompt_text: str | None = None) -> list[int]:
        """Token ids that the decoder makes of one sample's tensors, without prompt and end.

        prompt_text   what the text begins with, for models that take such a one
        """
        spec, call = self.components[self.decoder or ""]
        if {port["name"] for port in spec["inputs"]} - self.own - known.keys():
            raise InputError("the model needs more than that", fix=f"give {' and '.join(self.sources)}")
        prompt = list(self.output["prompt"])
        if prompt_text and self.output["text_prompt"]:
            assert self.tokenizer
            prompt += self.tokenizer.encode(prompt_text, add_special_tokens=False).ids
        if self.observe:
            plain, observe = call, self.observe

            def call(tensors: Tensors) -> dict[str, Array]:
                observe(spec["name"], {port["name"]: np.copy(tensors[port["name"]]) for port in spec["inputs"]})
                return plain(tensors)

        return generate(call, spec, self.output, known, prompt)

    def complete(self, tensors: Tensors, prompt_text: str | None = None) -> Any:
        """From pre-processed tensors to all that the model computes of them: what a latency measurement times."""
        known = self.infer(tensors)
        return self.generate(known, prompt_text) if self.decoder else known

    def _evaluate(self, queries: Sequence[Query]) -> list[dict[str, Array]]:
        """The tensors that the answer needs, of each query.

        Each distinct medium is encoded once; what joins modalities runs in batches of equal shapes.
        """
        if not queries:
            raise InputError("there is nothing to run", fix="give at least one input")
        parts = [self._parts(q) for q in queries]
        distinct = {key: make for part in parts for key, make in part.items()}
        wanted, answer = self._wanted()
        encoded: dict[tuple[str, Any], dict[str, Array]] = {}
        for key, make in distinct.items():
            known = self.infer(make())
            encoded[key] = {name: value for name, value in known.items() if name in wanted}
        rows = [{n: v for key in part for n, v in encoded[key].items()} for part in parts]
        batch = min(
            (self.fixed.get((p["name"], 0), MAX_BATCH) for s, _ in self.components.values() for p in s["inputs"]),
            default=MAX_BATCH,
        )
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            alike[tuple((n, v.shape) for n, v in row.items())].append(i)
        for indices in alike.values():
            for start in range(0, len(indices), batch):
                chunk = indices[start : start + batch]
                joined = self.infer({n: np.concatenate([rows[i][n] for i in chunk]) for n in rows[chunk[0]]})
                for at, i in enumerate(chunk):
                    rows[i] = {n: v[at : at + 1] for n, v in joined.items() if n in answer}
        return rows

    def _wanted(self) -> tuple[set[str], set[str]]:
        """Tensors that must outlive the encoders, because they join modalities, and those that the answer needs."""
        answer = set(self.needs)
        origin = {name: {modality} for modality, names in self.sources.items() for name in names}
        joining: set[str] = set()
        for name, (spec, _) in self.components.items():
            inputs = [port["name"] for port in spec["inputs"]]
            from_ = set().union(*(origin.get(n, set()) for n in inputs))
            if name == self.decoder:
                answer |= set(inputs)
            elif len(from_) > 1:
                joining |= set(inputs)
            origin |= {port["name"]: from_ for port in spec["outputs"]}
        return joining | answer, answer

    def _text_of(self, query: Query, known: Tensors) -> str:
        if self.output["kind"] == "transcript":
            ids = known[self.output["tensor"]][0].argmax(-1)
            kept = ids[np.flatnonzero(np.diff(ids, prepend=-1))]  # CTC: repeats are one, blanks are none
            ids = kept[kept != self.output["blank"]].tolist()
        else:
            ids = self.generate(known, query.text)
        assert self.tokenizer
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return f"{query.text} {text}".strip() if query.text and self.output.get("text_prompt") else text


def _stack(rows: list[Array]) -> Array:
    """[1, ...] each -> [n, ...], shorter ones padded with zeros."""
    largest = np.max([r.shape[1:] for r in rows], axis=0)
    return np.concatenate(
        [np.pad(r, [(0, 0), *((0, int(m) - s) for m, s in zip(largest, r.shape[1:], strict=True))]) for r in rows]
    )


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


def load_bundle(path: Path | str, *, require_signature: Path | str | None = None) -> Session:
    """Check a bundle, every byte of it, and compile it for this device.

    require_signature  PEM file of the public key or certificates that it must be signed for; see signature.py
    """
    bundle = read_bundle(Path(path), None if require_signature is None else Path(require_signature))
    return Session(bundle.files, bundle.manifest["program"], str(path))
