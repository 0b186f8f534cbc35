"""What a component's graph computes, in ONNX Runtime with its Q/DQ as written, and how far that is from FP32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemm.runtime import onnxruntime
from edgemm.runtime.query import Tensors

EXACT = 1e-12  # noise below this share of the signal counts as none: 120 dB
Call = Callable[[Tensors], dict[str, Any]]
Outputs = list[dict[str, Any]]


def simulated(model: onnx.ModelProto, component: dict[str, Any]) -> Call:
    """A graph of `component`, its entry in program.json."""
    files = {f"{component['name']}.onnx": model.SerializeToString()}
    return onnxruntime.compile_component(files, component, {"threads": 2, "qdq": "as written"})


def answers(call: Call, samples: Sequence[Tensors]) -> Outputs:
    """What a component makes of each sample."""
    return [{name: np.array(value) for name, value in call(sample).items()} for sample in samples]


def sqnr_db(wanted: Outputs, got: Outputs) -> float:
    """Signal-to-noise ratio of outputs, in dB, each output of each sample of equal weight."""
    signal = noise = 0.0
    for row, other in zip(wanted, got, strict=True):
        for name, value in row.items():
            scale = float(np.square(value, dtype=np.float64).mean()) or 1.0
            signal += 1.0
            noise += float(np.square(np.subtract(other[name], value, dtype=np.float64)).mean()) / scale
    return float(10 * np.log10(signal / max(noise, EXACT * signal)))


def unbiased(
    model: onnx.ModelProto, fp32: onnx.ModelProto, component: dict[str, Any], samples: Sequence[Tensors], output: str
) -> onnx.ModelProto:
    """`model`, in place: the mean error of each channel of `output` float32[..., V] against `fp32` is taken off.

    Rounded weights move single tokens up or down, the same way in every sentence: where the end of a text and the full
    stop are close, that decides for all texts alike.

    samples   inputs of `component` (its entry in program.json) over which the error is averaged
    """
    if not samples:
        return model
    pairs = zip(*(answers(simulated(graph, component), samples) for graph in (fp32, model)), strict=True)
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
