"""Which form of each component is fastest on the target and keeps its answers, by measurement on calibration data.

A form is FP32, bf16, or INT8 with its smoothing, its ranges, and some products in float. The loss is the
signal-to-noise ratio of the component's outputs, on samples that gave no ranges: it tells a hundredth of what flips an
answer, where a metric on a few hundred samples tells nothing. The verdict, on data never seen here, is the judge.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.console import log, progress
from edgemm.errors import InputError
from edgemm.graph.bypass import quantized_products
from edgemm.graph.shapes import fix_shapes
from edgemm.graph.switches import INPUT, switchable
from edgemm.host import host
from edgemm.recipe import QuantizeSearch, Recipe
from edgemm.recording import record, spread
from edgemm.report.int8_schema import Sensitivity, Trial, Tuned
from edgemm.report.int8_tables import smoothing
from edgemm.runtime.query import Tensors
from edgemm.simulation import Outputs, answers, simulated, sqnr_db
from edgemm.stages.quantize import Work
from edgemm.target import Target
from edgemm.trials import Bench, Form

HELD = 8  # calibration samples that a form is judged on, and that give no ranges
FEW = 4  # of them, on which single products are judged
EQUAL = 0.04  # forms that are no more than this faster count as equally fast, and the one of less loss is taken
AGAIN = 3  # more products in float, where the simulation promised too much


def tune(
    graph: Artifact, recipe: Recipe, target: Target, runs: Path, model: Artifact | None = None
) -> tuple[Recipe, tuple[Tuned, ...]]:
    """The recipe with the form of each component that its `quantize.search` finds, and how it was found."""
    if recipe.quantize is None or (search := recipe.quantize.search) is None:
        return recipe, ()
    if target.dialect == "tensorrt" and "int8" not in target.precisions:
        return recipe, ()
    quantize = recipe.quantize.model_copy(update={"held": HELD})
    recipe = recipe.model_copy(update={"quantize": quantize})
    work = Work(graph, recipe, target, runs, model)

    def make(out: Path) -> None:
        ends = time.monotonic() + search.budget_minutes * 60
        program = graph.json("program.json")
        if target.static:
            fix_shapes(program)
        held = record(graph, recipe, set(work.specs), program)
        rows = []
        for i, component in enumerate(program["components"]):
            name = component["name"]
            left = len(program["components"]) - i
            until = time.monotonic() + max(0.0, ends - time.monotonic()) / left

            def late(until: float = until) -> bool:
                return time.monotonic() > until

            bench = Bench(graph, component, program, spread(held[name], HELD), target, runs, judged_on(recipe))
            rows.append(tune_component(bench, work, search, late))
        found = [row.model_dump(mode="json") for row in rows]
        (out / "tuned.json").write_text(json.dumps(found), encoding="utf-8")

    config = {
        "quantize": quantize.model_dump(mode="json"),
        **judged_on(recipe),
        "target": target.model_dump(mode="json", include={"backend", "threads", "static", "isa"}),
        "host": host(),
    }
    kept = build("tuned", runs, parents=[graph], config=config, tools=("nncf", "onnxruntime", "openvino"), make=make)
    tuned = tuple(plugins.validate(Tuned, row, f"{kept.path}/tuned.json") for row in kept.json("tuned.json"))
    forms = {row.component: chosen_form(work, row) for row in tuned}
    changed = quantize.model_copy(update={"search": None, "components": forms})
    return recipe.model_copy(update={"quantize": changed}), tuned


def judged_on(recipe: Recipe) -> dict[str, Any]:
    """What decides on which samples a form is judged."""
    return {"calibration": recipe.calibration, "seed": recipe.seed, "held": HELD}


def chosen_form(work: Work, row: Tuned) -> dict[str, Any]:
    """What a recipe says of a component to get the form that was chosen."""
    changes: dict[str, Any] = {"use": work.uses[row.component], "int8": row.int8}
    if work.target.backend == "openvino":
        changes["precision"] = row.precision
    options = work.options[row.component]
    if row.int8 and work.ranged(row.component):
        found = {"smooth_quant": row.smooth_quant, "ranges": row.ranges, "keep_float": list(row.keep_float)}
        changes |= {k: v for k, v in found.items() if k in type(options).model_fields}
    return {**options.model_dump(mode="json", exclude_unset=True), **changes}


def tune_component(bench: Bench, work: Work, search: QuantizeSearch, late: Callable[[], bool]) -> Tuned:
    """Floats first; then smoothing and ranges until one keeps the loss; then as many products in float as it takes.

    What the budget leaves untried is left out, and said; FP32 and one INT8 are always tried.
    """
    name = bench.component["name"]
    options = work.options[name]
    precisions = search.precisions if bench.times else ("f32",)
    trials: list[Trial] = []

    def attempt(changes: dict[str, Any]) -> Trial:
        """The most exact of the trials of an INT8 graph, one a precision of what stays float."""
        tried = options.model_copy(update=changes)
        made = work.int8(name, tried)
        rows = [bench.measure(Form(made, tried, p)) for p in precisions]
        trials.extend(rows)
        for row in rows:
            log(f"tune {name}: {described(row)}")
        return max(rows, key=lambda row: row.sqnr_db)

    if bench.times:
        trials += [bench.measure(Form(bench.plain, None, p)) for p in precisions]
    best: Trial | None = None
    base: dict[str, Any] = {}
    for changes in settings(options, search) if work.ranged(name) else [{}]:
        if best and (best.sqnr_db >= search.sqnr_db or late()):
            break
        row = attempt(changes)
        if best is None or row.sqnr_db > best.sqnr_db:
            best, base = row, changes
    assert best
    sensitivity: list[Sensitivity] = []
    if work.ranged(name) and "keep_float" in type(options).model_fields:
        made = work.int8(name, options.model_copy(update=base))
        saved = saved_ms(bench, made, options, best.precision)
        switch = Switches(bench.component, onnx.load(made.path / f"{name}.onnx"), work.read(name), bench.held)
        sensitivity = switch.sensitivity(saved, late, name)
        order = [row.name for row in sorted(sensitivity, key=costliest)]
        for floats in ladder(switch, order, best, search.sqnr_db):
            if late():
                log(f"tune {name}: the budget is spent")
                break
            if attempt({**base, "keep_float": (*options.keep_float, *floats)}).sqnr_db >= search.sqnr_db:
                break
        slow = tuple(row.name for row in sensitivity if row.saved_ms is not None and row.saved_ms <= 0)
        if 0 < len(slow) < len(sensitivity) and not late():
            attempt({**base, "keep_float": (*options.keep_float, *slow)})
    chosen = fastest(trials, search.sqnr_db)
    if chosen.sqnr_db < search.sqnr_db:
        log(f"warning: tune {name}: nothing tried keeps {search.sqnr_db:g} dB; {described(chosen)} is the closest")
    log(f"tune {name}: chosen: {described(chosen)}")
    front = pareto(trials)
    return Tuned(
        component=name,
        wanted_db=search.sqnr_db,
        sqnr_db=chosen.sqnr_db,
        smooth_quant=chosen.smooth_quant,
        ranges=chosen.ranges,
        keep_float=chosen.keep_float,
        trials=tuple(t.model_copy(update={"pareto": t in front, "chosen": t is chosen}) for t in trials),
        sensitivity=tuple(sensitivity),
        int8=chosen.int8,
        precision=chosen.precision,
        speedup=chosen.speedup,
    )


def settings(options: Any, search: QuantizeSearch) -> list[dict[str, Any]]:
    """Changes of the quantizer's options to try, of those that it has; InputError where it has no such ranges."""
    known = type(options).model_fields
    observers = get_args(known["ranges"].annotation) if "ranges" in known else search.ranges
    ranges = [r for r in search.ranges if r in observers]
    if not ranges:
        raise InputError(
            f"quantize.search.ranges: {', '.join(search.ranges)} is nothing that this quantizer has",
            fix=f"it has {', '.join(observers)}",
        )
    rows = [{"smooth_quant": a, "ranges": r} for r in ranges for a in search.smooth_quant]
    found: list[dict[str, Any]] = []
    for row in rows:
        if (changes := {k: v for k, v in row.items() if k in known}) not in found:
            found.append(changes)
    return found


