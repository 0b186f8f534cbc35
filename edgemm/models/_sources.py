"""What MODEL may be: an embedded name, a model directory, ONNX graphs or package.module:factory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgemm import plugins
from edgemm.artifact import build, sha256_file
from edgemm.errors import InputError
from edgemm.models import find_family, model_files

EMBEDDED = {
    "reasoner": plugins.PACKAGE / "reasoner" / "weights",
    "scenes_reasoner": plugins.PACKAGE / "reasoner" / "scenes_weights",
    "scenes_painter": plugins.PACKAGE / "reasoner" / "painter_weights",
    "scenes_watcher": plugins.PACKAGE / "reasoner" / "watcher_weights",
}


def resolve(
    model: str, inputs: Mapping[str, str] | None = None, runs: Path | None = None, task: str | None = None
) -> Path:
    """The directory of MODEL.

    inputs  kinds of an ONNX model's inputs, where they can't be read off
    runs    where graphs from outside, and models for another task, get a directory of their own
    task    of a model that has several; None: its own
    """
    check_model(model)
    path = EMBEDDED.get(model, Path(model))
    if not (path / "config.json").is_file():
        path = plugins.plugin("models", "onnx").bring_in(model, inputs or {}, runs)
    if task is None:
        return path
    tasks = tasks_of(path)
    if task not in tasks:
        known = f"use one of {', '.join(tasks)}" if tasks else "leave it out of the recipe"
        raise InputError(f"{model} has no task {task!r}", fix=known)
    assert runs is not None
    config = {"task": task, "files": {name: sha256_file(path / name) for name in model_files(path)}}

    def make(out: Path) -> None:
        find_family(path).for_task(path, task, out / "model")

    return build("imported", runs, config=config, make=make).path / "model"


def tasks_of(directory: Path) -> tuple[str, ...]:
    """What the model of a directory can be for; nothing of one that has a single task."""
    tasks: tuple[str, ...] = getattr(find_family(directory), "TASKS", ())
    return tasks


def check_model(model: str) -> None:
    """InputError unless MODEL is one of the things that `resolve` takes."""
    path = EMBEDDED.get(model, Path(model))
    if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".onnx"):
        return
    if path.is_dir() and not any(path.glob("*.onnx")):
        raise InputError(
            f"{path}: no config.json with a model_type", fix="give a model directory, or one of .onnx files"
        )
    if not path.exists() and ":" not in model:
        raise InputError(
            f"no model {model!r}",
            fix=f"use {', '.join(EMBEDDED)}, the path of a model directory or .onnx file, or package.module:factory",
        )
