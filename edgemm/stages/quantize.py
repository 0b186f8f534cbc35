"""Quantize: Q/DQ placed by the recipe's quantizer, ranges from calibration samples of the train split."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import onnx

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log, progress
from edgemm.data import split
from edgemm.errors import InputError
from edgemm.recipe import Recipe
from edgemm.runtime.session import Tensors, open_directory

STEPS = 4


def quantize(graph: Artifact, recipe: Recipe, runs: Path) -> Artifact:
    """Quantize every component of `graph`; without a quantizer in the recipe, `graph` itself."""
    if recipe.quantize is None:
        return graph
    use = recipe.quantize.use
    quantizer = plugins.plugin("quantizers", use)
    program = graph.json("program.json")
    names = [c["name"] for c in program["components"]]
    where = f"{recipe.name}: quantize"
    for pattern in recipe.quantize.components:
        if "*" not in pattern and pattern not in names:
            raise InputError(f"{where}.components.{pattern}: no such component", fix=f"components: {', '.join(names)}")
    options = {n: plugins.options("quantizers", use, recipe.quantize.of(n), where) for n in names}

    def make(out: Path) -> None:
        wanted = {n for n in names if quantizer.needs_samples(options[n])}
        samples = record(graph, recipe, wanted)
        for name in names:
            log(f"quantize {name}: {use}, {len(samples[name])} samples")
            model = quantizer.quantize(onnx.load(graph.path / f"{name}.onnx"), samples[name], options[name])
            onnx.save(model, out / f"{name}.onnx")
        for name in ("tokenizer.json", "program.json"):
            if (graph.path / name).is_file():
                shutil.copyfile(graph.path / name, out / name)

    return build(
        "quantized",
        runs,
        parents=[graph],
        config={
            "use": use,
            "components": {n: o.model_dump(mode="json") for n, o in options.items()},
            "calibration": recipe.calibration,
            "seed": recipe.seed,
        },
        tools=("nncf", "onnx", "onnxruntime", "easy-vqa"),
        make=make,
    )


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
