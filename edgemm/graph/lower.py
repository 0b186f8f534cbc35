"""From a float32 graph and what a quantizer made of it to the graphs that TensorRT builds: FP16, and INT8 on FP16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from edgemm.graph import half, qdq
from edgemm.graph.calibrated import strip
from edgemm.graph.masks import spell_out_masks
from edgemm.graph.ranges import largest

KEPT = "edgemm.float32_nodes"  # metadata of a lowered graph

Samples = Sequence[Mapping[str, NDArray[Any]]]


def lower(
    model: onnx.ModelProto, quantized: onnx.ModelProto | None, samples: Samples, opset_max: int, where: str
) -> dict[str, onnx.ModelProto]:
    """{"fp16": graph} and, where a quantizer was at work, "int8".

    samples    inputs of the component as the FP32 model meets them on calibration data
    opset_max  newest opset of the target's parser
    """
    plain = spell_out_masks(half.prepare(model, opset_max, where))
    lowered = {"fp16": _halved(plain, largest(plain, samples))}
    if quantized is not None:
        calibrated = strip(quantized, model)
        prepared = spell_out_masks(half.prepare(calibrated.model, opset_max, where))
        found = largest(prepared, samples)
        placed, _ = qdq.place(prepared, calibrated.ranges, found, calibrated.weights)
        lowered["int8"] = _halved(placed, found)
    return lowered


def _halved(model: onnx.ModelProto, found: Mapping[str, float]) -> onnx.ModelProto:
    graph, kept = half.to_half(model, found)
    helper.set_model_props(graph, {KEPT: " ".join(kept)})
    return graph


def kept_in_float32(graph: onnx.ModelProto) -> list[str]:
    """Names of the nodes of a lowered graph that FP16 can't hold."""
    return next((p.value.split() for p in graph.metadata_props if p.key == KEPT), [])