def fastest(trials: Sequence[Trial], wanted_db: float) -> Trial:
    """The fastest that keeps the loss; of those EQUALly fast the most exact; the most exact where none keeps it.

    From the most exact on, a form is only left for one that is faster by more than the clock's noise, so that forms
    which are equal are not told apart by it. Without times the first that keeps the loss.
    """
    enough = [t for t in trials if t.sqnr_db >= wanted_db]
    if not enough:
        return max(trials, key=lambda t: t.sqnr_db)
    if any(t.speedup is None for t in enough):
        return enough[0]
    chosen, *others = sorted(enough, key=lambda t: -t.sqnr_db)
    for other in others:
        if (other.speedup or 0.0) > (chosen.speedup or 0.0) * (1 + EQUAL):
            chosen = other
    return chosen


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The trials than which no other is both faster and more exact."""

    def beaten(t: Trial, by: Trial) -> bool:
        one, two = (t.speedup or 0.0, t.sqnr_db), (by.speedup or 0.0, by.sqnr_db)
        return two != one and two[0] >= one[0] and two[1] >= one[1]

    return [t for t in trials if not any(beaten(t, other) for other in trials)]


def described(row: Trial) -> str:
    """A form in words, with what it gives."""
    form = f"INT8, smoothing {smoothing(row)}, {row.ranges or 'weights'}" if row.int8 else "float"
    floats = f", {len(row.keep_float)} in float" if row.keep_float else ""
    faster = f", {row.speedup:.2f}x" if row.speedup else ""
    return f"{form}, {row.precision}{floats}: {row.sqnr_db:.1f} dB{faster}"


def saved_ms(bench: Bench, made: Artifact, options: Any, precision: str) -> dict[str, float]:
    """What INT8 saves in each product on the target; empty where that is not timed here."""
    if not bench.times:
        return {}
    before = bench.product_times(Form(bench.plain, None, precision))
    after = bench.product_times(Form(made, options, precision))
    return {name: before[name] - ms for name, ms in after.items() if name in before}


def costliest(row: Sensitivity) -> tuple[bool, float]:
    """Order in which products leave INT8: first those that gain no time by it, then the most noise a millisecond."""
    noise = 10 ** (-(row.alone_db or 0.0) / 10)
    if row.saved_ms is None:
        return True, -noise
    return row.saved_ms > 0, -noise / max(row.saved_ms, 1e-6)


def ladder(switch: Switches, order: Sequence[str], best: Trial, wanted_db: float) -> list[list[str]]:
    """The fewest products, in `order`, that must be float to keep the loss in simulation, then some more."""
    if best.sqnr_db >= wanted_db or len(order) < 2:
        return []
    most = len(order) - 1  # all of them in float is a form of its own
    low, high = 0, most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if switch.without(order[:middle]) >= wanted_db else (middle, high)
    steps = dict.fromkeys(min(most, high + i * max(1, high // 4)) for i in range(1 + AGAIN))
    return [list(order[:k]) for k in steps]


class Switches:
    """The loss of a component with any of its products' activations rounded, in simulation."""

    def __init__(
        self, component: dict[str, Any], quantized: onnx.ModelProto, plain: onnx.ModelProto, held: Sequence[Tensors]
    ) -> None:
        self.products = quantized_products(quantized)
        port = {"name": INPUT, "dtype": "bool", "shape": [len(self.products)]}
        spec = {**component, "inputs": [*component["inputs"], port]}
        self.held = spread(held, FEW)
        self.call = simulated(switchable(quantized, self.products), spec)
        self.wanted: Outputs = answers(simulated(plain, component), self.held)

    def judge(self, on: Sequence[bool]) -> float:
        switch = np.array(on, np.bool_)
        return sqnr_db(self.wanted, answers(self.call, [{**sample, INPUT: switch} for sample in self.held]))

    def without(self, floats: Sequence[str]) -> float:
        """SQNR with the activations of `floats` unrounded."""
        return self.judge([name not in floats for name in self.products])

    def sensitivity(self, saved: dict[str, float], late: Callable[[], bool], where: str) -> list[Sensitivity]:
        """A row for each product that the budget leaves time for."""
        every = self.without(())
        rows: list[Sensitivity] = []
        for name in progress(self.products, f"sensitivity of {where}"):
            if late():
                log(f"tune {where}: the budget is spent: sensitivity of {len(rows)} of {len(self.products)} products")
                break
            alone = self.judge([n == name for n in self.products])
            rows.append(
                Sensitivity(name=name, gain_db=self.without([name]) - every, alone_db=alone, saved_ms=saved.get(name))
            )
        return rows
