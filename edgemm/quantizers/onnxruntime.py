"""INT8 by ONNX Runtime's own quantizer, static or dynamic: the arithmetic is theirs.

Only products with constant weights: around an attention mask, a sum or softmax in INT8 destroys the model.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
from numpy.typing import NDArray
from pydantic import Field

from edgemm.graph.bypass import PRODUCTS, constant_products
from edgemm.graph.smoothing import Alpha, Samples, smooth
from edgemm.quantizers._static import Static, alphas, by_layer, installed, kept

# A convolution is an integer kernel in ONNX Runtime only where its output is quantized, too, with the Relu behind it.
PLACED = (*PRODUCTS, "Relu")


class Options(Static):
    """`smooth_quant`: alpha of SmoothQuant, folded into LayerNorms; auto: each layer's own; -1 for off.

    ranges   how activations' ranges are found; percentile: all but 0.001 % of the values; entropy: least KL divergence
    dynamic  activations' ranges are found anew in each call, of the whole tensor; slower outside ONNX Runtime
    """

    smooth_quant: Alpha = Field("auto")
    ranges: Literal["minmax", "percentile", "entropy"] = "minmax"
    dynamic: bool = False


def require() -> None:
    """ToolchainError unless the library is installed."""
    installed("onnxruntime", "compress")


def needs_samples(options: Options) -> bool:
    """Whether ranges are to be found."""
    return not options.dynamic or options.smooth_quant != -1


def quantize(model: onnx.ModelProto, samples: Samples, options: Options) -> onnx.ModelProto:
    """FP32 graph and calibration inputs by name -> the same graph with Q/DQ: uint8 activations, int8 weights a channel.

    Dynamic: with DynamicQuantizeLinear and MatMulInteger in the place of products.
    """
    require()
    floats = _floats(model, options.keep_float)
    model = smooth(model, samples, options.smooth_quant, alphas(model, options.layers))
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as directory:  # its progress
        if options.dynamic:
            return _dynamic(model, Path(directory), floats)
        return by_layer(model, options, lambda o: _static(model, samples, o.ranges, Path(directory), floats))


def _static(
    model: onnx.ModelProto, samples: Samples, ranges: str, directory: Path, floats: list[str]
) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    method = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}[ranges]
    source = directory / "float.onnx"
    onnx.save(model, source)
    augmented = str(directory / "augmented.onnx")
    calibrator = create_calibrator(source, PLACED, augmented, CalibrationMethod[method])
    for sample in samples:  # one at a time: what differs in length does not stack
        calibrator.collect_data(_Reader(sample))
    quantizer = QDQQuantizer(
        onnx.load(source),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=calibrator.compute_data(),
        nodes_to_quantize=[],
        nodes_to_exclude=floats,
        op_types_to_quantize=PLACED,
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )
    made: onnx.ModelProto = quantizer.quantize_model()
    _restore(model, made)
    quantizer.model.topological_sort()
    return made


def _restore(model: onnx.ModelProto, made: onnx.ModelProto) -> None:
    """Put back, in place, each Relu that Q's clipping at zero made redundant: for targets that place Q/DQ anew.

    ONNX Runtime takes it out again where it loads the graph.
    """
    makers = {name: node for node in made.graph.node for name in node.output}
    for node in model.graph.node:
        maker = makers.get(node.output[0]) if node.op_type == "Relu" else None
        if maker is not None and maker.op_type != "Relu":
            maker.output[[*maker.output].index(node.output[0])] = node.input[0]
            made.graph.node.append(node)


def _dynamic(model: onnx.ModelProto, directory: Path, floats: list[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    add_pre_process_metadata(model)  # else it advises to
    quantize_dynamic(
        model,
        directory / "quantized.onnx",
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=floats,
    )
    return onnx.load(directory / "quantized.onnx")


def _floats(model: onnx.ModelProto, patterns: tuple[str, ...]) -> list[str]:
    """Names of the nodes that stay in float: those asked for, and products of two activations."""
    constant = {n.name for n in constant_products(model)}
    two = {n.name for n in model.graph.node if n.op_type in PRODUCTS} - constant
    return sorted({*kept(model, patterns), *two})


class _Reader:
    """A calibration data reader of ONNX Runtime, of one sample."""

    def __init__(self, sample: Mapping[str, NDArray[Any]]) -> None:
        self.left = [dict(sample)]

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return self.left.pop() if self.left else None
