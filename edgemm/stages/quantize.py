"""Quantize: Q/DQ placed by the recipe's quantizer, ranges from calibration samples of the train split."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import onnx

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.errors import InputError
from edgemm.graph import matches
from edgemm.graph.centering import center_vocabulary
from edgemm.graph.embeddings import int8_tables
from edgemm.graph.lower import kept_in_float32, lower
from edgemm.graph.ranges import unsettled
from edgemm.graph.saturation import pairs, unsaturated
from edgemm.graph.unsigned import unsigned_activations
from edgemm.host import adds_in_16_bits, host_isa
from edgemm.models import find_family, read_model
from edgemm.recipe import Recipe
from edgemm.recording import record, spread
from edgemm.report.int8_schema import Saturation, Settled
from edgemm.runtime.program import Generation, Program
from edgemm.runtime.query import Tensors
from edgemm.simulation import unbiased
from edgemm.target import Target

CHOOSERS = "*key_tokens*"  # layers that choose tokens: pruners/key_tokens.py
HALF = 64  # samples of each half whose ranges are compared
TOOLS = ("nncf", "neural-compressor", "torchao", "torch", "onnx", "onnxruntime", "easy-vqa")


def quantize(graph: Artifact, recipe: Recipe, target: Target, runs: Path, model: Artifact | None = None) -> Artifact:
    """Quantize every component of `graph` in the target's dialect.

    model        what `graph` was exported from, for quantizers that observe torch modules
    openvino     <component>.onnx as the quantizer makes it; without one in the recipe, `graph` itself
    onnxruntime  the same, activations in uint8
    tensorrt     <component>.fp16.onnx and, with a quantizer in the recipe, <component>.int8.onnx: graph/lower.py
    findings.json is what the report says of ranges and of saturation.
    """
    tensorrt = target.dialect == "tensorrt"
    use = recipe.quantize.use if recipe.quantize and (not tensorrt or "int8" in target.precisions) else None
    if not use and not tensorrt:
        return graph
    precisions = [p for p in target.precisions if p != "int8" or use]
    work = Work(graph, recipe, target, runs, model)
    options = work.options if use else {}
    if recipe.quantize and not use:
        log(f"{target.name} has no INT8: quantize is left out")
    forms = {n: recipe.quantize.form(n) for n in work.specs} if recipe.quantize else {}
    made_int8 = {n for n in options if forms[n].int8}

    def make(out: Path) -> None:
        program = graph.json("program.json")
        findings: dict[str, list[Any]] = defaultdict(list)
        for spec in program["components"]:
            name = spec["name"]
            quantized = None
            if name in made_int8:
                int8 = work.int8(name, options[name])
                quantized = onnx.load(int8.path / f"{name}.onnx")
                for key, found in int8.json("findings.json").items():
                    findings[key].append(found)
            if not tensorrt:
                if use:
                    spec |= forms[name].model_dump(include={"precision", "threads"}, exclude_none=True)
                onnx.save(work.read(name) if quantized is None else quantized, out / f"{name}.onnx")
                continue
            log(f"lower {name}: {' and '.join(precisions)} for TensorRT")
            lowered = lower(work.read(name), quantized, work.recorded[name], target.opset_max, name)
            for precision, made in lowered.items():
                if kept := kept_in_float32(made):
                    log(f"{name}.{precision}: {len(kept)} nodes stay in FP32, the first is {kept[0]}")
                if precision == "int8" and name in work.logits:
                    unbiased(made, work.read(name), spec, work.recorded[name], work.logits[name])
                onnx.save(made, out / f"{name}.{precision}.onnx")
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
            "use": work.uses if use else {},
            "components": {n: o.model_dump(mode="json") for n, o in options.items()},
            "forms": {n: f.model_dump() for n, f in forms.items()},
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
    model: Artifact | None = None

    @cached_property
    def specs(self) -> dict[str, dict[str, Any]]:
        """Components by name, as program.json has them."""
        return {c["name"]: c for c in self.graph.json("program.json")["components"]}

    @cached_property
    def uses(self) -> dict[str, str]:
        """The quantizer of each component."""
        assert self.recipe.quantize
        return {n: self.recipe.quantize.quantizer(n) for n in self.specs}

    @cached_property
    def options(self) -> dict[str, Any]:
        """The quantizer's options of each component. InputError for a component that the graph has not."""
        quantize, where = self.recipe.quantize, f"{self.recipe.name}: quantize"
        assert quantize
        for pattern in quantize.components:
            if "*" not in pattern and pattern not in self.specs:
                known = ", ".join(self.specs)
                raise InputError(f"{where}.components.{pattern}: no such component", fix=f"components: {known}")
        found = {n: plugins.options("quantizers", self.uses[n], quantize.of(n), where) for n in self.specs}
        for name, options in found.items():
            check_dialect(name, options, self.target)
        return {n: self.choosers_in_float(n, options) for n, options in found.items()}

    def choosers_in_float(self, name: str, options: Any) -> Any:
        """The options with what chooses the tokens that stay left in float: rounded, it chooses other ones."""
        floats = getattr(options, "keep_float", None)
        if floats is None or not any(use.use == "key_tokens" for use in self.recipe.prune):
            return options
        nodes = onnx.load(self.graph.path / f"{name}.onnx", load_external_data=False).graph.node
        if CHOOSERS in floats or not any(matches(node, CHOOSERS) for node in nodes):
            return options
        return options.model_copy(update={"keep_float": (*floats, CHOOSERS)})

    @cached_property
    def calls(self) -> dict[str, Any]:
        """What quantizes each component."""
        return bound({n: plugins.plugin("quantizers", use) for n, use in self.uses.items()}, self.model)

    @cached_property
    def logits(self) -> dict[str, str]:
        """The output of the component that writes text, if there is one."""
        output = plugins.validate(Program, self.graph.json("program.json"), str(self.graph.path)).output
        return {output.decoder: output.logits} if isinstance(output, Generation) else {}

    def ranged(self, name: str) -> bool:
        """Whether activations of a component are to be INT8."""
        return bool(plugins.plugin("quantizers", self.uses[name]).needs_samples(self.options[name]))

    @property
    def isa(self) -> str:
        return self.target.isa or host_isa() or "unknown"

    @property
    def narrow(self) -> bool:
        """Whether the target must be kept from saturating."""
        return self.target.dialect == "openvino" and adds_in_16_bits(self.target.isa or host_isa())

    @cached_property
    def recorded(self) -> dict[str, list[Tensors]]:
        """What each component meets on the samples that give ranges, of those that need any."""
        if self.target.dialect == "tensorrt":
            return record(self.graph, self.recipe, set(self.specs))  # FP16 needs them, too
        assert self.recipe.quantize
        int8 = {n for n in self.specs if self.recipe.quantize.form(n).int8}
        wanted = {n for n in int8 if self.ranged(n)} | set(self.logits)
        return record(self.graph, self.recipe, wanted)

    def read(self, name: str) -> onnx.ModelProto:
        """The FP32 graph of a component, as a quantizer takes it best."""
        return center_vocabulary(onnx.load(self.graph.path / f"{name}.onnx"))

    def int8(self, name: str, options: Any) -> Artifact:
        """<component>.onnx as the quantizer makes it with `options`, corrected; findings.json, see `quantize`."""
        assert self.recipe.quantize
        use = self.uses[name]

        def make(out: Path) -> None:
            ranged = self.ranged(name)
            samples = self.recorded[name] if ranged or name in self.logits else []
            log(f"quantize {name}: {use}, {len(samples)} samples")
            made = self.calls[name](self.read(name), samples, options)
            if name in self.logits and self.target.dialect != "tensorrt":  # there, what is lowered is corrected
                made = unbiased(made, self.read(name), self.specs[name], samples, self.logits[name])
            findings: dict[str, Any] = {}
            if ranged:
                findings["ranges"] = settled(name, made, samples).model_dump(mode="json")
                made, found = self.unsaturated(name, made)
                findings["saturation"] = found.model_dump(mode="json")
            if self.target.dialect == "onnxruntime":
                made = unsigned_activations(made)
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


