"""What a model, a bundle and this machine are: inspect, evaluate, doctor."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgemm import artifact, plugins
from edgemm.errors import InputError, ToolchainError
from edgemm.host import host
from edgemm.plugins import validate
from edgemm.recipe import Recipe
from edgemm.report.schema import Certificate
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.program import Program
from edgemm.runtime.session import Session
from edgemm.scorecard import TASKS, Row, scorecard

TOOLS = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "nncf",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "numpy",
    "tokenizers",
    "easy-vqa",
)

ANYWHERE: dict[str, Any] = {"backend": "onnxruntime", "settings": {"threads": 1}}


def is_bundle(model: str) -> bool:
    return model.endswith(".edgemm")


def inspect(model: str) -> dict[str, Any]:
    """Components of a model or bundle; attention and hidden units of a model; certificate and files of a bundle."""
    if is_bundle(model):
        bundle = read_bundle(Path(model))
        manifest = bundle.manifest
        program = validate(Program, manifest["program"], f"{model}: program").model_dump(mode="json")
        certificate = validate(Certificate, manifest["certificate"], f"{model}: certificate")
        return {
            "components": [{k: c[k] for k in ("name", "inputs", "outputs")} for c in program["components"]],
            "version": bundle.version,
            "sha256": bundle.sha256,
            "certificate": certificate.model_dump(mode="json", exclude_unset=True),
            "files": manifest["files"],
        }
    from edgemm.models import find_family, is_torch, read_model, sizes, whole_program
    from edgemm.models._hidden_units import hidden_units
    from edgemm.models._sources import resolve

    with tempfile.TemporaryDirectory() as runs:
        directory = resolve(model, runs=Path(runs))
        family = find_family(directory)
        module = read_model(family, directory)
        torch_model = is_torch(directory)
        parameters, macs = sizes(family, module) if torch_model else family.sizes(module)
        hidden = hidden_units(module) if torch_model else []
        program = whole_program(family, module, directory)
    fields = ("name", "kind", "queries", "keys", "heads", "head_dim")
    return {
        "modalities": sorted(validate(Program, {**program, **ANYWHERE}, model).sources()),
        "output": program["output"]["kind"],
        "components": [{k: c[k] for k in ("name", "inputs", "outputs")} for c in program["components"]],
        "attention": [{f: getattr(b, f) for f in fields} for b in family.attentions(module)],
        "hidden_units": [{"name": h.name, "units": h.units} for h in hidden],
        "parameters": parameters,
        "macs": macs,
    }


def link_map(model: str, data: str | None) -> dict[str, Any]:
    """Magnitude of every attention link: {"score", "layers": [{name, kind, queries, keys, heads}], "fused": [name]}.

    data   calibration data, on which mean attention probability x norm of the carried value is measured ("attention");
           without any, the norm of a head's weights ("magnitude"), which is one for all edges of a merged sequence
    heads  a number a head; `fused` are layers whose heads can't be told apart, since their q, k and v are one matrix
    """
    from edgemm.data import split
    from edgemm.models import find_family, is_torch, open_fp32, read_model
    from edgemm.models._sources import resolve
    from edgemm.pruners._scores import links, magnitude

    if is_bundle(model):
        raise InputError(f"{model} is a bundle, whose links are fixed", fix="give the model that it was made from")
    with tempfile.TemporaryDirectory() as runs:
        directory = resolve(model, runs=Path(runs))
        family = find_family(directory)
        if not is_torch(directory):
            raise InputError(f"{model} is a graph, whose heads are not known", fix="give the model in torch")
        module = read_model(family, directory)
        listed = family.attentions(module)
        blocks = [b for b in listed if b.q and b.heads]
        fused = [b.name for b in listed if not b.q]
        if not blocks:
            why = f"the q, k and v of {', '.join(fused)} are one matrix" if fused else "there is no attention layer"
            raise InputError(f"{model} has no links to show: {why}", fix="leave --links out")
        if data is None:
            scores = magnitude(blocks)
            found = {b.name: {(b.queries, b.keys): scores[b.name]} for b in blocks}
        else:
            session = open_fp32(family, module, directory)
            calibration, _ = split(Recipe(name="inspect", model=model, data=data), lambda: session.program)
            ids = (session.program["text"] or {}).get("ids")
            words = [0]

            def observe(_component: str, tensors: Any) -> None:
                if ids in tensors:
                    words[0] = tensors[ids].shape[1]

            session.observe = observe
            queries = [s.query for s in calibration]
            found = links(blocks, lambda: session.outputs(queries), words=lambda: words[0])
    rows = [
        {"name": b.name, "kind": b.kind, "queries": queries, "keys": keys, "heads": heads}
        for b in blocks
        for (queries, keys), heads in found[b.name].items()
    ]
    return {"score": "magnitude" if data is None else "attention", "layers": rows, "fused": fused}


def plot_links(found: dict[str, Any], file: Path) -> None:
    """Draw what `link_map` found, layers x heads, a panel for each edge, as .png or .svg."""
    if file.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {file}: no picture ends in {file.suffix!r}", fix="name it .png or .svg")
    from edgemm.report.html import save_links
    from edgemm.report.schema import Layer

    def whole(row: dict[str, Any]) -> Layer:
        n, heads = len(row["heads"]), tuple(row["heads"])
        counts = {f"{of}_{when}": n for of in ("links", "heads", "keys") for when in ("before", "after")}
        edge = {k: row[k] for k in ("name", "kind", "queries", "keys")}
        return Layer.model_validate({**edge, **counts, "scores": heads, "kept": tuple(range(n))})

    with artifact.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_links([whole(row) for row in found["layers"]], file)


def evaluate(model: str, data: str | None) -> dict[str, dict[str, float]]:
    """The default metric on the verification split -> {"all" and each kind: {"n": samples, metric: value}}."""
    with opened(model) as session:
        if is_bundle(model):
            data = data or read_bundle(Path(model)).manifest["provenance"]["recipe"]["data"]
        return _evaluate(session, data)


@contextmanager
def opened(model: str, task: str | None = None) -> Iterator[Session]:
    """A bundle's session, or that of a model's FP32 graphs for one of its tasks."""
    if is_bundle(model):
        bundle = read_bundle(Path(model))
        yield Session(bundle.files, bundle.manifest["program"], model)
        return
    from edgemm.models import find_family, open_fp32, read_model
    from edgemm.models._sources import resolve

    with tempfile.TemporaryDirectory() as runs:
        directory = resolve(model, runs=Path(runs), task=task)
        family = find_family(directory)
        yield open_fp32(family, read_model(family, directory), directory)


def score(model: str, data: str) -> list[Row]:
    """The scorecard's rows of every task of MODEL, or of each bundle TASK.edgemm in a directory; see scorecard.py."""
    from edgemm.models._sources import resolve, tasks_of

    world, folder = plugins.plugin("data", data), Path(model)
    bundles = {task: str(path) for task in TASKS if (path := folder / f"{task}.edgemm").is_file()}
    if not bundles and not set(TASKS) <= set(tasks_of(resolve(model))):
        raise InputError(f"{model} has not the tasks of a card", fix=f"give a model of {', '.join(TASKS)}")
    rows = []
    for task in bundles or TASKS:
        with opened(bundles.get(task, model), None if bundles else task) as session:
            rows += scorecard(task, session, world)
    return rows


