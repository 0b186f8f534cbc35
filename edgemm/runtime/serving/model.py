"""A bundle as the server runs it: its components, and how requests become rows and rows become answers."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgemm.errors import InputError
from edgemm.plugins import validate
from edgemm.runtime.audio import audio_to_features
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.preprocess import image_to_pixels, read_tokenizer, text_to_tensors
from edgemm.runtime.program import Generation, Program
from edgemm.runtime.query import Array, Tensors, answer_of
from edgemm.runtime.serving.decoder import IDS, PROMPT, Decoder
from edgemm.runtime.serving.engine import Engine, close
from edgemm.runtime.serving.options import Options
from edgemm.runtime.serving.work import Plan, Source

BUCKET = 8  # texts are padded to a multiple of this many tokens
SHORT_TEXT = 64  # tokens; longer texts are padded to powers of two
SAMPLE = 1024  # elements of a free axis, in what a component is measured on


class Model:
    """One bundle, checked, compiled and measured.

    path               an .edgemm file or directory;  require_signature  see signature.py
    Raises InputError for a bundle that is not to be used, ToolchainError when this machine can't run it.
    """

    def __init__(self, path: Path, options: Options, require_signature: Path | None = None) -> None:
        bundle = read_bundle(path, require_signature)
        checked = validate(Program, bundle.manifest["program"], f"{path}: program")
        self.name, self.version = bundle.manifest["model"], str(bundle.version)
        self.sha256, self.path = bundle.sha256, path
        self.program = checked.model_dump()
        self.output, self.text = self.program["output"], self.program["text"]
        self.backend = self.program["backend"]
        if self.output.get("picture"):
            raise InputError(f"{path}: {self.name} makes pictures, which are not served", fix="use edgemm run")
        if any(c["state"] for c in self.program["components"]):
            raise InputError(f"{path}: {self.name} watches, which is not served", fix="use edgemm watch")
        self.prompted = bool(self.output.get("text_prompt"))
        self.sources = checked.sources()
        if self.prompted:
            self.sources["text"] = {PROMPT}
        self.tokenizer = None
        if self.text or "tokenizer" in self.output:
            self.tokenizer = read_tokenizer(bundle.files["tokenizer.json"], "tokenizer.json")
        self.buckets = self._buckets()
        own = checked.output.own if isinstance(checked.output, Generation) else set()
        library = importlib.import_module(f"edgemm.runtime.{self.backend}")
        settings = {**self.program["settings"], "streams": options.streams, "cache": True}
        settings["threads"] = max(settings["threads"], options.streams)
        self.engines: list[Engine] = []
        for spec in self.program["components"]:

            def compile_(spec: dict[str, Any]) -> Any:
                return library.compile_component(bundle.files, spec, settings)

            if spec["name"] == self.output.get("decoder"):
                self.engines.append(Decoder(spec, compile_, options.streams, self.output, own))
            else:
                fixed = self.backend == "openvino"
                sizes = _sizes(spec, self.program["profiles"], options.max_batch_size, fixed)
                self.engines.append(Engine(spec, compile_, sizes, options.streams, fixed=fixed))
        self.ports = {p["name"]: p for e in self.engines for p in e.spec["inputs"]}
        self.outputs = {name: shape for engine in self.engines for name, shape in engine.outputs.items()}
        self._measure()
        self.plan = lru_cache(64)(self._plan)

    def _buckets(self) -> list[int]:
        """Lengths that texts are padded to; none where padding would change the answer."""
        if not self.text or not self.text["mask"] or self.text["pad_to"] or self.text["boxes"] or self.prompted:
            return []
        most, specs = self.text["max_tokens"], self.program["components"]
        fixed = next((p["shape"][1] for c in specs for p in c["inputs"] if p["name"] == self.text["ids"]), most)
        if isinstance(fixed, int) and self.backend != "openvino":
            return [fixed]
        if most <= SHORT_TEXT:
            return [*range(BUCKET, most, BUCKET), most]
        return [*(1 << n for n in range(4, most.bit_length()) if 1 << n < most), most]

    def _measure(self) -> None:
        """Send a sample of each length through every component: compiles, measures, learns which outputs are as long.

        A length at which the same text comes out otherwise than at the longest is not padded to.
        """
        longest: dict[str, Array] = {}
        for bucket in reversed(self.buckets or [0]):
            known = {name: self._sample(name, bucket) for tensors in self.sources.values() for name in tensors}
            try:
                for engine in self.engines:
                    known |= engine.learn({name: known[name] for name in engine.inputs})
            except InputError:
                if not longest:
                    raise
                self.buckets.remove(bucket)
                continue
            longest = longest or known
            if any(not self._same(known[name], longest[name]) for name in self.outputs.keys() - {IDS}):
                self.buckets.remove(bucket)

    def _same(self, value: Array, at_longest: Array) -> bool:
        """Whether a text's output is the same at both lengths, padding aside."""
        for axis, (size, most) in enumerate(zip(value.shape, at_longest.shape, strict=True)):
            if size != most:
                heard = (*[slice(None)] * axis, slice(self.buckets[0] // 2))
                value, at_longest = value[heard], at_longest[heard]
        return close(value, at_longest)

    def _sample(self, name: str, length: int) -> Array:
        """A row of this input: free axes up to SAMPLE long, a text half as long as the shortest bucket and padded."""
        if name == PROMPT:
            return np.zeros((1, 0), np.int64)
        specs = self.program["components"]
        most = {axis: size for c in specs for axis, size in c["max_sizes"].items()}
        least = {axis: size for c in specs for axis, size in c["min_sizes"].items()}
        port = self.ports[name]
        shape = [a if isinstance(a, int) else max(least.get(a, 1), min(most.get(a, 1), SAMPLE)) for a in port["shape"]]
        if not length or name not in self.sources["text"]:
            return np.ones([1, *shape[1:]], port["dtype"])
        made = np.zeros([1, length], port["dtype"])
        heard = self.buckets[0] // 2
        is_ids = name == self.text["ids"]
        made[:, heard:] = self.text["pad_id"] if is_ids else 0
        made[:, :heard] = np.arange(heard) % 2 if is_ids else name == self.text["mask"]
        return made

    @cached_property
    def text_axes(self) -> set[tuple[str, int]]:
        """(tensor, axis) of outputs that are as long as the text."""
        found = set()
        for engine in self.engines:
            for name, axes in engine.seen.items() if not isinstance(engine, Decoder) else ():
                for axis, sizes in enumerate(zip(*axes, strict=True)):
                    if len(set(sizes)) > 1:
                        found.add((name, axis))
        return found

    def _plan(self, given: frozenset[str], wanted: frozenset[str]) -> Plan:
        """How the modalities `given` make the tensors `wanted`; all that end somewhere, when none is named.

        Raises InputError when they can't.
        """
        origins = {name: modality for modality in given for name in self.sources[modality]}
        known: set[str] = set(origins)
        able: list[Engine] = []
        for engine in self.engines:
            if set(engine.inputs) <= known and not engine.outputs.keys() <= known:
                able.append(engine)
                known |= engine.outputs.keys()
        made = known - origins.keys()
        if unknown := sorted(wanted - self.outputs.keys()):
            raise InputError(f"the model makes no {unknown[0][:80]!r}", fix=f"ask for {_listed(self.outputs)}")
        if not made or wanted - made:
            absent = sorted(set(self.sources) - given)
            raise InputError(f"the model needs more than {_listed(given)}", fix=f"give {_listed(absent)} too")
        if not wanted:
            read = {name for engine in able for name in engine.inputs}
            wanted = frozenset(made - read)
        needed: set[str] = set(wanted)
        engines: list[Engine] = []
        for engine in reversed(able):
            if needed & engine.outputs.keys():
                engines.insert(0, engine)
                needed |= set(engine.inputs)
        used = {name: origin for name, origin in origins.items() if name in needed}
        return Plan(self.name, self.sha256.encode(), used, tuple(engines), wanted)

    def answer_plan(self, given: frozenset[str]) -> Plan:
        """What /v1/answer runs: all of the answer that these modalities give."""
        needs = {IDS} if self.output["kind"] == "generation" else self._needs()
        if self.output["kind"] in ("embeddings", "features"):
            origins = {n for modality in given for n in self.sources[modality]}
            for engine in self.engines:
                origins |= engine.outputs.keys() if set(engine.inputs) <= origins else set()
            needs = (needs & origins) or needs
        return self.plan(given, frozenset(needs))

    def _needs(self) -> set[str]:
        output = self.output
        if output["kind"] in ("labels", "transcript"):
            return {output["tensor"]}
        if output["kind"] == "features":
            return set(output["tensors"])
        return {*output["tensors"].values(), *([output["match"]] if output["match"] else [])}

    def pad(self, tensors: dict[str, Array]) -> dict[str, Array]:
        """A text's tensors [1,T], padded to the next bucket."""
        length = next(iter(tensors.values())).shape[1]
        bucket = next((b for b in self.buckets if b >= length), length)
        if bucket == length or not self.text:
            return tensors
        fill = {self.text["ids"]: self.text["pad_id"]}
        return {
            n: np.pad(v, ((0, 0), (0, bucket - length)), constant_values=fill.get(n, 0)) for n, v in tensors.items()
        }

    def medium(self, modality: str, content: bytes | str, boxes: Any = None) -> dict[str, Array]:
        """Read an image, a recording or a text -> its tensors; InputError when it can't be."""
        if modality == "image":
            return {self.program["image"]["tensor"]: image_to_pixels(content, self.program["image"])}
        if modality == "audio":
            return audio_to_features(content, self.program["audio"])
        assert isinstance(content, str)
        assert self.tokenizer
        if self.prompted:
            ids = self.tokenizer.encode(content, add_special_tokens=False).ids
            return {PROMPT: np.array([ids], np.int64)}
        tensors: dict[str, Array] = dict(text_to_tensors(content, boxes, self.text, self.tokenizer, 0))
        return self.pad(tensors) if self.buckets else self._lengthen(tensors)

    def _lengthen(self, tensors: dict[str, Array]) -> dict[str, Array]:
        """A text's tensors as long as a component with one fixed length wants them."""
        fixed = self.ports[self.text["ids"]]["shape"][1]
        missing = fixed - next(iter(tensors.values())).shape[1] if isinstance(fixed, int) else 0
        fill = {self.text["ids"]: self.text["pad_id"]}
        return {
            n: np.pad(v, ((0, 0), (0, max(0, missing)), *[(0, 0)] * (v.ndim - 2)), constant_values=fill.get(n, 0))
            for n, v in tensors.items()
        }

    def answer(self, found: Tensors, text: str | None) -> dict[str, Any]:
        """As `edgemm run --json` prints it."""
        kind = self.output["kind"]
        if kind not in ("generation", "transcript"):
            return answer_of(found, self.output, self.sources).as_json(kind)
        assert self.tokenizer
        if kind == "generation":
            ids = found[IDS][0].tolist()
        else:
            best = found[self.output["tensor"]][0].argmax(-1)
            kept = best[np.flatnonzero(np.diff(best, prepend=-1))]
            ids = kept[kept != self.output["blank"]].tolist()
        answer = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return {"answer": f"{text} {answer}".strip() if text and self.prompted else answer}


def digest_of(*parts: bytes | str) -> bytes:
    """What tells a medium from every other."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        made.update(len(data).to_bytes(8, "little"))
        made.update(data)
    return made.digest()


def tensors_source(tensors: Mapping[str, Array]) -> Source:
    """A source of tensors that came with the request."""
    parts: list[bytes | str] = ["tensors"]
    for name in sorted(tensors):
        parts += [name, str(tensors[name].shape), np.ascontiguousarray(tensors[name]).data.cast("B").tobytes()]
    return Source(digest_of(*parts), tensors)


def _sizes(spec: dict[str, Any], profiles: dict[str, Any], most: int, fixed: bool) -> list[int]:
    """Batch sizes that are worth compiling or measuring."""
    ports = [*spec["inputs"], *spec["outputs"]]
    if not all(port["shape"] for port in ports):
        return [1]
    if not fixed and any(isinstance(port["shape"][0], int) for port in ports):
        return [1]
    for shapes in profiles.get(spec["name"], {}).values():
        most = min(most, shapes["max"][0])
    return [*(1 << n for n in range(most.bit_length()) if 1 << n < most), most]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
