"""Export: one ONNX graph a component, checked against torch."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch

from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.errors import InputError
from edgemm.models import Component, find_family, read_model
from edgemm.recipe import Export
from edgemm.runtime import onnxruntime
from edgemm.runtime.session import Directory


def export(model: Artifact, recipe: Export, runs: Path) -> Artifact:
    """Export every component of model/ with dynamic batch and lengths.

    The artifact holds <component>.onnx, tokenizer.json and program.json (see runtime/session.py).
    Raises InputError when a graph differs from torch by more than `recipe.tolerance`, relative.
    """

    def make(out: Path) -> None:
        directory = model.path / "model"
        family = find_family(directory)
        module = read_model(family, directory)
        components = family.components(module)
        for component in components:
            log(f"export {model.manifest.kind} {component.name}")
            path = out / f"{component.name}.onnx"
            onnx_export(component, path, recipe.opset)
            check(component, path, recipe.tolerance)
        shutil.copyfile(directory / "tokenizer.json", out / "tokenizer.json")
        program = {
            "backend": "onnxruntime",
            "settings": {"threads": 2},
            "components": [
                {
                    "name": c.name,
                    "inputs": [asdict(port) for port in c.inputs],
                    "outputs": [asdict(port) for port in c.outputs],
                    "max_sizes": c.max_sizes,
                }
                for c in components
            ],
            **family.program(module),
        }
        (out / "program.json").write_text(json.dumps(program), encoding="utf-8")

    return build(
        "graph",
        runs,
        parents=[model],
        config=recipe.model_dump(),
        tools=("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
        make=make,
    )


def onnx_export(component: Component, path: Path, opset: int) -> None:
    """torch.onnx (dynamo), with the dynamic axes that the component names."""
    axes = {name: torch.export.Dim(name, min=1, max=size) for name, size in component.max_sizes.items()}
    shapes = {p.name: {i: axes[n] for i, n in enumerate(p.shape) if isinstance(n, str)} for p in component.inputs}
    # The exporter prints its progress and warns of its own internals; an error still raises.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            component.module,
            (),
            kwargs=component.example(batch=2),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[p.name for p in component.inputs],
            output_names=[p.name for p in component.outputs],
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise InputError(f"{component.name}: torch gave no ONNX program", fix="update torch")
    program.save(str(path))
    onnx.checker.check_model(str(path), full_check=True)


@torch.inference_mode()
def check(component: Component, path: Path, tolerance: float) -> None:
    """Compare torch and ONNX Runtime on one row and on three."""
    ports = {
        "name": component.name,
        "inputs": [asdict(p) for p in component.inputs],
        "outputs": [asdict(p) for p in component.outputs],
    }
    call = onnxruntime.compile_component(Directory(path.parent), ports, {"threads": 2})
    for batch in (1, 3):
        inputs = component.example(batch)
        expected = component.module(**inputs).numpy()
        (got,) = call({name: tensor.numpy() for name, tensor in inputs.items()}).values()
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        if not error <= tolerance:
            raise InputError(
                f"{component.name}: the ONNX graph differs from torch by {error:.2e}",
                fix=f"tolerance is {tolerance:.0e}",
            )
