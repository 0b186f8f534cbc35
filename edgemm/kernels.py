"""Where a compiled component's time goes, kernel by kernel, by OpenVINO's own counters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgemm.errors import ToolchainError
from edgemm.graph.bypass import product_names
from edgemm.runtime.query import Tensors

RUNS = 10


@dataclass(frozen=True, slots=True)
class Kernel:
    """ms: least time of a run, all samples together;  products: of the graph, that it computes;  int8: in INT8."""

    ms: float
    products: frozenset[str]
    int8: bool


def kernels(
    files: Mapping[str, bytes],
    component: dict[str, Any],
    settings: dict[str, Any],
    samples: Sequence[Tensors],
    graph: onnx.ModelProto,
) -> list[Kernel]:
    """The kernels that an OpenVINO component runs on `samples`.

    files, component, settings  as the runtime takes them;  graph  that it was compiled from, for the products' names
    """
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    core, known = ov.Core(), product_names(graph)
    weights = ov.Tensor(np.frombuffer(files[f"{component['name']}.bin"], np.uint8))
    options = {
        "INFERENCE_PRECISION_HINT": component.get("precision") or settings["precision"],
        "INFERENCE_NUM_THREADS": settings["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": True,
    }
    compiled = core.compile_model(core.read_model(files[f"{component['name']}.xml"], weights), "CPU", options)
    request = compiled.create_infer_request()
    states = request.query_state()
    taken = {name for port in compiled.inputs for name in port.names}
    least: dict[tuple[str, int], float] = {}
    for i, sample in enumerate(samples):
        for _ in range(RUNS):
            for state in states:  # named by the input and the output that it joins
                joined = max((n for n in sample if state.name.startswith(n)), key=len)  # key_10, not key_1
                state.state = ov.Tensor(np.ascontiguousarray(sample[joined]))
            request.infer({name: value for name, value in sample.items() if name in taken})
            for row in request.profiling_info:
                ms = row.real_time.total_seconds() * 1e3
                least[row.node_name, i] = min(least.get((row.node_name, i), math.inf), ms)
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        name = node.get_friendly_name()
        info = node.get_rt_info()
        origins = info["originalLayersNames"].astype(str).split(",") if "originalLayersNames" in info else []
        made = {known[o] for o in (origin.partition("/Dequantization")[0] for origin in origins) if o in known}
        ms = sum(least.get((name, i), 0.0) for i in range(len(samples)))
        precision = info["runtimePrecision"].astype(str) if "runtimePrecision" in info else ""
        found.append(Kernel(ms, frozenset(made), precision in ("i8", "u8")))
    return found


def of_products(found: Sequence[Kernel]) -> dict[str, float]:
    """ms of each product; a kernel's time is shared by those that it computes."""
    times: dict[str, float] = {}
    for kernel in found:
        for product in kernel.products:
            times[product] = times.get(product, 0.0) + kernel.ms / len(kernel.products)
    return times
