"""A compiled model and its pre- and post-processing: what answers on the device.

A model is a dataflow of components joined by tensor names: a component runs as soon as its inputs
are there, and one whose inputs can't be had (its modality is absent) is neither run nor loaded.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgemm.errors import InputError
from edgemm.plugins import validate
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.component import Compile, components
from edgemm.runtime.exits import exits, leave
from edgemm.runtime.generation import pieces, tokens
from edgemm.runtime.media import Media
from edgemm.runtime.pictures import pixels, uri, whole
from edgemm.runtime.program import Generation, Program
from edgemm.runtime.query import Answer, Array, Call, Encoded, Outputs, Query, Tensors, answer_of, query_of
from edgemm.runtime.recurrence import read_chunks

MAX_BATCH = 16


class Session:
    """Runs a model from its files; any number of threads may use one at a time.

    files    name -> bytes: program.json's component files and the tokenizer
    program  program.json; see program.py. Texts are padded where its shapes are fixed
    where    what errors call the model
    compile_component  spec of a component -> its call; by default what the program's backend makes of `files`
    sha256   of the bundle: sessions of the same one share what is compiled, and it is kept on disk (cache.py)
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        program: dict[str, Any],
        where: str,
        compile_component: Compile | None = None,
        sha256: str | None = None,
    ) -> None:
        checked = validate(Program, program, f"{where}: program")
        self.files = files
        self.program = checked.model_dump()
        self.sources = checked.sources()
        self.output = self.program["output"]
        self.needs = checked.output.needs
        self.exits = exits(self.output)
        self.own = checked.output.own if isinstance(checked.output, Generation) else set()
        self.model = sha256 or f"{where} {id(self)}"
        if compile_component is None:
            engine = importlib.import_module(f"edgemm.runtime.{self.program['backend']}")
            settings = self.program["settings"] | {"cache": sha256 is not None}

            def compile_component(spec: dict[str, Any]) -> Call:
                return engine.compile_component(files, spec, settings)

        self.components = components(self.program["components"], self.sources, compile_component, sha256)
        self.decoder = self.output["decoder"] if self.output["kind"] == "generation" else None
        self.fixed = {
            (port["name"], axis): size
            for component in self.components.values()
            for port in component.spec["inputs"]
            for axis, size in enumerate(port["shape"])
            if isinstance(size, int)
        }
        self.media = Media(files, self.program, self.sources, self.fixed, self.model)
        self.observe: Callable[[str, Tensors], None] | None = None

    def run(
        self,
        *,
        image: Path | str | bytes | Encoded | None = None,
        text: str | Encoded | None = None,
        audio: Path | str | bytes | Encoded | None = None,
        boxes: tuple[tuple[int, int, int, int], ...] | None = None,
        tensors: dict[str, Array] | Encoded | None = None,
    ) -> Answer:
        """Answer one input, of whichever modalities the model takes."""
        return self.answer(Query(image, text, audio, boxes, tensors))

    def run_many(self, queries: Sequence[Query | Mapping[str, Any]]) -> list[Answer]:
        """Answer many, in order, each a Query or what `run` takes, by name; each distinct medium is encoded once."""
        asked = [q if isinstance(q, Query) else query_of(q) for q in queries]
        rows = zip(asked, self._evaluate(asked), strict=True)
        if self.output["kind"] in ("generation", "transcript"):
            return [self._answer_of(q, known) for q, known in rows]
        return [answer_of(known, self.output, self.sources) for _, known in rows]

    def answer(self, query: Query) -> Answer:
        return self.run_many([query])[0]

    def encode(self, **medium: Any) -> Encoded:
        """Run the encoders of one `image=`, `text=` or `audio=`, once: `run` and `run_many` take the result for it."""
        parts = self.media.parts(query_of(medium))
        if len(parts) != 1:
            raise InputError(f"{' and '.join(medium)} can't be encoded alone", fix="give one image, text or recording")
        (((modality, _), make),) = parts.items()
        return Encoded(modality, self._encoded(make), self.model)

    def stream(
        self,
        *,
        image: Path | str | bytes | Encoded | None = None,
        text: str | Encoded | None = None,
        audio: Path | str | bytes | Encoded | None = None,
    ) -> Iterator[str]:
        """The text that `run` answers, word by word as it is made; of a beam search, all of it at its end."""
        if self.decoder is None or self.output["picture"]:
            raise InputError("the model writes no text token by token", fix="use run, or leave --stream out")
        query = Query(image, text, audio)
        (known,) = self._evaluate([query])
        return pieces(self._texts(query, known))

    def outputs(self, queries: Sequence[Query]) -> Outputs:
        """What metrics judge, of all queries in order; edgemm/metrics/__init__.py lists it by output kind."""
        kind = self.output["kind"]
        if kind in ("generation", "transcript"):  # a few at a time: what a text is made of is megabytes
            made: list[dict[str, Any]] = []
            for start in range(0, len(queries), MAX_BATCH):
                chunk = queries[start : start + MAX_BATCH]
                made += [self._made(q, r) for q, r in zip(chunk, self._evaluate(chunk), strict=True)]
            found = ("text", "picture") if self.output.get("picture") else ("text",)
            return {name: np.array([m[name] for m in made]) for name in found}
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
        return {name: value for part in self.media.parts(query).values() for name, value in part().items()}

    def infer(self, tensors: Tensors, *, alone: bool = False) -> dict[str, Array]:
        """All tensors that can be computed from `tensors`, by running the components whose inputs are there.

        A decoder that generates is not run: `generate` does that; nor is what is behind the exit of a sure row.
        alone   they are of one medium of several: what hangs on which others there are is not run
        """
        known, left_out = dict(tensors), {self.decoder, *(self.components.joint if alone else ())}
        for name, (inputs, outputs) in self.components.ports.items():
            if name not in left_out and inputs <= known.keys() and not outputs <= known.keys():
                component = self.components[name]
                if component.spec["state"]:
                    known.update(read_chunks(component, known, self.observe))
                    continue
                if self.observe:
                    self.observe(name, {n: known[n] for n in inputs})
                known.update(component(known))
                for tensor in outputs & self.exits.keys():
                    if left := leave(known, tensor, self.exits[tensor], self.output["tensor"], self.infer):
                        return left
        return known

    def generate(self, known: Tensors, prompt_text: str | Encoded | None = None) -> list[int]:
        """Token ids that the decoder makes of one sample's tensors, without prompt and end.

        prompt_text   what the text begins with, for models that take such a one
        """
        return list(self.tokens(known, prompt_text))

    def tokens(self, known: Tensors, prompt_text: str | Encoded | None = None) -> Iterator[int]:
        """What `generate` gives, as it is made."""
        component = self.components[self.decoder or ""]
        inputs = [port["name"] for port in component.spec["inputs"]]
        if set(inputs) - self.own - known.keys():
            raise InputError("the model needs more than that", fix=f"give {' and '.join(self.sources)}")
        prompt = list(self.output["prompt"])
        if isinstance(prompt_text, str) and self.output["text_prompt"]:
            prompt += self.media.tokenizer.encode(prompt_text, add_special_tokens=False).ids
        with component.call() as run:

            def call(tensors: Tensors) -> Mapping[str, Array]:
                if self.observe:
                    self.observe(component.spec["name"], {name: np.copy(tensors[name]) for name in inputs})
                return run(tensors)

            yield from tokens(call, component.spec, self.output, known, prompt)

    def complete(self, tensors: Tensors, prompt_text: str | Encoded | None = None) -> Any:
        """From pre-processed tensors to all that the model computes of them: what a latency measurement times."""
        known = self.infer(tensors)
        if self.decoder is None:
            return known
        ids = self.generate(known, prompt_text)
        return self.picture(ids) if self.output["picture"] else ids

    def picture(self, ids: Sequence[int]) -> Array:
        """What the model makes of the ids of its decoder, float32[3,H,W], -1..1; of models that make pictures."""
        spec = self.output["picture"]
        made: Array = self.infer({spec["ids"]: whole(ids, spec["count"])})[spec["tensor"]][0]
        return made

    def _evaluate(self, queries: Sequence[Query]) -> list[dict[str, Array]]:
        """The tensors that the answer needs, of each query.

        Each distinct medium is encoded once; what joins modalities runs in batches of equal shapes.
        """
        if not queries:
            raise InputError("there is nothing to run", fix="give at least one input")
        parts = [self.media.parts(q) for q in queries]
        distinct = {key: make for part in parts for key, make in part.items()}
        self.components.load({modality for modality, medium in distinct if not isinstance(medium, Encoded)})
        encoded = {key: self._encoded(make) for key, make in distinct.items()}
        rows = [{n: v for key in part for n, v in encoded[key].items()} for part in parts]
        batch = min(
            (self.fixed.get((p["name"], 0), MAX_BATCH) for c in self.components.values() for p in c.spec["inputs"]),
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
                    rows[i] = {n: v[at : at + 1] for n, v in joined.items() if n in self._wanted[1]}
        return rows

    def _encoded(self, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """What is to be kept of one medium: the tensors that its encoders end with."""
        return {name: value for name, value in self.infer(make(), alone=True).items() if name in self._wanted[0]}

    @cached_property
    def _wanted(self) -> tuple[set[str], set[str]]:
        """Tensors that must outlive the encoders, because they join modalities, and those that the answer needs."""
        answer, joining = set(self.needs), set()
        for name, (inputs, _) in self.components.ports.items():
            if name == self.decoder:
                answer |= inputs
            elif len(self.components.origins[name]) > 1 or name in self.components.joint:
                joining |= inputs
        return joining | answer, answer

    def _answer_of(self, query: Query, known: Tensors) -> Answer:
        if not self.output.get("picture"):
            return Answer(self._text_of(query, known), None, {})
        picture = self.picture(self.generate(known, query.text))
        return Answer(uri(picture), None, {self.output["picture"]["tensor"]: picture})

    def _made(self, query: Query, known: Tensors) -> dict[str, Any]:
        """The text; of a picture its pixels, and its ids as words: metrics of words count those that differ."""
        if not (spec := self.output.get("picture")):
            return {"text": self._text_of(query, known)}
        ids = self.generate(known, query.text)
        return {"text": " ".join(map(str, whole(ids, spec["count"])[0].tolist())), "picture": pixels(self.picture(ids))}

    def _text_of(self, query: Query, known: Tensors) -> str:
        if self.output["kind"] == "transcript":
            ids = known[self.output["tensor"]][0].argmax(-1)
            kept = ids[np.flatnonzero(np.diff(ids, prepend=-1))]  # CTC: repeats are one, blanks are none
            ids = kept[kept != self.output["blank"]].tolist()
        else:
            ids = self.generate(known, query.text)
        return self._written(query, ids)

    def _texts(self, query: Query, known: Tensors) -> Iterator[str]:
        """The answer after each token."""
        ids: list[int] = []
        for token in self.tokens(known, query.text):
            ids.append(token)
            yield self._written(query, ids)

    def _written(self, query: Query, ids: list[int]) -> str:
        text = str(self.media.tokenizer.decode(ids, skip_special_tokens=True)).strip()
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
    """Check a bundle, every byte of it -> a session, which compiles what it needs for this device when it needs it.

    require_signature  PEM file of the public key or certificates that it must be signed for; see signature.py
    """
    bundle = read_bundle(Path(path), None if require_signature is None else Path(require_signature))
    return Session(bundle.files, bundle.manifest["program"], str(path), sha256=bundle.sha256)
