"""Quantize: Q/DQ placed by the recipe's quantizer, ranges from calibration samples of the train split."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log, progress
from edgemm.data import split
from edgemm.errors import InputError
from edgemm.graph.centering import center_vocabulary
from edgemm.graph.embeddings import int8_tables
from edgemm.graph.lower import kept_in_float32, lower
from edgemm.graph.unsigned import unsigned_activations
from edgemm.models import find_family, read_model
from edgemm.recipe import Recipe
from edgemm.runtime.program import Generation, Program
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import open_directory
from edgemm.target import Target
from edgemm.tuning import Quantize, tune, unbiased

STEPS = 4


def quantize(graph: Artifact, recipe: Recipe, target: Target, runs: Path, model: Artifact | None = None) -> Artifact:
    """Quantize every component of `graph` in the target's dialect.

    model        what `graph` was exported from, for quantizers that observe torch modules
    openvino     <component>.onnx as the quantizer makes it; without one in the recipe, `graph` itself
    onnxruntime  the same, activations in uint8
    tensorrt   <component>.fp16.onnx and, with a quantizer in the recipe, <component>.int8.onnx: graph/lower.py
    """
    tensorrt = target.dialect == "tensorrt"
    use = recipe.quantize.use if recipe.quantize and (not tensorrt or "int8" in target.precisions) else None
    if not use and not tensorrt:
        return graph
    precisions = [p for p in target.precisions if p != "int8" or use]
    uses, options = options_of(graph, recipe) if use else ({}, {})
    for name, chosen in options.items():
        check_dialect(name, chosen, target)
    if recipe.quantize and not use:
        log(f"{target.name} has no INT8: quantize is left out")
    search = recipe.quantize.search if use and recipe.quantize else None

    def make(out: Path) -> None:
        quantizers: dict[str, Any] = {n: plugins.plugin("quantizers", u) for n, u in uses.items()}
        program = graph.json("program.json")
        specs = {c["name"]: c for c in program["components"]}
        output = plugins.validate(Program, program, f"{graph.path}/program.json").output
        logits = {output.decoder: output.logits} if isinstance(output, Generation) else {}
        ranged = {n for n in options if quantizers[n].needs_samples(options[n])}
        samples = record(graph, recipe, set(specs) if tensorrt else ranged | set(logits))  # FP16 needs them, too
        calls = bound(quantizers, model)
        tuned = []
        for name, spec in specs.items():
            load = partial(read, graph, name)
            quantized = None
            if use:
                chosen, call = options[name], calls[name]
                if search and name in ranged:
                    chosen, found = tune(spec, load(), samples[name], call, chosen, search)
                    tuned.append(found.model_dump(mode="json"))
                log(f"quantize {name}: {uses[name]}, {len(samples[name])} samples")
                quantized = call(load(), samples[name], chosen)
            correct = partial(unbiased, fp32=load(), component=spec, samples=samples[name], output=logits.get(name))
            if not tensorrt:
                quantized = correct(quantized)
                quantized = unsigned_activations(quantized) if target.dialect == "onnxruntime" else quantized
                onnx.save(int8_tables(quantized), out / f"{name}.onnx")
                continue
            log(f"lower {name}: {' and '.join(precisions)} for TensorRT")
            for precision, made in lower(load(), quantized, samples[name], target.opset_max, name).items():
                if kept := kept_in_float32(made):
                    log(f"{name}.{precision}: {len(kept)} nodes stay in FP32, the first is {kept[0]}")
                onnx.save(correct(made) if precision == "int8" else made, out / f"{name}.{precision}.onnx")
        copy_program(graph, out)
        (out / "tuning.json").write_text(json.dumps(tuned), encoding="utf-8")  # for the report

    return build(
        "quantized",
        runs,
        parents=[graph],
        config={
            "dialect": target.dialect,
            "opset_max": target.opset_max,
            "precisions": precisions,
            "use": uses,
            "components": {n: o.model_dump(mode="json") for n, o in options.items()},
            "search": search and search.model_dump(mode="json"),
            "calibration": recipe.calibration,
            "seed": recipe.seed,
        },
        tools=("nncf", "neural-compressor", "torchao", "torch", "onnx", "onnxruntime", "easy-vqa"),
        make=make,
    )


def read(graph: Artifact, name: str) -> onnx.ModelProto:
    """The FP32 graph of a component, as a quantizer takes it best."""
    return center_vocabulary(onnx.load(graph.path / f"{name}.onnx"))


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


def bound(quantizers: dict[str, Any], model: Artifact | None) -> dict[str, Quantize]:
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


def options_of(graph: Artifact, recipe: Recipe) -> tuple[dict[str, str], dict[str, Any]]:
    """The quantizer of each component, and its options. InputError for a component that the graph has not."""
    assert recipe.quantize
    names = [c["name"] for c in graph.json("program.json")["components"]]
    where = f"{recipe.name}: quantize"
    for pattern in recipe.quantize.components:
        if "*" not in pattern and pattern not in names:
            raise InputError(f"{where}.components.{pattern}: no such component", fix=f"components: {', '.join(names)}")
    uses = {n: recipe.quantize.quantizer(n) for n in names}
    return uses, {n: plugins.options("quantizers", uses[n], recipe.quantize.of(n), where) for n in names}


def copy_program(graph: Artifact, out: Path) -> None:
    """tokenizer.json, where the model has one, and program.json."""
    for name in ("tokenizer.json", "program.json"):
        if (graph.path / name).is_file():
            shutil.copyfile(graph.path / name, out / name)


def record(graph: Artifact, recipe: Recipe, wanted: set[str]) -> dict[str, list[Tensors]]:
    """The inputs of each component as the FP32 graph meets them on the calibration samples; none of unwanted ones.

    A decoder meets one input a token: STEPS of each sample are kept, spread over its length.
    """
    session = open_directory(graph.path)
    recorded: dict[str, list[Tensors]] = {name: [] for name in session.components}
    if not wanted:
        return recorded
    calibration, _ = split(recipe, lambda: graph.json("program.json"))
    if len(calibration) < recipe.calibration:
        log(f"calibration: {len(calibration)} samples, of {recipe.calibration} that the recipe asks for")
    for sample in progress(calibration, "calibration samples"):
        met: dict[str, list[Tensors]] = defaultdict(list)
        session.observe = lambda name, tensors, met=met: met[name].append(dict(tensors))
        tensors = session.tensors(sample.query)
        known = session.infer(tensors)
        if session.decoder in wanted:
            session.generate(known, sample.text)
        if broken := [n for n, v in known.items() if v.dtype.kind == "f" and np.isnan(v).any()]:
            raise InputError(
                f"calibration sample {sample.id}: the FP32 model makes NaN of it, first in {broken[0]}",
                fix="leave the row out; if all rows do so, the weights are broken",
            )
        for name in wanted:
            recorded[name] += met[name][:: max(1, len(met[name]) // STEPS)]
    if unmet := sorted(name for name in wanted if not recorded[name]):
        ports = next(spec["inputs"] for spec, _ in session.components.values() if spec["name"] == unmet[0])
        raise InputError(
            f"none of {len(calibration)} calibration samples reaches {unmet[0]}: "
            f"it needs {', '.join(p['name'] for p in ports)}",
            fix=f"give rows with {' and '.join(session.sources)} in the train split",
        )
    return recorded
