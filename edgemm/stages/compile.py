"""Compile: what the target's backend makes of the graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.graph.profiles import profiles
from edgemm.graph.shapes import fix_shapes, is_decoder
from edgemm.runtime.program import Program
from edgemm.target import Target


def compile_engine(graph: Artifact, target: Target, precision: str, runs: Path) -> Artifact:
    """Compile every component of `graph` for `target`.

    precision   of the float parts
    The artifact holds the backend's files, the tokenizer, and program.json with backend and settings. For TensorRT
    program.json has the optimization profiles too, and layers.json says what each engine computes how.
    """
    backend = plugins.plugin("backends", target.backend)
    settings = {"threads": target.threads, "precision": precision}
    hardware = target.model_dump(
        mode="json", include={"compile", "sm", "opset_max", "precisions", "shapes", "memory_mb", "static"}
    )

    def make(out: Path) -> None:
        layers: dict[str, Any] = {}
        program = graph.json("program.json")
        shapes = shapes_of(program, target, f"{graph.path}/program.json")
        for component in program["components"]:
            name = component["name"]
            log(f"compile {graph.manifest.kind} {name} for {target.name}")
            cache = dict(program["output"]["cache"]) if is_decoder(component, program) else {}
            own = target.model_copy(update={"precision": component.get("precision") or precision})
            stems = (name, *(f"{name}.{p}" for p in target.precisions))
            for file in filter(Path.is_file, (graph.path / f"{stem}.onnx" for stem in stems)):
                if made := backend.compile_component(file, out, shapes.get(name, {}), own, cache):
                    layers[file.stem] = made
        if layers:
            (out / "layers.json").write_text(json.dumps(layers), encoding="utf-8")
        if (graph.path / "tokenizer.json").is_file():
            shutil.copyfile(graph.path / "tokenizer.json", out / "tokenizer.json")
        program |= {"backend": target.backend, "settings": settings}
        (out / "program.json").write_text(json.dumps(program), encoding="utf-8")

    return build(
        "engine",
        runs,
        parents=[graph],
        config={"backend": target.backend, **settings, **hardware},
        tools=backend.TOOLS,
        make=make,
    )


def shapes_of(program: dict[str, Any], target: Target, where: str) -> dict[str, Any]:
    """What the backend is to know of each component's inputs; `program` is changed to say it, too.

    Fixed shapes by input where the target is static; for TensorRT optimization profiles, fixed or not.
    """
    if target.static:
        fix_shapes(program)
    if target.dialect == "tensorrt":
        output = plugins.validate(Program, program, where).output.model_dump()
        program["profiles"] = profiles(program["components"], output, target)
        return dict(program["profiles"])
    if not target.static:
        return {}
    return {c["name"]: {port["name"]: port["shape"] for port in c["inputs"]} for c in program["components"]}
