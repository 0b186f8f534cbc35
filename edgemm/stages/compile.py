"""Compile: what the target's backend makes of the graphs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.target import Target


def compile_engine(graph: Artifact, target: Target, runs: Path) -> Artifact:
    """Compile every component of `graph` for `target`.

    The artifact holds the backend's files, tokenizer.json, and program.json with backend and settings.
    """
    backend = plugins.plugin("backends", target.backend)
    settings = backend.settings(target)

    def make(out: Path) -> None:
        program = graph.json("program.json")
        for component in program["components"]:
            log(f"compile {graph.manifest.kind} {component['name']} for {target.name}")
            if target.static:
                fix_shapes(component)
            shapes = {port["name"]: port["shape"] for port in component["inputs"]} if target.static else {}
            backend.compile_component(graph.path / f"{component['name']}.onnx", out, shapes)
        shutil.copyfile(graph.path / "tokenizer.json", out / "tokenizer.json")
        program |= {"backend": target.backend, "settings": settings}
        (out / "program.json").write_text(json.dumps(program), encoding="utf-8")

    return build(
        "engine",
        runs,
        parents=[graph],
        config={"backend": target.backend, "static": target.static, **settings},
        tools=backend.TOOLS,
        make=make,
    )


def fix_shapes(component: dict[str, Any]) -> None:
    """Batch 1 and the largest size of every other axis, in each port of a component of program.json."""
    sizes = {**component["max_sizes"], "batch": 1}
    for port in (*component["inputs"], *component["outputs"]):
        port["shape"] = [sizes.get(n, n) for n in port["shape"]]
