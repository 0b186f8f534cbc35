"""What both protocols call: models by name, rows of requests through the scheduler, bundles exchanged in between."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from edgemm.errors import EdgemmError, InputError
from edgemm.runtime.preprocess import read_boxes
from edgemm.runtime.query import Array, Tensors
from edgemm.runtime.serving.checks import DATATYPES, check_audio, check_image, check_tensors
from edgemm.runtime.serving.decoder import PROMPT
from edgemm.runtime.serving.metrics import Metrics
from edgemm.runtime.serving.model import Model, digest_of, tensors_source
from edgemm.runtime.serving.options import Limits, Options
from edgemm.runtime.serving.scheduler import Scheduler
from edgemm.runtime.serving.work import Absent, Plan, Source

SMALL = 65_536  # pixels; to decode so few takes less than to hand them to another thread
EXTENSIONS = ("binary_tensor_data", "parameters", "schedule_policy", "model_repository")
log = structlog.get_logger("edgemm.serve")


class NotFound(Exception):
    """There is no such model, or not in that version."""


@dataclass(frozen=True, slots=True)
class Inference:
    """What a request of the protocol asks: inputs [B, ...] and outputs by name, parameters by name."""

    inputs: Mapping[str, Array]
    outputs: Sequence[str]
    parameters: Mapping[str, Any]


class Service:
    """The models of `paths`. `load` has to be called before anything is asked."""

    def __init__(
        self, paths: Sequence[Path], options: Options, limits: Limits, require_signature: Path | None = None
    ) -> None:
        self.paths, self.options, self.limits, self.require_signature = paths, options, limits, require_signature
        self.metrics = Metrics()
        self.scheduler = Scheduler(options, self.metrics)
        self.models: dict[str, Model] = {}
        self.stopping = False
        self._loading = threading.Lock()
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="reader")

    def load(self) -> None:
        """Load every bundle; InputError when one is bad or two have the same name."""
        for path in self.paths:
            model = Model(path, self.options, self.require_signature)
            if model.name in self.models:
                raise InputError(
                    f"{path} and {self.models[model.name].path} are both of {model.name!r}",
                    fix="serve them from two servers",
                )
            self._take(model)
        self.scheduler.start()

    def _take(self, model: Model) -> None:
        self.models[model.name] = model
        self.metrics.loads.labels(model.name, "loaded").inc()
        tables = {
            engine.name: {
                str(list(shape)): {n: round(s * 1e3, 3) for n, s in costs.items()}
                for shape, costs in engine.table.items()
            }
            for engine in model.engines
        }
        log.info("loaded", model=model.name, version=model.version, sha256=model.sha256, latency_ms=tables)

    def reload(self, name: str) -> bool:
        """Read a model's bundle anew from where it was, and answer with it from then on -> whether it changed.

        What was accepted before is answered by the old one. When the new one can't be used the old one stays.
        """
        with self._loading:
            old = self.model(name)
            try:
                new = Model(old.path, self.options, self.require_signature)
                if new.name != name:
                    raise InputError(f"{old.path} is now of {new.name!r}", fix=f"put a bundle of {name!r} there")
            except EdgemmError as e:
                self.metrics.loads.labels(name, "refused").inc()
                log.error("reload refused", model=name, error=one_line(e))
                raise
            if new.sha256 == old.sha256:
                return False
            self._take(new)
            return True

    def close(self) -> None:
        self.stopping = True
        self.scheduler.close()
        self._readers.shutdown()

    @property
    def ready(self) -> bool:
        return bool(self.models) and not self.stopping

    def model(self, name: str, version: str = "") -> Model:
        model = self.models.get(name)
        if model is None:
            raise NotFound(f"there is no model {name[:80]!r}; there are {', '.join(self.models)}")
        if version and version != model.version:
            raise NotFound(f"model {name!r} has version {model.version}, and not {version[:80]!r}")
        return model

    def metadata(self, model: Model) -> dict[str, Any]:
        """Of the protocol: -1 stands for an axis that is free."""
        made = {out: port for e in model.engines for port in e.spec["outputs"] for out in [port["name"]]}
        origins = {name for names in model.sources.values() for name in names}
        text = model.sources.get("text", set()) if model.buckets else set()
        inputs = []
        for name in sorted(origins):
            port = model.ports.get(name, {"dtype": "int64", "shape": [1, "ids"]})
            shape = [-1, *(-1 if isinstance(a, str) else a for a in port["shape"][1:])]
            if name in text:
                shape[1] = -1
            inputs.append({"name": name, "datatype": DATATYPES[port["dtype"]], "shape": shape})
        outputs = []
        for name, axes in sorted(model.outputs.items()):
            free = {axis for tensor, axis in model.text_axes if tensor == name} | {0}
            shape = [-1 if i in free or isinstance(a, str) else a for i, a in enumerate(axes)]
            dtype = made[name]["dtype"] if name in made else "int64"
            outputs.append({"name": name, "datatype": DATATYPES[dtype], "shape": shape})
        versions, platform = [model.version], f"edgemm_{model.backend}"
        return {"name": model.name, "versions": versions, "platform": platform, "inputs": inputs, "outputs": outputs}

    async def infer(self, model: Model, asked: Inference) -> dict[str, Array]:
        """Outputs [B, ...] by name: those asked for, or all that end somewhere.

        Raises InputError, Rejected, Expired.
        """
        inputs = asked.inputs
        if model.prompted and inputs:
            inputs = {PROMPT: np.zeros((*next(iter(inputs.values())).shape[:1], 0), np.int64), **inputs}
        given = self._modalities(model, inputs)
        plan = model.plan(given, frozenset(asked.outputs))
        check_tensors(model, inputs)
        batch = {len(value) for value in inputs.values()}
        if len(batch) != 1 or not 1 <= (rows := batch.pop()) <= self.options.max_batch_size:
            sizes = ", ".join(f"{n} {list(v.shape)}" for n, v in inputs.items())
            raise InputError(
                f"the inputs are {sizes}"[:300], fix=f"give the same batch to all, 1 to {self.options.max_batch_size}"
            )
        length = 0
        waiting = []
        try:
            for i in range(rows):
                sources = {}
                for modality in given:
                    tensors = {n: inputs[n][i : i + 1] for n in model.sources[modality]}
                    if modality == "text" and model.buckets:
                        length = next(iter(tensors.values())).shape[1]
                        tensors = model.pad(tensors)
                    sources[modality] = tensors_source(tensors)
                waiting.append(self._submit(plan, sources, asked.parameters))
            found = await asyncio.gather(*waiting)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        names = asked.outputs or sorted(plan.wanted)
        return {n: np.concatenate([self._cut(model, n, row[n], length) for row in found]) for n in names}

    def _cut(self, model: Model, name: str, value: Array, length: int) -> Array:
        """An output without what stands for its text's padding."""
        for axis in (axis for tensor, axis in model.text_axes if tensor == name and length):
            value = value.take(range(length), axis)
        return value

    def _submit(
        self, plan: Plan, sources: Mapping[str, Source], parameters: Mapping[str, Any]
    ) -> asyncio.Future[dict[str, Array]]:
        priority, timeout = (_whole(parameters, name) for name in ("priority", "timeout"))
        levels = max(1, self.options.priority_levels)
        if self.options.priority_levels and (priority or 0) > levels:
            raise InputError(f"priority = {priority}", fix=f"give 1 (most urgent) to {levels}, or 0 for the default")
        future = self.scheduler.submit(plan, sources, priority or 0, timeout / 1e3 if timeout else None)
        return asyncio.wrap_future(future)

    def _modalities(self, model: Model, names: Mapping[str, Any]) -> frozenset[str]:
        given = frozenset(m for m, tensors in model.sources.items() if tensors & names.keys())
        wanted = {name for modality in given for name in model.sources[modality]}
        if unknown := sorted(names.keys() - wanted):
            inputs = sorted(n for tensors in model.sources.values() for n in tensors)
            raise InputError(f"there is no input {unknown[0][:80]!r}", fix=f"inputs are {', '.join(inputs)}")
        if absent := sorted(wanted - names.keys()):
            raise InputError(f"input {absent[0]!r} is missing", fix=f"give {', '.join(sorted(wanted))} together")
        if not given:
            raise InputError("there are no inputs", fix=f"give those of {' and '.join(model.sources)}")
        return given

    async def answer(self, model: Model, media: Mapping[str, bytes | str], boxes: str | None) -> dict[str, Any]:
        """Answer media: image and audio as files' bytes, text; as `edgemm run --json` does."""
        for modality in media:
            if modality not in model.sources:
                raise InputError(f"the model takes no {modality}", fix=f"it takes {' and '.join(model.sources)}")
        if not media:
            raise InputError("there is nothing to run", fix=f"give {' and '.join(model.sources)}")
        if model.prompted:
            media = {"text": "", **media}
        plan = model.answer_plan(frozenset(media))
        sources = {
            m: Source(digest_of(m, content, boxes if boxes and m == "text" else "")) for m, content in media.items()
        }
        while True:
            try:
                found = await self._submit(plan, sources, {})
                break
            except Absent as e:
                modality = str(e)
                digest = sources[modality].digest
                sources[modality] = Source(digest, await self._read(model, modality, media[modality], boxes))
        text = media.get("text")
        return model.answer(found, text if isinstance(text, str) else None)

    async def _read(self, model: Model, modality: str, content: bytes | str, boxes: str | None) -> Tensors:
        small = modality == "text"
        if modality == "image":
            small = check_image(content, self.limits.pixels) <= SMALL
        read = read_boxes(boxes) if boxes is not None and modality == "text" else None
        if small:
            return model.medium(modality, content, read)
        if modality == "audio":
            check_audio(content, self.limits.audio_s)
        return await asyncio.get_running_loop().run_in_executor(self._readers, model.medium, modality, content)


def one_line(error: Exception) -> str:
    return re.sub(r"\n\s*", "; ", str(error))


def _whole(parameters: Mapping[str, Any], name: str) -> int | None:
    value = parameters.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40):
        raise InputError(f"{name} = {str(value)[:80]!r}", fix="give a whole number, 0 or more")
    return value
