"""What rounding adds to an output on average, taken off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemm.runtime import onnxruntime
from edgemm.runtime.query import Tensors


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
    wanted, got = (_outputs(graph, component, samples, output) for graph in (fp32, model))
    error = np.mean([(g - w).reshape(-1, w.shape[-1]).mean(0) for w, g in zip(wanted, got, strict=True)], 0)
    biased, bias = f"{output}_biased", f"{output}_bias"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == output:
                    names[i] = biased
    model.graph.initializer.append(numpy_helper.from_array(-error.astype(np.float32), bias))
    model.graph.node.append(helper.make_node("Add", [biased, bias], [output], name=f"{output}_unbiased"))
    return model


def _outputs(model: onnx.ModelProto, component: dict[str, Any], samples: Sequence[Tensors], output: str) -> list[Any]:
    files = {f"{component['name']}.onnx": model.SerializeToString()}
    call = onnxruntime.compile_component(files, component, {"threads": 2, "qdq": "as written"})
    return [np.array(call(sample)[output], np.float64) for sample in samples]
