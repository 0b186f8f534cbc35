"""The seven stages in order."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from edgemm import artifact, plugins
from edgemm.artifact import Artifact, locked, write_atomic
from edgemm.ceiling import int8_share
from edgemm.console import log
from edgemm.data import check_data
from edgemm.errors import InputError
from edgemm.host import host
from edgemm.models._sources import check_model
from edgemm.recipe import Recipe, check_plugins
from edgemm.report import html, junit, markdown
from edgemm.report.schema import BundleFile, Pruning, Report, TargetReport
from edgemm.search import search
from edgemm.stages.compile import compile_engine
from edgemm.stages.export import export
from edgemm.stages.load import load
from edgemm.stages.package import package
from edgemm.stages.prune import prune
from edgemm.stages.quantize import quantize
from edgemm.stages.verify import verify
from edgemm.target import Target
from edgemm.tuning import tune

TOOLS = ("torch", "transformers", "onnx", "onnxruntime", "nncf", "openvino", "tensorrt-rtx-cu13-libs", "numpy")


def compress_one(recipe: Recipe, target: Target, runs: Path) -> tuple[TargetReport, Artifact | None]:
    """One model, one target. Read this function and you have read edgemm."""
    source = load(recipe, runs)  # FP32 weights, recorded reference outputs
    recipe = search(source, recipe, target, runs)  # how wide layers stay, by their latencies on the target
    pruned = prune(source, recipe, runs)  # smaller shapes, not masks
    graph = export(pruned, recipe.export, runs)  # one ONNX graph a component
    recipe, tuned = tune(graph, recipe, target, runs, pruned)  # INT8, bf16 or FP32, by latency and loss on the target
    quantized = quantize(graph, recipe, target, runs, pruned)  # Q/DQ, ranges from the train split
    precision = target.precision if target.dialect == "tensorrt" else recipe.precision or target.precision
    engine = compile_engine(quantized, target, precision, runs)  # OpenVINO IR, TensorRT engine
    baseline = compile_engine(export(source, recipe.export, runs), target, "f32", runs)  # FP32, same runtime
    pruning = None if pruned is source else Pruning.model_validate(pruned.json("pruning.json"))
    verified = verify(engine, baseline, source, pruning, recipe, target, runs)
    report = TargetReport.model_validate(verified.json("target.json"))
    if quantized is not graph:
        share = int8_share(graph, engine, report.latency, recipe, target, runs)
        findings = {**quantized.json("findings.json"), "tuning": tuned, "int8_share": share}
        report = TargetReport.model_validate({**report.model_dump(), **findings})
    if report.verdict not in ("PASS", "UNVERIFIED"):
        return report, None  # what is not proven is not packed
    return report, package(verified, engine, quantized, graph, source, recipe, target, runs)  # one .edgemm file


def compress(recipe: Recipe, targets: Sequence[Target], out: Path, *, fresh: bool = False) -> Report:
    """Compress one model for every target; `out` gets the reports and <target>/<model>-<target>.edgemm.

    fresh   forget what an earlier run left in `out`/.runs
    Raises InputError or ToolchainError before anything is judged. Verdicts are in the report:
    `verdict.raise_verdict` turns them into an exit code.
    """
    check_plugins(recipe)
    check_model(recipe.model)
    check_data(recipe)
    for use in recipe.quantize.quantizers if recipe.quantize else ():
        plugins.plugin("quantizers", use).require()  # before an hour of pruning
    for target in targets:
        plugins.plugin("backends", target.backend)
    runs = out / ".runs"
    with locked(runs):
        if fresh:
            for entry in runs.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
        rows = []
        for target in targets:
            row, bundle = compress_one(recipe, target, runs)
            place = out / target.name / f"{file_stem(recipe.model)}-{target.name}.edgemm"
            if bundle is None:
                place.unlink(missing_ok=True)
                row = row.model_copy(update={"notes": (*row.notes, f"no bundle: the verdict is {row.verdict}")})
            else:
                content = (bundle.path / "model.edgemm").read_bytes()
                write_atomic(place, content)
                for name in bundle.manifest.files.keys() - {"model.edgemm"}:  # what a device needs beside it
                    write_atomic(place.with_name(name), (bundle.path / name).read_bytes())
                file = BundleFile(path=str(place), sha256=bundle.manifest.files["model.edgemm"].sha256)
                row = row.model_copy(update={"bundle": file})
            rows.append(row)
        report = Report(
            model=recipe.model,
            recipe=recipe.name,
            seed=recipe.seed,
            versions=artifact.tool_versions(TOOLS),
            host=host(),
            targets=tuple(rows),
        )
        write_report(report, out)
    return report


def file_stem(model: str) -> str:
    """What the bundle of MODEL is called: the last part of its path, or the factory's name."""
    name = model.rstrip("/").rpartition("/")[2] or "model"
    return name.removesuffix(".onnx").replace(":", ".")


def write_report(report: Report, out: Path) -> None:
    """report.json, report.md, report.html and junit.xml in `out`."""
    log(f"report {out}/report.html")
    write_atomic(out / "report.json", (report.model_dump_json(by_alias=True, indent=1) + "\n").encode())
    for name, render in (("report.md", markdown.render), ("report.html", html.render), ("junit.xml", junit.render)):
        write_atomic(out / name, render(report).encode())


def train(recipe: Recipe, out: Path) -> Path:
    """Train a reference model by the recipe's train section; `out`/model is then what `compress` takes.

    `out` also holds log.csv and checkpoint.pt: the same call resumes an interrupted run.
    """
    from edgemm.models import reasoner, scenes_painter, scenes_reasoner, scenes_watcher
    from edgemm.reasoner.painter_train import train_painter
    from edgemm.reasoner.scenes_train import train_scenes
    from edgemm.reasoner.train import train as train_reasoner
    from edgemm.reasoner.watcher_train import train_watcher

    sections = recipe.train, recipe.train_scenes, recipe.train_painter, recipe.train_watcher
    if sum(section is not None for section in sections) != 1:
        raise InputError(
            f"recipe {recipe.name} has no train section, or several",
            fix="use reasoner-easy-vqa, reasoner-scenes, painter-scenes or watcher-scenes",
        )
    with locked(out / ".runs"), artifact.writing(out):
        family: ModuleType
        model: Any
        if recipe.train_scenes:
            world = plugins.plugin("data", recipe.data or "scenes")
            model, corpus = train_scenes(world, recipe.train_scenes, recipe.seed, out)
            tokenizer = corpus.tokenizer
            family = scenes_reasoner
        elif recipe.train_painter:
            world = plugins.plugin("data", recipe.data or "scenes")
            model, tokenizer = train_painter(world, recipe.train_painter, recipe.seed, out)
            family = scenes_painter
        elif recipe.train_watcher:
            world = plugins.plugin("data", recipe.data or "scenes")
            model, tokenizer = train_watcher(world, recipe.train_watcher, recipe.seed, out)
            family = scenes_watcher
        else:
            assert recipe.train
            samples = plugins.plugin("data", recipe.data or "easy_vqa").samples("train")
            model, tokenizer = train_reasoner(samples, recipe.train, recipe.seed, out)
            family = reasoner
        (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        family.save(model, out / "model", out, half=True)
    return out / "model"
