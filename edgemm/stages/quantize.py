"""Quantize: Q/DQ placed by the recipe's quantizer, ranges from calibration samples of the train split."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log, progress
from edgemm.data import Sample, split
from edgemm.errors import InputError
from edgemm.graph.centering import center_vocabulary
from edgemm.graph.embeddings import int8_tables
from edgemm.graph.lower import kept_in_float32, lower
from edgemm.graph.ranges import unsettled
from edgemm.graph.saturation import pairs, unsaturated
from edgemm.host import adds_in_16_bits, host_isa
from edgemm.recipe import Recipe
from edgemm.report.schema import Saturation, Settled
from edgemm.runtime.program import Generation, Program
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import open_directory
from edgemm.simulation import unbiased
from edgemm.target import Target

STEPS = 4
HALF = 64  # samples of each half whose ranges are compared
TOOLS = ("nncf", "onnx", "onnxruntime", "easy-vqa")


def quantize(graph: Artifact, recipe: Recipe, target: Target, runs: Path) -> Artifact:
    """Quantize every component of `graph` in the target's dialect.

    openvino   <component>.onnx as the quantizer makes it; without one in the recipe, `graph` itself
    tensorrt   <component>.fp16.onnx and, with a quantizer in the recipe, <component>.int8.onnx: graph/lower.py
    findings.json is what the report says of ranges and of saturation.
    """
    tensorrt = target.dialect == "tensorrt"
    use = recipe.quantize.use if recipe.quantize and (not tensorrt or "int8" in target.precisions) else None
    if not use and not tensorrt:
        return graph
    precisions = [p for p in target.precisions if p != "int8" or use]
    work = Work(graph, recipe, target, runs)
    options = work.options if use else {}
    forms = {n: recipe.quantize.form(n) for n in work.specs} if recipe.quantize else {}
    made_int8 = {n for n in options if forms[n].int8}

    def make(out: Path) -> None:
        program = graph.json("program.json")
        findings: dict[str, list[Any]] = defaultdict(list)
        for spec in program["components"]:
            name = spec["name"]
            quantized = None
            if name in made_int8:
                made = work.int8(name, options[name])
                quantized = onnx.load(made.path / f"{name}.onnx")
                for key, found in made.json("findings.json").items():
                    findings[key].append(found)
            if not tensorrt:
                if use and forms[name].precision:
                    spec["precision"] = forms[name].precision
                onnx.save(work.read(name) if quantized is None else quantized, out / f"{name}.onnx")
                continue
            log(f"lower {name}: {' and '.join(precisions)} for TensorRT")
            lowered = lower(work.read(name), quantized, work.samples(name), target.opset_max, name)
            for precision, model in lowered.items():
                if kept := kept_in_float32(model):
                    log(f"{name}.{precision}: {len(kept)} nodes stay in FP32, the first is {kept[0]}")
                onnx.save(model, out / f"{name}.{precision}.onnx")
        if (graph.path / "tokenizer.json").is_file():
            shutil.copyfile(graph.path / "tokenizer.json", out / "tokenizer.json")
        (out / "program.json").write_text(json.dumps(program), encoding="utf-8")
        (out / "findings.json").write_text(json.dumps(findings), encoding="utf-8")

    return build(
        "quantized",
        runs,
        parents=[graph],
        config={
            "dialect": target.dialect,
            "isa": work.isa if work.narrow else None,
            "opset_max": target.opset_max,
            "precisions": precisions,
            "use": use,
            "components": {n: o.model_dump(mode="json") for n, o in options.items()},
            "forms": {n: [f.int8, f.precision] for n, f in forms.items()},
            "held": recipe.quantize.held if recipe.quantize else 0,
            "calibration": recipe.calibration,
            "seed": recipe.seed,
        },
        tools=TOOLS,
        make=make,
    )


@dataclass(frozen=True)
class Work:
    """What quantizing the components of one graph needs; samples are recorded once, when they are asked for."""

    graph: Artifact
    recipe: Recipe
    target: Target
    runs: Path

    @cached_property
    def specs(self) -> dict[str, dict[str, Any]]:
        """Components by name, as program.json has them."""
        return {c["name"]: c for c in self.graph.json("program.json")["components"]}

    @cached_property
    def options(self) -> dict[str, Any]:
        """The quantizer's options of each component. InputError for a component that the graph has not."""
        quantize, where = self.recipe.quantize, f"{self.recipe.name}: quantize"
        assert quantize
        for pattern in quantize.components:
            if "*" not in pattern and pattern not in self.specs:
                known = ", ".join(self.specs)
                raise InputError(f"{where}.components.{pattern}: no such component", fix=f"components: {known}")
        return {n: plugins.options("quantizers", quantize.use, quantize.of(n), where) for n in self.specs}

    @property
    def isa(self) -> str:
        return self.target.isa or host_isa() or "unknown"

    @property
    def narrow(self) -> bool:
        """Whether the target must be kept from saturating."""
        return self.target.dialect == "openvino" and adds_in_16_bits(self.target.isa or host_isa())

    @cached_property
    def calibration(self) -> tuple[list[Sample], list[Sample]]:
        """Samples that give ranges, and those that a search is judged on."""
        found, _ = split(self.recipe, lambda: self.graph.json("program.json"))
        if len(found) < self.recipe.calibration:
            log(f"calibration: {self.recipe.calibration} samples are asked for, and there are {len(found)}")
        held = spread(found, min(self.recipe.quantize.held if self.recipe.quantize else 0, len(found) // 2))
        chosen = {s.id for s in held}
        return [s for s in found if s.id not in chosen], held or found[:1]

    @cached_property
    def recorded(self) -> dict[str, list[Tensors]]:
        """What each component meets on the samples that give ranges."""
        return record(self.graph, self.calibration[0])

    def samples(self, name: str) -> list[Tensors]:
        """What a component meets. InputError where that is nothing, or NaN."""
        rows, takes = self.recorded[name], [p["name"] for p in self.specs[name]["inputs"]]
        if not rows:
            what = f"no calibration sample has what {name} takes: {', '.join(takes)}"
            raise InputError(what, fix="give rows with its modality")
        for key in takes:
            if any(row[key].dtype.kind == "f" and np.isnan(row[key]).any() for row in rows):
                what = f"{name} meets NaN in {key} on calibration samples"
                raise InputError(what, fix="repair the data, or the FP32 model")
        return rows

    def read(self, name: str) -> onnx.ModelProto:
        """The FP32 graph of a component, as a quantizer takes it best."""
        return center_vocabulary(onnx.load(self.graph.path / f"{name}.onnx"))

    def int8(self, name: str, options: Any) -> Artifact:
        """<component>.onnx as the quantizer makes it with `options`, corrected; findings.json, see `quantize`."""
        assert self.recipe.quantize
        use = self.recipe.quantize.use

        def make(out: Path) -> None:
            quantizer: Any = plugins.plugin("quantizers", use)
            output = plugins.validate(Program, self.graph.json("program.json"), str(self.graph.path)).output
            logits = isinstance(output, Generation) and name == output.decoder
            ranged = quantizer.needs_samples(options)
            samples = self.samples(name) if ranged or logits else []
            log(f"quantize {name}: {use}, {len(samples)} samples")
            made = quantizer.quantize(self.read(name), samples, options)
            if isinstance(output, Generation) and logits:
                made = unbiased(made, self.read(name), self.specs[name], samples, output.logits)
            findings: dict[str, Any] = {}
            if ranged:
                findings["ranges"] = settled(name, made, samples).model_dump(mode="json")
                made, found = self.unsaturated(name, made)
                findings["saturation"] = found.model_dump(mode="json")
            onnx.save(made if self.target.dialect == "tensorrt" else int8_tables(made), out / f"{name}.onnx")
            (out / "findings.json").write_text(json.dumps(findings), encoding="utf-8")

        config = {
            "component": name,
            "use": use,
            "options": options.model_dump(mode="json"),
            "dialect": self.target.dialect,
            "isa": self.isa,
            "held": self.recipe.quantize.held,
            "calibration": self.recipe.calibration,
            "seed": self.recipe.seed,
        }
        return build("int8", self.runs, parents=[self.graph], config=config, tools=TOOLS, make=make)

    def unsaturated(self, name: str, model: onnx.ModelProto) -> tuple[onnx.ModelProto, Saturation]:
        """The graph as this target may run it, and what was proven of it."""
        seven: tuple[str, ...] = ()
        floats: tuple[str, ...] = ()
        if self.narrow:
            model, seven, floats = unsaturated(model)
        found = pairs(model)
        unproven = tuple(p.product for p in found if not p.proven)
        if seven or floats:
            log(
                f"{name}: {self.isa} adds in 16 bits: {len(seven)} products get 7-bit weights, {len(floats)} stay float"
            )
        proven = tuple(p.product for p in found if p.proven)
        row = Saturation(
            component=name,
            isa=self.target.isa,
            sixteen_bits=self.narrow,
            proven=proven,
            unproven=unproven,
            seven_bits=seven,
            floats=floats,
        )
        return model, row


def settled(name: str, model: onnx.ModelProto, samples: Sequence[Tensors]) -> Settled:
    """Whether two halves of the samples give the activations of a Q/DQ graph the same ranges; the log warns if not."""
    few = spread(samples, 2 * HALF)
    tensors, moved = unsettled(model, few[::2], few[1::2])
    if moved:
        log(
            f"warning: {name}: ranges have not settled: {len(moved)} of {tensors} differ by over a quarter between "
            f"halves of {len(few)} samples, most {moved[0]}: raise calibration"
        )
    return Settled(component=name, samples=len(few), tensors=tensors, unsettled=moved)


def record(
    graph: Artifact, samples: Sequence[Sample], program: dict[str, Any] | None = None
) -> dict[str, list[Tensors]]:
    """The inputs of each component as the FP32 graph meets them.

    A decoder meets one input a token: STEPS of each sample are kept, spread over its length.

    program   with the shapes that a target fixes; shorter inputs are padded to them
    """
    changes = {"components": program["components"]} if program else {}
    session = open_directory(graph.path, **changes)
    recorded: dict[str, list[Tensors]] = {name: [] for name in session.components}
    for sample in progress(samples, "calibration samples"):
        met: dict[str, list[Tensors]] = defaultdict(list)
        session.observe = lambda name, tensors, met=met: met[name].append(dict(tensors))
        tensors = session.tensors(sample.query)
        if session.decoder:
            session.complete(tensors, sample.text)
        else:
            session.infer(tensors)
        for name, rows in met.items():
            recorded[name] += rows[:: max(1, len(rows) // STEPS)]
    return recorded


def spread(samples: Sequence[Any], n: int) -> list[Any]:
    """At most `n` of the samples, evenly spread."""
    step = max(1, len(samples) // max(1, n))
    return list(samples[step // 2 :: step])[:n]
