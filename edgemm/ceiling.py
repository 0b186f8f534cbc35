"""How much of a model's FP32 time is spent in what is INT8 now, and what speed-up that allows at most (Amdahl)."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.data import split
from edgemm.host import host
from edgemm.kernels import kernels
from edgemm.recipe import Recipe
from edgemm.report.int8_schema import Share
from edgemm.report.schema import Latency
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import Directory, open_directory
from edgemm.stages.compile import compile_engine
from edgemm.target import Target

FASTER = 4  # INT8 over FP32, at most: VNNI's instructions take four values where FP32's take one
CALLS = 8  # of a component, which a decoder meets once a token


def int8_share(
    graph: Artifact, engine: Artifact, latency: Latency | None, recipe: Recipe, target: Target, runs: Path
) -> tuple[Share, ...]:
    """A row for each component that has INT8 products, and one for all; none where this host has no counters of them.

    graph   FP32, pruned but not quantized;  engine  compiled from what quantizing made of it
    latency of the whole and of each component, whose speed-up is reached by INT8 alone unless something was pruned
    """
    if target.backend != "openvino":
        return ()
    plain = compile_engine(graph, target, "f32", runs)
    cached = measure(graph, plain, engine, recipe, target, runs).json("shares.json")
    reached = {}
    if latency is not None and not recipe.prune:
        reached = {c.name: c.speedup_p50 for c in latency.components} | {"all": latency.speedup_p50}
    rows = [Share(name=n, fp32_ms=ms, share=f, ceiling=ceiling(f), reached=reached.get(n)) for n, ms, f in cached]
    for row in rows[-1:]:
        log(f"{row.share:.0%} of FP32's time is INT8 now: at most {row.ceiling:.2f}x")
    return tuple(rows)


def ceiling(share: float) -> float:
    """The speed-up if a share of the time becomes FASTER."""
    return 1 / ((1 - share) + share / FASTER)


def measure(graph: Artifact, plain: Artifact, engine: Artifact, recipe: Recipe, target: Target, runs: Path) -> Artifact:
    """shares.json: [name, ms in FP32, share of it], the last row of all components together."""

    def make(out: Path) -> None:
        session = open_directory(plain.path)
        calibration, _ = split(recipe, lambda: session.program)
        met: dict[str, list[Tensors]] = {name: [] for name in session.components}
        session.observe = lambda name, tensors: met[name].append(dict(tensors))
        session.complete(session.tensors(calibration[0].query), calibration[0].text)
        rows, whole, gained = [], 0.0, 0.0
        programs = [a.json("program.json") for a in (plain, engine)]
        specs = [{c["name"]: c for c in program["components"]} for program in programs]
        for name in session.components:
            if not met[name]:
                continue
            model = onnx.load(graph.path / f"{name}.onnx")
            calls = met[name][:: max(1, len(met[name]) // CALLS)]
            runs_of = len(met[name]) / len(calls)
            before, after = (
                kernels(Directory(a.path), spec[name], program["settings"], calls, model)
                for a, spec, program in zip((plain, engine), specs, programs, strict=True)
            )
            int8 = {product for kernel in after if kernel.int8 for product in kernel.products}
            ms = sum(k.ms for k in before) * runs_of
            part = sum(k.ms for k in before if k.products and k.products <= int8) * runs_of
            rows.append([name, ms, part / ms])
            whole, gained = whole + ms, gained + part
        rows.append(["all", whole, gained / whole])
        (out / "shares.json").write_text(json.dumps(rows), encoding="utf-8")

    config = {"calibration": recipe.calibration, "seed": recipe.seed, "threads": target.threads, "host": host()}
    parents = [graph, plain, engine]
    tools = plugins.plugin("backends", target.backend).TOOLS
    return build("profile", runs, parents=parents, config=config, tools=tools, make=make)
