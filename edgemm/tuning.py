"""Which INT8 keeps the answers: smoothing, ranges and float layers of a component, by measurement on calibration data.

The loss is the signal-to-noise ratio of the component's outputs on samples that gave no ranges: it tells a hundredth of
what flips an answer, where a metric on a few hundred samples tells nothing. The verdict, on data never seen here, is
the judge all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemm.console import log, progress
from edgemm.graph.bypass import bypass, quantized_products
from edgemm.recipe import QuantizeSearch
from edgemm.report.schema import Sensitivity, Trial, Tuned
from edgemm.runtime import onnxruntime
from edgemm.runtime.query import Tensors

FIT, HELD = 64, 8  # calibration samples that a trial takes ranges from, and is judged on
MOST_FLOAT = 0.5  # of the products; a component that needs more is no candidate for INT8
Quantize = Callable[[onnx.ModelProto, Sequence[Tensors], Any], onnx.ModelProto]


def tune(
    component: dict[str, Any],
    model: onnx.ModelProto,
    samples: Sequence[Tensors],
    quantize: Quantize,
    options: Any,
    search: QuantizeSearch,
) -> tuple[Any, Tuned]:
    """The options, of those that `search` allows, with which `component` reaches `search.sqnr_db`, and what was tried.

    First the smoothing and the ranges that are best, then as few products in float as it takes, the most sensitive
    first. What the budget leaves untried is left out, and said.

    model      FP32 graph;  samples  what it met in calibration;  component  its entry in program.json
    """
    started = time.monotonic()
    held = spread(samples, HELD)
    fit = [s for s in samples if not any(s is h for h in held)][:FIT] or held
    judge = Judge(component, model, held)
    trials: list[Trial] = []
    best: tuple[float, Any, onnx.ModelProto] | None = None
    for alpha, ranges in ((a, r) for r in search.ranges for a in search.smooth_quant):
        if best and (best[0] >= search.sqnr_db or time.monotonic() - started > search.budget_minutes * 60):
            break
        tried = options.model_copy(update={"smooth_quant": alpha, "ranges": ranges})
        made = quantize(model, fit, tried)
        sqnr = judge(made)
        log(f"tune {component['name']}: smooth_quant {alpha}, {ranges}: {sqnr:.1f} dB")
        trials.append(Trial(smooth_quant=alpha, ranges=ranges, sqnr_db=sqnr))
        if best is None or sqnr > best[0]:
            best = sqnr, tried, made
    assert best
    sqnr, chosen, made = best
    rows: list[Sensitivity] = []
    if sqnr < search.sqnr_db:
        names = quantized_products(made)
        for name in progress(names, f"sensitivity of {component['name']}"):
            rows.append(Sensitivity(name=name, gain_db=judge(bypass(made, {name})) - sqnr))
        floats: list[str] = []
        for row in sorted(rows, key=lambda r: -r.gain_db)[: int(MOST_FLOAT * len(rows))]:
            floats.append(row.name)
            sqnr = judge(bypass(made, floats))
            if sqnr >= search.sqnr_db:
                break
        log(f"tune {component['name']}: {len(floats)} of {len(names)} products in float: {sqnr:.1f} dB")
        chosen = chosen.model_copy(update={"keep_float": (*chosen.keep_float, *floats)})
    found = Tuned(
        component=component["name"],
        wanted_db=search.sqnr_db,
        sqnr_db=sqnr,
        smooth_quant=chosen.smooth_quant,
        ranges=chosen.ranges,
        keep_float=chosen.keep_float,
        trials=tuple(trials),
        sensitivity=tuple(rows),
    )
    return chosen, found


class Judge:
    """Signal-to-noise ratio, in dB, of a graph's outputs against the FP32 graph's on the same inputs."""

    def __init__(self, component: dict[str, Any], model: onnx.ModelProto, held: Sequence[Tensors]) -> None:
        self.component, self.held = component, held
        self.wanted = outputs(model, component, held)

    def __call__(self, model: onnx.ModelProto) -> float:
        signal = noise = 0.0
        for wanted, got in zip(self.wanted, outputs(model, self.component, self.held), strict=True):
            for name, value in wanted.items():
                scale = float(np.square(value, dtype=np.float64).mean()) or 1.0
                signal += 1.0
                noise += float(np.square(got[name] - value, dtype=np.float64).mean()) / scale
        return float(10 * np.log10(signal / max(noise, 1e-12)))


def unbiased(
    model: onnx.ModelProto,
    fp32: onnx.ModelProto,
    component: dict[str, Any],
    samples: Sequence[Tensors],
    output: str | None,
) -> onnx.ModelProto:
    """`model`, in place: the mean error of each channel of `output` float32[..., V] against `fp32` is taken off.

    Rounded weights move single tokens up or down, the same way in every sentence: where the end of a text and the full
    stop are close, that decides for all texts alike.

    samples   inputs of `component` (its entry in program.json) over which the error is averaged
    output    None: nothing is taken off
    """
    if not samples or output is None:
        return model
    pairs = zip(*(outputs(graph, component, samples) for graph in (fp32, model)), strict=True)
    errors = [got[output].astype(np.float64) - wanted[output] for wanted, got in pairs]
    error = np.mean([e.reshape(-1, e.shape[-1]).mean(0) for e in errors], 0)
    biased, bias = f"{output}_biased", f"{output}_bias"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == output:
                    names[i] = biased
    model.graph.initializer.append(numpy_helper.from_array(-error.astype(np.float32), bias))
    model.graph.node.append(helper.make_node("Add", [biased, bias], [output], name=f"{output}_unbiased"))
    return model


def outputs(model: onnx.ModelProto, component: dict[str, Any], samples: Sequence[Tensors]) -> list[dict[str, Any]]:
    """What a graph of `component` makes of each sample, its Q/DQ computed as written."""
    files = {f"{component['name']}.onnx": model.SerializeToString()}
    call = onnxruntime.compile_component(files, component, {"threads": 2, "qdq": "as written"})
    return [call(sample) for sample in samples]


def spread(samples: Sequence[Tensors], n: int) -> list[Tensors]:
    """At most `n` of the samples, evenly spread."""
    step = max(1, len(samples) // n)
    return list(samples[step // 2 :: step])[:n]
