"""Latency of single layers at reduced widths: each is a graph of its own, made for OpenVINO and timed in it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from edgemm.console import progress
from edgemm.errors import ToolchainError

ROUNDS, RUNS, WARM_UP = 7, 10, 3
# What decides the latency of a layer, but its width:
#   "linear", input                                               two linear layers and a GELU
#   "convolution", input, 2 x (kernel, stride, padding), outputs   two convolutions and a ReLU
#   "attention", input, keys, head_dim, whether keys are another input than queries
Shape = tuple[Any, ...]


def measure(
    layers: Iterable[tuple[Shape, list[int]]], threads: int, whole: Callable[[], object]
) -> dict[tuple[Shape, int], float]:
    """Time of each layer graph at each of its widths, FP32 in OpenVINO, as a share of what `whole` takes.

    Layers of one shape are timed once, and `whole` in turn with each shape.
    """
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    core, table = ov.Core(), {}
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    tried: dict[Shape, set[int]] = defaultdict(set)
    for shape, widths in layers:
        tried[shape].update(widths)
    for shape in progress(sorted(tried, key=str), "layer shapes timed"):
        widths = sorted(tried[shape])
        made = [core.compile_model(layer_graph(shape, w), "CPU", settings).create_infer_request() for w in widths]
        base, *times = timed([whole, *(request.infer for request in made)])
        slowest = 0.0
        for width, ms in zip(widths, times, strict=True):
            slowest = max(slowest, ms)  # noise does not make a wider layer faster
            table[shape, width] = slowest / base
    return table


def timed(calls: Sequence[Callable[[], object]], runs: int = RUNS) -> list[float]:
    """Least processor ms of each call, over rounds of so many runs that go forth and back over all of them.

    Not wall time: on a busy host a short call slips through between two switches, and a long one never does, so that
    the layers of a model would seem a third of it, and INT8 fifteen times as fast as FP32.
    """
    least = [math.inf for _ in calls]
    for call in calls:
        for _ in range(WARM_UP):
            call()
    for round_ in range(ROUNDS):
        order = range(len(calls)) if round_ % 2 else range(len(calls) - 1, -1, -1)
        for i in order:
            for _ in range(runs):
                begin = time.process_time()
                calls[i]()
                least[i] = min(least[i], (time.process_time() - begin) * 1e3)
    return least


def layer_graph(shape: Shape, width: int) -> Any:
    """A layer of `width` heads or units with random weights, as an OpenVINO model."""
    import openvino as ov
    import openvino.opset13 as op

    rng = np.random.default_rng(0)

    def constant(*size: int) -> Any:
        return op.constant((rng.standard_normal(size) * 0.05).astype(np.float32))

    def linear(x: Any, inputs: int, outputs: int) -> Any:
        return op.add(op.matmul(x, constant(inputs, outputs), False, False), constant(outputs))

    kind, given = shape[0], shape[1]
    x = op.parameter(list(given), np.float32)
    parameters = [x]
    if kind == "linear":
        made = linear(op.gelu(linear(x, given[-1], width), "erf"), width, given[-1])
    elif kind == "convolution":
        (size, stride, pad), (size2, stride2, pad2), outputs = shape[2:]

        def convolve(x: Any, weight: Any, stride: int, pad: int) -> Any:
            return op.convolution(x, weight, [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])

        hidden = op.relu(convolve(x, constant(width, given[1], size, size), stride, pad))
        made = convolve(hidden, constant(outputs, width, size2, size2), stride2, pad2)
    else:
        keys, head_dim, cross = shape[2:]
        y = op.parameter(list(keys), np.float32) if cross else x
        parameters += [y] if cross else []

        def heads(x: Any, inputs: int) -> Any:
            parted = op.reshape(linear(x, inputs, width * head_dim), [1, -1, width, head_dim], False)
            return op.transpose(parted, [0, 2, 1, 3])

        scores = op.matmul(heads(x, given[-1]), heads(y, keys[-1]), False, True)
        context = op.matmul(op.softmax(scores, 3), heads(y, keys[-1]), False, False)
        joined = op.reshape(op.transpose(context, [0, 2, 1, 3]), [1, -1, width * head_dim], False)
        made = linear(joined, width * head_dim, given[-1])
    return ov.Model([made], parameters)
