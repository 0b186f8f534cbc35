"""Static INT8 by NNCF on the ONNX graph: the arithmetic is theirs."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import Field, model_validator

from edgemm.errors import ToolchainError
from edgemm.graph.smoothing import Alpha, Samples, smooth
from edgemm.quantizers._static import Static, alphas, by_layer, installed, kept

BATCH = 16
Tensors = Mapping[str, NDArray[Any]]


class Options(Static):
    """`smooth_quant`: auto: each LayerNorm's own alpha, folded into it by edgemm; a number: NNCF's for all; -1 for off.

    Where layers have alphas of their own, all of them are folded into LayerNorms, and NNCF's SmoothQuant is off.
    ranges       how activations' ranges are found; percentile: 0.01 to 99.99 % of the values; mse: least squared error
    preset       performance: all symmetric; mixed: zero points where activations, or weights alone, are one-sided
    weight_only  weights alone are INT8, per channel, and activations stay in float: for decoders, whose time
                 goes into reading weights, and whose activations collapse in INT8
    bits         of the weights of products that are `weight_only`; 4 keeps the table of a vocabulary at 8
    bias_correction  biases make up for the mean error of each layer, by NNCF's fast algorithm
    """

    preset: Literal["performance", "mixed"] = "performance"
    smooth_quant: Alpha = Field("auto")
    ranges: Literal["minmax", "percentile", "mse"] = "minmax"
    weight_only: bool = False
    bits: Literal[8, 4] = 8
    bias_correction: bool = True

    @model_validator(mode="after")
    def _possible(self) -> Options:
        if self.bits == 4 and not self.weight_only:
            raise ValueError("bits = 4 is for weight_only: true; products of INT8 activations have INT8 weights")
        if self.bits == 4 and self.preset == "mixed":
            raise ValueError("bits = 4 with preset = mixed: NNCF writes zero points that no runtime reads; performance")
        return self


def require() -> None:
    """ToolchainError unless the library is installed."""
    installed("nncf", "compress")


def needs_samples(options: Options) -> bool:
    """Whether activations' ranges are to be found."""
    return not options.weight_only


def batches(model: onnx.ModelProto, samples: Samples) -> list[list[Tensors]]:
    """Samples of one shape, at most BATCH at a time where the graph takes batches, else one at a time.

    NNCF spends milliseconds on each tensor of each inference, so that one by one 300 samples take minutes.
    """
    inputs = {i.name: i.type.tensor_type.shape.dim for i in model.graph.input}
    batched = all(dims and dims[0].dim_param for dims in inputs.values())
    if not batched or any(len(v) != 1 for sample in samples for v in sample.values()):
        return [[sample] for sample in samples]
    alike: dict[Any, list[Tensors]] = defaultdict(list)
    for sample in samples:
        alike[tuple((name, v.shape) for name, v in sample.items())].append(sample)
    return [rows[start : start + BATCH] for rows in alike.values() for start in range(0, len(rows), BATCH)]


def joined(rows: Sequence[Tensors]) -> Tensors:
    """Samples of one shape as one."""
    return rows[0] if len(rows) == 1 else {n: np.concatenate([row[n] for row in rows]) for n in rows[0]}


def sharing(model: onnx.ModelProto, names: Sequence[str]) -> set[str]:
    """The named nodes and those that read the same constants: NNCF rounds a tensor for all that read it.

    A table that rows are looked up in is often the vocabulary's, too.
    """
    constants = {i.name for i in model.graph.initializer}
    read = {i for n in model.graph.node if n.name in set(names) for i in n.input if i in constants}
    return {*names, *(n.name for n in model.graph.node if n.name and read & {*n.input})}


def quantize(model: onnx.ModelProto, samples: Samples, options: Options) -> onnx.ModelProto:
    """FP32 graph and calibration inputs by name -> the same graph with Q/DQ, per-channel weights."""
    require()
    os.environ["NNCF_CI"] = "1"  # no telemetry; read at import
    try:
        import nncf
    except ImportError as e:
        raise ToolchainError(f"NNCF can't be loaded: {e}", fix="pip install 'edgemm[compress]'") from e
    nncf.set_log_level(logging.ERROR)
    floats = kept(model, options.keep_float)
    if options.weight_only:
        mode = f"INT{options.bits}_{'SYM' if options.preset == 'performance' else 'ASYM'}"
        scope = nncf.IgnoredScope(names=sorted(sharing(model, floats))) if floats else None
        groups = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        with contextlib.redirect_stdout(io.StringIO()):
            made = nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode[mode],
                ignored_scope=scope,
                advanced_parameters=groups if options.bits == 4 else None,  # 128 weights share a scale, or fewer
            )
        if options.bits == 4:  # by an operator whose domain NNCF does not import
            made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        return made
    ignored = {*floats, *(n.name for n in model.graph.node if n.op_type == "Gather")}
    scope = nncf.IgnoredScope(names=sorted(ignored)) if ignored else None
    own = alphas(model, options.layers)
    if options.smooth_quant == "auto" or own:
        model = smooth(model, samples, options.smooth_quant, own)
        options = options.model_copy(update={"smooth_quant": -1.0})
    return by_layer(model, options, lambda o: _static(model, samples, o, scope))


def without_weights(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph, its weights in a file in `folder`.

    NNCF copies and serializes the graph once for each bias that it corrects, with all weights that are inside.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    onnx.save_model(graph, folder / "model.onnx", save_as_external_data=True, location="weights")
    return onnx.load(folder / "model.onnx", load_external_data=False)


def _static(model: onnx.ModelProto, samples: Samples, options: Options, ignored: Any) -> onnx.ModelProto:
    import nncf
    from nncf.onnx.quantization.backend_parameters import BackendParameters
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Estimators

    advanced = AdvancedQuantizationParameters(
        smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=options.smooth_quant),
        disable_bias_correction=not options.bias_correction,
    )
    estimators = {"percentile": Estimators.MEAN_QUANTILE, "mse": Estimators.HISTOGRAM}
    parts = batches(model, samples)
    advanced.batchwise_statistics = len(parts) < len(samples)  # an input of a batch counts as one input
    if options.ranges in estimators:
        advanced.activations_range_estimator_params = estimators[options.ranges]
    # its progress bars; our stdout carries the result alone
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        advanced.backend_params = {BackendParameters.EXTERNAL_DATA_DIR: folder}
        return nncf.quantize(
            without_weights(model, Path(folder)),
            nncf.Dataset(parts, joined),
            preset=nncf.QuantizationPreset(options.preset),
            subset_size=len(parts),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=ignored,
            advanced_parameters=advanced,
        )
