"""Engines on a CUDA device against their simulation; `make device`. Without one these skip and say why."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from edgemm.runtime import onnxruntime
from edgemm.target import RTX_SM, load_target
from tests.unit.test_tensorrt_build import PROFILE, WIDTH, graphs  # noqa: F401

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
PORTS = {kind: [{"name": name, "dtype": "float32"}] for kind, name in (("inputs", "x"), ("outputs", "y"))}


def compute_capability() -> int:
    """Of the first device, 86 for 8.6; 0 where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    parts = [ctypes.c_int(), ctypes.c_int()]
    failed = cuda.cuInit(0)
    for attribute, part in zip((MAJOR, MINOR), parts, strict=True):
        failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, 0)
    return 0 if failed else 10 * parts[0].value + parts[1].value


@pytest.mark.skipif(compute_capability() not in RTX_SM, reason="no CUDA device that TensorRT-RTX builds for")
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_an_engine_computes_what_the_simulation_said(graphs: Path, precision: str, tmp_path: Path) -> None:  # noqa: F811
    from edgemm.backends import tensorrt_rtx
    from edgemm.runtime import tensorrt_rtx as runtime

    graph = graphs / f"block.{precision}.onnx"
    target = load_target("rtx", {"sm": [compute_capability()]})
    tensorrt_rtx.compile_component(graph, tmp_path, PROFILE, target, {})
    component = {"name": "block", **PORTS}
    files = {"block.onnx": graph.read_bytes(), **{p.name: p.read_bytes() for p in tmp_path.glob("*.engine")}}
    simulated = onnxruntime.compile_component(files, component, {"threads": 2, "qdq": "as written"})
    engine = runtime.compile_component(files, component, {})
    for batch, tokens in ((1, 16), (8, 3)):
        x = np.random.default_rng(batch).standard_normal((batch, tokens, WIDTH)).astype(np.float32)
        expected, got = simulated({"x": x})["y"], engine({"x": x})["y"]
        noise = float(((got - expected) ** 2).sum())
        assert 10 * np.log10(float((expected**2).sum()) / noise) > 35
