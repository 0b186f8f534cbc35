"""ONNX files from anywhere: read and checked, and how they join by the names of their inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from edgemm.errors import InputError
from edgemm.models import Dtype

OLDEST, TARGET = 11, 18  # opsets; per-channel Q/DQ needs 13, one LayerNormalization op 17
DTYPES: dict[int, Dtype] = {
    TensorProto.FLOAT: "float32",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.BOOL: "bool",
}
Ports = list[dict[str, Any]]


def read_graphs(files: list[Path]) -> dict[str, onnx.ModelProto]:
    """Component name -> graph; InputError where two files would be one component."""
    found: dict[str, Path] = {}
    for file in files:
        if (other := found.setdefault(identifier(file.stem), file)) != file:
            raise InputError(f"{other} and {file} have the same name: {identifier(file.stem)}", fix="rename one")
    return {name: read_graph(file) for name, file in found.items()}


def read_graph(path: Path) -> onnx.ModelProto:
    """An ONNX file with its external data, checked, at opset 18 or newer.

    Raises InputError for a file that is none, inputs or outputs of unknown rank, custom ops, an opset that is too old
    or unknown, and weights that are 16 bits wide or NaN.
    """
    try:
        model = onnx.load(path)
        for port in (*model.graph.input, *model.graph.output):
            if port.type.HasField("tensor_type") and not port.type.tensor_type.HasField("shape"):
                raise InputError(f"{path}: {port.name} has no known rank", fix="export with its number of axes")
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as e:
        raise InputError(f"{path}: no valid ONNX: {str(e).strip()[:500]}", fix="export it again") from e
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    custom = sorted({f"{n.domain}.{n.op_type}" for n in _nodes(model.graph) if n.domain not in ("", "ai.onnx")})
    if custom:
        raise InputError(
            f"{path}: custom ops {', '.join(custom[:10])}",
            fix="export with standard ONNX ops alone, without fusions of one runtime",
        )
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise InputError(f"{path}: opset {opset}", fix=f"export with opset {OLDEST} to {newest}")
    if opset < TARGET:
        try:
            model = onnx.version_converter.convert_version(model, TARGET)
        except (RuntimeError, onnx.checker.ValidationError, onnx.version_converter.ConvertError) as e:
            raise InputError(f"{path}: opset {opset} can't be converted to {TARGET}: {e}", fix="export it again") from e
    tensors = _tensors(model.graph)
    if half := [t.name for t in tensors if t.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)]:
        raise InputError(f"{path}: {half[0]} is 16 bits wide ({len(half)} tensors)", fix="export the FP32 model")
    for tensor in tensors:  # infinity may stand in a mask
        if tensor.data_type == TensorProto.FLOAT and np.isnan(onnx.numpy_helper.to_array(tensor)).any():
            raise InputError(f"{path}: {tensor.name} holds NaN", fix="train or convert the model again")
    return model


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes, those of inner graphs (If, Loop) among them."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found += _nodes(inner)
    return found


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Weights and constants, those of inner graphs among them."""
    nodes = _nodes(graph)
    inner = [g for n in nodes for a in n.attribute for g in (a.g, *a.graphs)]
    constants = [a.t for n in nodes for a in n.attribute if a.HasField("t")]
    return [*(t for g in (graph, *inner) for t in g.initializer), *constants]


def ports_of(values: Any, graph: onnx.GraphProto, component: str) -> Ports:
    """Inputs or outputs as program.json has them; axis 0, where it is dynamic, is the batch."""
    weights = {i.name for i in graph.initializer}
    ports = []
    for value in values:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        if kind.elem_type not in DTYPES:
            raise InputError(
                f"{component}: {value.name} is {TensorProto.DataType.Name(kind.elem_type)}",
                fix=f"export with {', '.join(DTYPES.values())}",
            )
        if not kind.shape.dim:
            raise InputError(f"{component}: {value.name} is a scalar", fix="export with axis 0 for the batch")
        shape: list[int | str] = []
        for axis, dim in enumerate(kind.shape.dim):
            fixed = dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
            free = "batch" if axis == 0 else identifier(dim.dim_param or f"{value.name}_{axis}")
            shape.append(fixed or free)
        ports.append({"name": value.name, "dtype": DTYPES[kind.elem_type], "shape": shape})
    return ports


def check_joints(ports: dict[str, tuple[Ports, Ports]]) -> None:
    """InputError where graphs don't agree on a tensor that they share by its name."""
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, (inputs, outputs) in ports.items():
        for port in (*inputs, *outputs):
            other, first = seen.setdefault(port["name"], (name, port))
            sizes = zip(first["shape"], port["shape"], strict=False)
            same = first["dtype"] == port["dtype"] and len(first["shape"]) == len(port["shape"])
            if not same or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes):
                raise InputError(
                    f"{port['name']} is {first['dtype']}{first['shape']} in {other} "
                    f"and {port['dtype']}{port['shape']} in {name}",
                    fix="give one name to what is one tensor, and other names to others",
                )
    makers = [(p["name"], name) for name, (_, outputs) in ports.items() for p in outputs]
    for tensor, maker in makers:
        if (other := dict(makers)[tensor]) != maker:
            raise InputError(f"{maker} and {other} both give {tensor}", fix="rename the output of one")


def in_order(ports: dict[str, tuple[Ports, Ports]]) -> list[str]:
    """Components so that each comes after those that make its inputs."""
    maker = {p["name"]: name for name, (_, outputs) in ports.items() for p in outputs}
    ordered: list[str] = []
    while len(ordered) < len(ports):
        ready = [
            name
            for name, (inputs, _) in ports.items()
            if name not in ordered and all(maker.get(p["name"], name) in (name, *ordered) for p in inputs)
        ]
        if not ready:
            raise InputError(
                f"{', '.join(sorted(ports.keys() - set(ordered)))}: need each other's outputs",
                fix="make them one graph",
            )
        ordered.append(ready[0])
    return ordered


def identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:80]
