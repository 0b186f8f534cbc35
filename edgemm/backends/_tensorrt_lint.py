"""What TensorRT's ONNX parser will refuse in a graph, said before any build, by node name, with what to do about it.

Every rule is one that the real parser was seen to enforce, but uint8 activations, which it silently takes for int8;
tests/unit/test_tensorrt_lint.py holds each against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemm.errors import InputError

INTEGER_OPS = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")
STATIC_QDQ = "quantize with Q/DQ nodes, symmetric INT8: use nncf with preset performance in the recipe"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the parser or builder refuses. `node` is the node's name, or the input's."""

    node: str
    what: str
    fix: str


def check(model: Any, profile: Mapping[str, Mapping[str, Sequence[int]]], opset_max: int, where: str) -> None:
    """InputError naming the first finding of a graph, and how many more there are."""
    if findings := list(lint(model, profile, opset_max)):
        first = findings[0]
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise InputError(f"{where}: TensorRT refuses {first.node}: {first.what}{more}", fix=first.fix)


def lint(model: Any, profile: Mapping[str, Mapping[str, Sequence[int]]], opset_max: int) -> Iterator[Finding]:
    """What of an ONNX ModelProto is refused, given the shapes of its inputs (min, opt, max by name)."""
    from edgemm.graph import View

    view = View(model)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > opset_max:
            what = f"opset {entry.version}, and the parser reads {opset_max} at most"
            yield Finding("the graph", what, f"--set export.opset={opset_max}, or export the graph again")
    for node in model.graph.node:
        if node.op_type in INTEGER_OPS or node.op_type.startswith("QLinear"):
            yield Finding(node.name, f"{node.op_type} is not supported", STATIC_QDQ)
        elif node.domain not in ("", "ai.onnx"):
            fix = "export the graph with ONNX's own operators, without ONNX Runtime's optimizer"
            yield Finding(node.name, f"{node.op_type} is an operator of {node.domain}", fix)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _quantization(node, view)
    for value in model.graph.input:
        if value.name not in view.constants:
            yield from _shapes(value, profile.get(value.name))


def _quantization(node: Any, view: Any) -> Iterator[Finding]:
    import numpy as np

    scale = view.value(node.input[1])
    zero = view.value(node.input[2]) if len(node.input) > 2 else None
    stored = view.value(node.input[0]) if node.op_type == "DequantizeLinear" else None
    kind = next((str(v.dtype) for v in (zero, stored) if v is not None), None)
    if scale is None:
        yield Finding(node.name, "its scale is computed", STATIC_QDQ)
    elif not (np.asarray(scale, np.float32) > 0).all():
        yield Finding(node.name, "a scale is zero", "leave that node in float: its input never was anything but zero")
    if kind == "int32":
        fix = "leave biases in float; in ONNX Runtime's quantizer: extra_options QuantizeBias=False"
        yield Finding(node.name, "a bias in int32 goes into DequantizeLinear", fix)
    elif stored is not None and kind == "uint8":
        yield Finding(node.name, "weights in uint8, and only signed int8 is supported", STATIC_QDQ)
    elif kind == "uint8" or (kind is None and node.op_type == "QuantizeLinear"):
        what = "uint8, which the parser takes for int8: what is over half of the range would be clipped"
        yield Finding(node.name, what, STATIC_QDQ)
    if zero is not None and kind != "int32" and np.asarray(zero).astype(np.int64).any():
        yield Finding(node.name, "a zero point is not zero", STATIC_QDQ)


def _shapes(value: Any, sizes: Mapping[str, Sequence[int]] | None) -> Iterator[Finding]:
    """A dynamic input needs a profile, and a profile must keep to the sizes that are fixed in the graph."""
    dims = [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
    if sizes is None:
        if None in dims:
            fix = "add its dynamic axes to `shapes` in the target"
            yield Finding(value.name, "a dynamic input without an optimization profile", fix)
        return
    for shape in (sizes["min"], sizes["opt"], sizes["max"]):
        if len(shape) != len(dims) or any(d is not None and d != s for d, s in zip(dims, shape, strict=True)):
            shown = [d or "?" for d in dims]
            what = f"its shape is {shown}, and the profile has {list(shape)}"
            yield Finding(value.name, what, "export it with that axis dynamic, or set the axis in `shapes` to its size")
            return