def check_dialect(name: str, options: Any, target: Target) -> None:
    """InputError where the target can't run what a quantizer is asked for."""
    if getattr(options, "bits", 8) == 4 and target.dialect == "tensorrt":
        raise InputError(f"quantize: {name}: bits = 4: the graphs for TensorRT are INT8 and FP16", fix="bits: 8")
    if getattr(options, "dynamic", False) and (target.dialect != "onnxruntime" or not target.static):
        raise InputError(
            f"quantize: {name}: dynamic = true on {target.name}: one range for a whole tensor, found in each call, is "
            "what ONNX Runtime's kernels do, and makes answers depend on their batch",
            fix="dynamic: false, or a target with backend: onnxruntime and static: true",
        )


def bound(quantizers: dict[str, Any], model: Artifact | None) -> dict[str, Any]:
    """What quantizes each component: with its torch module, where the quantizer observes one."""
    components = {}
    if model is not None and any(getattr(q, "NEEDS_MODULE", False) for q in quantizers.values()):
        directory = model.path / "model"
        family = find_family(directory)
        components = {c.name: c for c in family.components(read_model(family, directory))}
    return {
        name: partial(q.quantize, component=components.get(name)) if getattr(q, "NEEDS_MODULE", False) else q.quantize
        for name, q in quantizers.items()
    }
