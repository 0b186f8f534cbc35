"""Export: one ONNX graph a component, checked against torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.models import find_family, read_model
from edgemm.models._graph import check, onnx_export
from edgemm.recipe import Export


def export(model: Artifact, recipe: Export, runs: Path) -> Artifact:
    """Export every component of model/ with dynamic batch and lengths.

    The artifact holds <component>.onnx, tokenizer.json where the model has one, and program.json (see
    runtime/session.py). A graph from outside is copied as it is.
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
            if isinstance(component.module, Path):
                shutil.copyfile(component.module, path)
            else:
                onnx_export(component, path, recipe.opset)
                check(component, path, recipe.tolerance)
        if (directory / "tokenizer.json").is_file():
            shutil.copyfile(directory / "tokenizer.json", out / "tokenizer.json")
        program = {
            **model.json("program.json"),
            "components": [c.spec() for c in components],  # their sizes may have been pruned
            "backend": "onnxruntime",
            "settings": {"threads": 2},
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
