"""Quantize: Q/DQ placed by the recipe's quantizer, ranges from calibration samples of the train split."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log, progress
from edgemm.data import split
from edgemm.recipe import Recipe
from edgemm.runtime.session import open_directory


def quantize(graph: Artifact, recipe: Recipe, runs: Path) -> Artifact:
    """Quantize every component of `graph`; without a quantizer in the recipe, `graph` itself."""
    if recipe.quantize is None:
        return graph
    use = recipe.quantize.use
    quantizer = plugins.plugin("quantizers", use)
    options = plugins.options("quantizers", use, recipe.quantize.values, f"{recipe.name}: quantize")

    def make(out: Path) -> None:
        samples = record(graph.path, recipe)
        for component in graph.json("program.json")["components"]:
            name = component["name"]
            log(f"quantize {name}: {use}, {len(samples)} samples")
            inputs = [port["name"] for port in component["inputs"]]
            model = quantizer.quantize(
                onnx.load(graph.path / f"{name}.onnx"), [{n: s[n] for n in inputs} for s in samples], options
            )
            onnx.save(model, out / f"{name}.onnx")
        for name in ("tokenizer.json", "program.json"):
            shutil.copyfile(graph.path / name, out / name)

    return build(
        "quantized",
        runs,
        parents=[graph],
        config={"use": use, **options.model_dump(mode="json"), "calibration": recipe.calibration, "seed": recipe.seed},
        tools=("nncf", "onnx", "onnxruntime", "easy-vqa"),
        make=make,
    )


def record(graph: Path, recipe: Recipe) -> list[dict[str, NDArray[Any]]]:
    """Every tensor between components, for each calibration sample, from the FP32 graph."""
    session = open_directory(graph)
    calibration, _ = split(recipe.data, recipe.calibration, recipe.seed, recipe.verify.limit)
    return [
        session.infer({**session.image_tensors(s.image), **session.text_tensors(s.text)})
        for s in progress(calibration, "calibration samples")
    ]
