"""Quantize: Q/DQ placed by the recipe's quantizer, ranges from calibration samples of the train split."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log, progress
from edgemm.data import split
from edgemm.errors import InputError
from edgemm.graph.centering import center_vocabulary
from edgemm.graph.embeddings import int8_tables
from edgemm.graph.lower import kept_in_float32, lower
from edgemm.recipe import Recipe
from edgemm.runtime.program import Generation, Program
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import open_directory
from edgemm.target import Target
from edgemm.tuning import tune, unbiased

STEPS = 4


def quantize(graph: Artifact, recipe: Recipe, target: Target, runs: Path) -> Artifact:
    """Quantize every component of `graph` in the target's dialect.

    openvino   <component>.onnx as the quantizer makes it; without one in the recipe, `graph` itself
    tensorrt   <component>.fp16.onnx and, with a quantizer in the recipe, <component>.int8.onnx: graph/lower.py
    """
    tensorrt = target.dialect == "tensorrt"
    use = recipe.quantize.use if recipe.quantize and (not tensorrt or "int8" in target.precisions) else None
    if not use and not tensorrt:
        return graph
    precisions = [p for p in target.precisions if p != "int8" or use]
    options = options_of(graph, recipe) if use else {}
    search = recipe.quantize.search if use and recipe.quantize else None

    def make(out: Path) -> None:
        quantizer: Any = plugins.plugin("quantizers", use) if use else None
        program = graph.json("program.json")
        specs = {c["name"]: c for c in program["components"]}
        output = plugins.validate(Program, program, f"{graph.path}/program.json").output
        logits = {output.decoder: output.logits} if isinstance(output, Generation) else {}
        ranged = {n for n in specs if use and quantizer.needs_samples(options[n])}
        samples = record(graph, recipe, set(specs) if tensorrt else ranged | set(logits))  # FP16 needs them, too
        tuned = []
        for name, spec in specs.items():
            load = partial(read, graph, name)
            quantized = None
            if use:
                chosen = options[name]
                if search and name in ranged:
                    chosen, found = tune(spec, load(), samples[name], quantizer.quantize, chosen, search)
                    tuned.append(found.model_dump(mode="json"))
                log(f"quantize {name}: {use}, {len(samples[name])} samples")
                quantized = quantizer.quantize(load(), samples[name], chosen)
            correct = partial(unbiased, fp32=load(), component=spec, samples=samples[name], output=logits.get(name))
            if not tensorrt:
                onnx.save(int8_tables(correct(quantized)), out / f"{name}.onnx")
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
            "use": use,
            "components": {n: o.model_dump(mode="json") for n, o in options.items()},
            "search": search and search.model_dump(mode="json"),
            "calibration": recipe.calibration,
            "seed": recipe.seed,
        },
        tools=("nncf", "onnx", "onnxruntime", "easy-vqa"),
        make=make,
    )


def read(graph: Artifact, name: str) -> onnx.ModelProto:
    """The FP32 graph of a component, as a quantizer takes it best."""
    return center_vocabulary(onnx.load(graph.path / f"{name}.onnx"))


def options_of(graph: Artifact, recipe: Recipe) -> dict[str, Any]:
    """The quantizer's options of each component. InputError for a component that the graph has not."""
    assert recipe.quantize
    names = [c["name"] for c in graph.json("program.json")["components"]]
    where = f"{recipe.name}: quantize"
    for pattern in recipe.quantize.components:
        if "*" not in pattern and pattern not in names:
            raise InputError(f"{where}.components.{pattern}: no such component", fix=f"components: {', '.join(names)}")
    return {n: plugins.options("quantizers", recipe.quantize.use, recipe.quantize.of(n), where) for n in names}


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
    for sample in progress(calibration, "calibration samples"):
        met: dict[str, list[Tensors]] = defaultdict(list)
        session.observe = lambda name, tensors, met=met: met[name].append(dict(tensors))
        tensors = session.tensors(sample.query)
        if session.decoder in wanted:
            session.complete(tensors, sample.text)
        else:
            session.infer(tensors)
        for name in wanted:
            recorded[name] += met[name][:: max(1, len(met[name]) // STEPS)]
    return recorded
