"""Static INT8 by NNCF on the ONNX graph: the arithmetic is theirs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import Field

from edgemm.errors import InputError, ToolchainError
from edgemm.recipe import Strict

BATCH = 16
Tensors = dict[str, NDArray[Any]]


class Options(Strict):
    """`smooth_quant`: SmoothQuant alpha for matmuls, -1 for off; `ranges`: how activations' ranges are found.

    preset       performance: all symmetric; mixed: zero points where activations, or weights alone, are one-sided
    weight_only  weights alone are INT8, per channel, and activations stay in float: for decoders, whose time
                 goes into reading weights, and whose activations collapse in INT8
    """

    preset: Literal["performance", "mixed"] = "performance"
    smooth_quant: float = Field(0.5, ge=-1, le=1)
    ranges: Literal["minmax", "histogram"] = "minmax"
    weight_only: bool = False
    keep_float: tuple[str, ...] = Field((), description="what stays in float: ONNX op types, or glob patterns of nodes")


def needs_samples(options: Options) -> bool:
    """Whether activations' ranges are to be found."""
    return not options.weight_only


def kept(model: onnx.ModelProto, patterns: Sequence[str]) -> list[str]:
    """Names of the nodes whose op type or name a pattern matches; InputError for one that matches none."""
    found: list[str] = []
    for pattern in patterns:
        nodes = [n.name for n in model.graph.node if n.op_type == pattern or fnmatchcase(n.name, pattern)]
        if not nodes:
            known = sorted({n.name for n in model.graph.node} | {n.op_type for n in model.graph.node})
            near = get_close_matches(pattern, known, n=3) or known[:3]
            raise InputError(f"quantize.keep_float: {pattern!r} matches no node", fix=f"near: {', '.join(near)}")
        found += nodes
    return found


def batched(model: onnx.ModelProto, samples: Sequence[Tensors]) -> list[Tensors]:
    """Samples of one shape joined, at most BATCH at a time, where the graph takes batches.

    NNCF spends milliseconds on each tensor of each inference, so that one by one 300 samples take minutes.
    """
    inputs = {i.name: i.type.tensor_type.shape.dim for i in model.graph.input}
    if not all(dims and dims[0].dim_param for dims in inputs.values()):
        return list(samples)
    alike: dict[Any, list[Tensors]] = defaultdict(list)
    for sample in samples:
        if any(len(v) != 1 for v in sample.values()):
            return list(samples)
        alike[tuple((name, v.shape) for name, v in sample.items())].append(sample)
    joined = []
    for rows in alike.values():
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            joined.append({name: np.concatenate([row[name] for row in part]) for name in part[0]})
    return joined


def quantize(model: onnx.ModelProto, samples: Sequence[Tensors], options: Options) -> onnx.ModelProto:
    """FP32 graph and calibration inputs by name -> the same graph with Q/DQ, per-channel weights."""
    os.environ["NNCF_CI"] = "1"  # no telemetry; read at import
    try:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    except ImportError as e:
        raise ToolchainError("NNCF is not installed", fix="pip install 'edgemm[compress]'") from e
    nncf.set_log_level(logging.ERROR)
    if options.weight_only:
        with contextlib.redirect_stdout(io.StringIO()):
            mode = "INT8_SYM" if options.preset == "performance" else "INT8_ASYM"
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode])
    advanced = AdvancedQuantizationParameters(
        smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=options.smooth_quant)
    )
    if options.ranges == "histogram":
        advanced.activations_range_estimator_params = RangeEstimatorParametersSet.HISTOGRAM
    batches = batched(model, samples)
    advanced.batchwise_statistics = len(batches) < len(samples)  # an input of a batch counts as one input
    ignored = [*kept(model, options.keep_float), *(n.name for n in model.graph.node if n.op_type == "Gather")]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars; our stdout carries the result alone
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset(options.preset),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=sorted({*ignored})) if ignored else None,
            advanced_parameters=advanced,
        )
