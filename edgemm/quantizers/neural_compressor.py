"""Static INT8 by neural-compressor's PT2E path: it observes the torch module, and the graph gets the scales it finds.

What PT2E converts could be exported again, with weights in float and under other names; instead the scales go to the
products of the graph that is there, each known by the layer that it was exported from. They are an independent
calibration of that same graph, which other quantizers' can be held against.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from pydantic import Field

from edgemm.errors import InputError, ToolchainError
from edgemm.graph import layer_of
from edgemm.graph.affine import Scales, place
from edgemm.graph.bypass import constant_products
from edgemm.graph.smoothing import Alpha, Samples, factors, smooth
from edgemm.quantizers._static import Static, alphas, by_layer, installed, kept

if TYPE_CHECKING:
    from edgemm.models import Component

NEEDS_MODULE = True  # quantize takes the torch module, too
ALGORITHMS = {"minmax": "minmax", "mse": "kl"}  # what it calls kl is a histogram searched for the least squared error
INT8 = "quantized_decomposed"


class Options(Static):
    """`smooth_quant`: alpha of SmoothQuant, folded into LayerNorms; auto: each layer's own; -1 for off.

    ranges   how activations' ranges are found; mse: least squared error; minmax is a moving average, which clips
    """

    smooth_quant: Alpha = Field("auto")
    ranges: Literal["minmax", "mse"] = "mse"


def require() -> None:
    """ToolchainError unless the library is installed."""
    installed("neural_compressor", "neural-compressor")
    installed("torchao", "neural-compressor")


def needs_samples(options: Options) -> bool:
    """Always: it has no other path than the static one."""
    return True


def quantize(
    model: onnx.ModelProto, samples: Samples, options: Options, component: Component | None = None
) -> onnx.ModelProto:
    """FP32 graph and calibration inputs by name -> the same graph with Q/DQ: uint8 activations, int8 weights a channel.

    component   with the torch module that `model` was exported from
    Raises InputError for a graph that came as ONNX, and for one that shares no layer with its module.
    """
    require()
    import torch

    if component is None or not isinstance(component.module, torch.nn.Module):
        raise InputError(
            "neural_compressor quantizes torch modules, and this model came as ONNX",
            fix="use: nncf or use: onnxruntime in the recipe's quantize",
        )
    floats = set(kept(model, options.keep_float))
    own = alphas(model, options.layers)
    divisors = factors(model, samples, options.smooth_quant, own)
    smoothed = smooth(model, samples, options.smooth_quant, own)

    def static(chosen: Options) -> onnx.ModelProto:
        found = _scales(model, component, samples, ALGORITHMS[chosen.ranges], divisors)
        return place(smoothed, {name: scales for name, scales in found.items() if name not in floats})

    return by_layer(model, options, static)


def _scales(
    model: onnx.ModelProto, component: Component, samples: Samples, algorithm: str, divisors: dict[str, Any]
) -> dict[str, Scales]:
    """Scales of each product of `model` that PT2E quantizes, its activations divided by `divisors`."""
    import torch

    try:
        from neural_compressor.torch.export import export
        from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare
    except ImportError as e:
        raise ToolchainError(
            f"neural-compressor can't be loaded: {e}", fix="pip install 'edgemm[neural-compressor]'"
        ) from e
    from edgemm.models._graph import dynamic_shapes

    for noisy in ("neural_compressor", "torch._dynamo"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    names = [port.name for port in component.inputs]
    example, shapes = component.example(2), dynamic_shapes(component)
    module = copy.deepcopy(component.module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own internals; an error still raises
            traced: Any = export(module, tuple(example[n] for n in names), tuple(shapes[n] for n in names))
    except RuntimeError as e:
        raise InputError(f"{component.name}: neural-compressor can't export it: {e}", fix="use: nncf") from e
    products = _products(traced, model)
    if not products:
        raise InputError(f"{component.name}: no product is a layer of its torch module", fix="use: nncf")
    _divide(traced, products, divisors)
    prepared = prepare(traced, StaticQuantConfig(act_algo=algorithm))
    with torch.no_grad():
        for sample in samples:
            prepared(*(torch.from_numpy(np.asarray(sample[n])) for n in names))
    converted: Any = convert(prepared)
    found = {}
    for node in converted.graph.nodes:
        if node.name in products and all(INT8 in str(getattr(a, "target", "")) for a in node.args[:2]):
            (scale, zero), weight = node.args[0].args[1:3], node.args[1].args[1]
            values = getattr(converted, weight.target).numpy()
            found[products[node.name]] = Scales(float(scale), int(zero), values.astype(np.float32))
    return found


def _products(traced: Any, model: onnx.ModelProto) -> dict[str, str]:
    """Name of each linear layer and convolution in a traced module -> name of the product in its ONNX graph.

    By the module that has the weights; where it is called more than once, by the order of the calls.
    """
    import torch

    kinds = {torch.ops.aten.linear.default, torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default}
    calls: Counter[str] = Counter()
    exported = {}
    for node in constant_products(model):
        exported[layer_of(node), calls[layer_of(node)]] = node.name
        calls[layer_of(node)] += 1
    calls.clear()
    found = {}
    for node in traced.graph.nodes:
        if node.target in kinds and node.args[1].op == "get_attr":
            layer = str(node.args[1].target).rpartition(".")[0]
            if (name := exported.get((layer, calls[layer]))) is not None:
                found[node.name] = name
            calls[layer] += 1
    return found


def _divide(traced: Any, products: dict[str, str], divisors: dict[str, Any]) -> None:
    """Divide what smoothed products read, and multiply their weights, in place."""
    import torch

    for node in list(traced.graph.nodes):
        divisor = divisors.get(products.get(node.name, ""))
        if divisor is None:
            continue
        weight = traced.get_parameter(node.args[1].target)
        parts = {"unit": torch.from_numpy(1 / divisor), "weight": weight.detach() * torch.from_numpy(divisor)}
        with traced.graph.inserting_before(node):
            for part, value in parts.items():
                traced.register_buffer(f"{node.name}_{part}", value)
                parts[part] = traced.graph.get_attr(f"{node.name}_{part}")
            divided = traced.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], parts["unit"]))
        for made, like in ((divided, node.args[0]), (parts["weight"], node.args[1]), (parts["unit"], node.args[1])):
            made.meta["val"] = like.meta.get("val")
        node.args = (divided, parts["weight"], *node.args[2:])
    traced.recompile()