def _evaluate(session: Session, data: str | None) -> dict[str, dict[str, float]]:
    from edgemm.data import split
    from edgemm.parity import default_metric, kind_of

    _, samples = split(Recipe(name="evaluate", data=data), lambda: session.program)
    outputs = session.outputs([s.query for s in samples])
    targets = [s.label for s in samples]
    audio = bool(session.program["audio"])
    name = default_metric(kind_of(session.program), has_targets=None not in targets, audio=audio)
    metric = plugins.plugin("metrics", name)
    if name in ("agreement", "cosine", "text_agreement_wer"):  # with itself
        raise InputError(f"{data} has no right answers to judge by", fix="give data with a column label")
    values = metric.values(outputs, outputs, targets)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for sample, value in zip(samples, values.tolist(), strict=True):
        by_kind[sample.kind].append(value)
    groups = {"all": values.tolist(), **(dict(sorted(by_kind.items())) if len(by_kind) > 1 else {})}
    error = getattr(metric, "ERROR", False)
    return {k: {"n": len(v), name: float(1 - np.mean(v) if error else np.mean(v))} for k, v in groups.items()}


def doctor() -> dict[str, dict[str, str]]:
    """Host, versions of tools, and what each backend can do here or how to get it."""
    backends = {}
    for name in plugins.names("backends"):
        try:
            backends[name] = plugins.plugin("backends", name).doctor()
        except ToolchainError as e:
            backends[name] = str(e)
    tools = {k: v for k, v in artifact.tool_versions(TOOLS).items() if k != "edgemm"}
    return {"host": host(), "tools": tools, "backends": backends}
