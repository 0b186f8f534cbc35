"""Graphs from anywhere: .onnx files, and Python factories, which become one.

A directory that bring_in made holds each component's .onnx and a config.json with what is known of them:
components (names, inputs, outputs, sizes) and program (pre- and post-processing).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto
from torch import nn

from edgemm.artifact import build, canonical, sha256_file, sha256_text
from edgemm.console import log
from edgemm.errors import InputError
from edgemm.models import AttentionBlock, Component, Tensor
from edgemm.models._graph import check, onnx_export
from edgemm.models._processors import image_spec, text_spec

OLDEST, TARGET = 11, 18  # opsets; per-channel Q/DQ needs 13, one LayerNormalization op 17
DTYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.BOOL: "bool",
}
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
)
LENGTHS = {"image": 224, "audio": 80_000, "tokens": 128, "mask": 128, "tensor": 128}  # of axes that may have any size
AXES = {"image": ("batch", 3, "height", "width"), "audio": ("batch", "samples"), "tokens": ("batch", "tokens")}
RATE = 16_000
Dtype = Literal["float32", "int64", "int32", "bool"]
TORCH_DTYPES: dict[str, Dtype] = {
    "torch.float32": "float32",
    "torch.int64": "int64",
    "torch.int32": "int32",
    "torch.bool": "bool",
}
TOLERANCE = 1e-4


def bring_in(model: str, kinds: Mapping[str, str], runs: Path | None) -> Path:
    """The directory of an ONNX file, of a directory of them, or of package.module:factory.

    kinds   image, audio, tokens, mask or tensor of inputs by name, where names and shapes don't tell
    runs    where the directory is kept
    """
    assert runs is not None
    path = Path(model)
    if path.exists():
        files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
        beside = path if path.is_dir() else path.parent
        graphs = read_graphs(files)
        parts = {name: hashlib.sha256(graph.SerializeToString()).hexdigest() for name, graph in graphs.items()}
        parts |= {n: sha256_file(beside / n) for n in SIDE_FILES if (beside / n).is_file()}
        config: dict[str, Any] = {"files": parts, "kinds": dict(kinds)}

        def make(out: Path) -> None:
            for name, graph in graphs.items():
                onnx.save(graph, out / f"{name}.onnx")
            _describe(out, beside, kinds)
    else:
        module, inputs = call_factory(model)
        config = {"factory": model, "module": _digest(module, inputs), "kinds": dict(kinds)}

        def make(out: Path) -> None:
            component = _component_of(module, inputs, model)
            onnx_export(component, out / "model.onnx", TARGET)
            check(component, out / "model.onnx", TOLERANCE)
            _describe(out, out, kinds)

    return build("imported", runs, config=config, tools=("onnx", "torch"), make=make).path


def read_graphs(files: list[Path]) -> dict[str, onnx.ModelProto]:
    """Component name -> graph; InputError where two files would be one component."""
    found: dict[str, Path] = {}
    for file in files:
        if (other := found.setdefault(_identifier(file.stem), file)) != file:
            raise InputError(f"{other} and {file} have the same name: {_identifier(file.stem)}", fix="rename one")
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


def _describe(out: Path, beside: Path, kinds: Mapping[str, str]) -> None:
    """Write config.json for the graphs in `out`; tokenizer and processors are looked for in `beside`."""
    for name in SIDE_FILES:
        if (beside / name).is_file() and beside != out:
            shutil.copyfile(beside / name, out / name)
    graphs = {p.stem: onnx.load(p).graph for p in sorted(out.glob("*.onnx"))}
    ports = {name: (_ports(g.input, g, name), _ports(g.output, g, name)) for name, g in graphs.items()}
    _check_joints(ports)
    ordered = _in_order(ports)
    made = {p["name"] for _, outputs in ports.values() for p in outputs}
    sources = {p["name"]: p for name in ordered for p in ports[name][0] if p["name"] not in made}
    if unknown := sorted(kinds.keys() - sources.keys()):
        raise InputError(f"inputs.{unknown[0]}: no such input", fix=f"inputs: {', '.join(sources)}")
    for name, kind in kinds.items():
        shape = sources[name]["shape"]
        if len(shape) != len(AXES.get(kind, shape)) or (kind == "image" and shape[1] != 3):
            raise InputError(f"inputs.{name}: {shape} is no {kind}", fix=f"a {kind} is {AXES[kind]}; or say tensor")
    kind_of = {name: kinds.get(name) or guess_kind(port) for name, port in sources.items()}
    components = []
    for name in ordered:
        inputs, outputs = ports[name]
        sizes = {"batch": 64}
        for port in inputs:
            length = LENGTHS[kind_of.get(port["name"], "tensor")]
            sizes |= {n: sizes.get(n, length) for n in port["shape"] if isinstance(n, str)}
        sizes |= {n: sizes.get(n, 1) for p in outputs for n in p["shape"] if isinstance(n, str)}
        components.append({"name": name, "inputs": inputs, "outputs": outputs, "max_sizes": sizes})
    values = {
        "model_type": "onnx",
        "components": components,
        "program": _program(out, kind_of, sources, components, graphs),
        "parameters": sum(int(torch.Size(i.dims).numel()) for g in graphs.values() for i in g.initializer),
    }
    (out / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _ports(values: Any, graph: onnx.GraphProto, component: str) -> list[dict[str, Any]]:
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
            free = "batch" if axis == 0 else _identifier(dim.dim_param or f"{value.name}_{axis}")
            shape.append(fixed or free)
        ports.append({"name": value.name, "dtype": DTYPES[kind.elem_type], "shape": shape})
    return ports


def _check_joints(ports: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> None:
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


def _in_order(ports: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> list[str]:
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


def guess_kind(port: dict[str, Any]) -> str:
    """image, audio, tokens, mask or tensor, from name, dtype and shape."""
    name, shape = port["name"].lower(), port["shape"]
    if "mask" in name:
        return "mask"
    if port["dtype"] != "float32":
        return "tokens" if len(shape) == 2 and not any(w in name for w in ("position", "type")) else "tensor"
    if len(shape) == 4 and shape[1] == 3:
        return "image"
    if any(w in name for w in ("audio", "wave", "speech", "input_values")) and len(shape) == 2:
        return "audio"
    return "tensor"


def _program(
    directory: Path,
    kinds: dict[str, str],
    sources: dict[str, dict[str, Any]],
    components: list[dict[str, Any]],
    graphs: dict[str, onnx.GraphProto],
) -> dict[str, Any]:
    """Pre-processing where it is known; every other input comes ready made."""
    program: dict[str, Any] = {}
    taken: set[str] = set()
    of_kind = {kind: [n for n, k in kinds.items() if k == kind] for kind in ("image", "audio", "tokens", "mask")}
    if len(of_kind["image"]) == 1:
        (name,) = of_kind["image"]
        program["image"] = _image(directory, name, sources[name]["shape"])
        taken.add(name)
    if len(of_kind["tokens"]) == 1 and (directory / "tokenizer.json").is_file():
        (name,) = of_kind["tokens"]
        mask = next((n for n in of_kind["mask"] if len(sources[n]["shape"]) == 2), None)
        types = next((n for n in sources if "token_type" in n), None)
        length = sources[name]["shape"][1]
        most = length if isinstance(length, int) else LENGTHS["tokens"]
        program["text"] = text_spec(directory, ids=name, mask=mask, types=types, max_tokens=most)
        program["text"]["pad_to"] = most if isinstance(length, int) else 0
        taken |= {n for n in (name, mask, types) if n}
    if len(of_kind["audio"]) == 1:
        (name,) = of_kind["audio"]
        length = sources[name]["shape"][1]
        seconds = (length if isinstance(length, int) else LENGTHS["audio"]) / RATE
        pad = "silence" if isinstance(length, int) else "none"
        program["audio"] = {"tensor": name, "sampling_rate": RATE, "seconds": seconds, "pad": pad}
        taken.add(name)
    program["tensors"] = [
        {"tensor": n, "kind": k, "high": _rows(n, graphs) if k == "tokens" else None}
        for n, k in kinds.items()
        if n not in taken
    ]
    used = {p["name"] for c in components for p in c["inputs"]}
    last = [p for c in components for p in c["outputs"] if p["name"] not in used and p["dtype"] == "float32"]
    if not last:
        raise InputError("no graph gives a float32 output that is the model's", fix="export one")
    program["output"] = {"kind": "features", "tensors": [p["name"] for p in last]}
    return program


def _image(directory: Path, name: str, shape: list[int | str]) -> dict[str, Any]:
    if any((directory / n).is_file() for n in ("preprocessor_config.json", "processor_config.json")):
        return image_spec(directory, name)
    height, width = (n if isinstance(n, int) else LENGTHS["image"] for n in shape[2:])
    log(f"no preprocessor_config.json: images for {name} are resized to {height}x{width} and scaled to 0..1")
    plain = {"resample": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3}
    return {"tensor": name, "size": [height, width], **plain}


def _rows(name: str, graphs: dict[str, onnx.GraphProto]) -> int | None:
    """Rows of the table that ids look up: what they must stay under."""
    for graph in graphs.values():
        sizes = {i.name: i.dims[0] for i in graph.initializer if i.dims}
        for node in graph.node:
            if node.op_type == "Gather" and node.input[1] == name and node.input[0] in sizes:
                return int(sizes[node.input[0]])
    return None


def call_factory(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Import package.module and call factory() -> (module in FP32 and eval mode, example inputs by name).

    The current directory is looked in first, as `python -m` does. This runs the user's own code.
    """
    where, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with users_code(f"importing {where}"):
            factory = getattr(importlib.import_module(where), attribute, None)
    finally:
        sys.path.pop(0)
    if not callable(factory):
        raise InputError(f"{where} has no function {attribute!r}", fix="give package.module:function")
    with users_code(f"{name}()"):
        made = factory()
    match made:
        case (nn.Module() as module, dict() as inputs) if inputs:
            pass
        case _:
            raise InputError(
                f"{name} gave {type(made).__name__}", fix="return (torch module, {input name: example tensor})"
            )
    for key, value in inputs.items():
        kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        if kind not in TORCH_DTYPES:
            raise InputError(f"{name}: input {key!r} is {kind}", fix=f"give tensors of {', '.join(TORCH_DTYPES)}")
        if not value.shape:
            raise InputError(f"{name}: input {key!r} is a scalar", fix="give it axis 0 for the batch")
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{name}: {key} holds NaN or infinity", fix="train or convert the model again")
    return module.float().eval(), inputs


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Whatever the user's own code raises becomes an InputError that says where."""
    try:
        yield
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        raise InputError(
            f"{what} raised {type(e).__name__}: {e} ({at.filename}:{at.lineno})",
            fix="give package.module:function, importable from here, that returns a module and inputs that it takes",
        ) from e


def _component_of(module: nn.Module, inputs: dict[str, torch.Tensor], name: str) -> Component:
    """One graph; axis 0 of every input is the batch, all other sizes are those of the examples."""
    with torch.inference_mode(), users_code(f"{name}: the module, called with its example inputs,"):
        made = module(**inputs)
    parts = made if isinstance(made, tuple) else (made,)
    batch = next(iter(inputs.values())).shape[0]
    for part in parts:
        kind = str(part.dtype) if isinstance(part, torch.Tensor) else type(part).__name__
        if kind not in TORCH_DTYPES or part.shape[:1] != (batch,):
            raise InputError(
                f"{name}: the module gives {kind}{list(getattr(part, 'shape', []))}",
                fix=f"give a tensor, or a tuple of them, of {', '.join(TORCH_DTYPES)}, "
                f"whose axis 0 is the batch: {batch} in the examples",
            )

    def port(name: str, value: torch.Tensor) -> Tensor:
        return Tensor(name, TORCH_DTYPES[str(value.dtype)], ("batch", *value.shape[1:]))

    names = ["output"] if len(parts) == 1 else [f"output_{i}" for i in range(len(parts))]
    high = {n: int(v.max()) + 1 for n, v in inputs.items() if v.dtype in (torch.int64, torch.int32)}
    return Component(
        "model",
        module,
        tuple(port(n, v) for n, v in inputs.items()),
        tuple(port(n, v) for n, v in zip(names, parts, strict=True)),
        {"batch": 64},
        high,
    )


def _digest(module: nn.Module, inputs: dict[str, torch.Tensor]) -> str:
    """SHA-256 of what the factory made: its code as torch prints it, weights, and example shapes."""
    digest = hashlib.sha256(repr(module).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    source = Path(sys.modules[type(module).__module__].__file__ or "")
    if source.is_file():
        digest.update(source.read_bytes())
    shapes = {n: [str(v.dtype), *v.shape] for n, v in inputs.items()}
    return sha256_text(digest.hexdigest() + canonical(shapes))


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:80]


def load(directory: Path) -> dict[str, Any]:
    """What config.json says, and where the graphs are."""
    return {"directory": directory, **json.loads((directory / "config.json").read_text(encoding="utf-8"))}


def components(model: dict[str, Any]) -> list[Component]:
    def ports(values: list[dict[str, Any]]) -> tuple[Tensor, ...]:
        return tuple(Tensor(p["name"], p["dtype"], tuple(p["shape"])) for p in values)

    return [
        Component(
            c["name"], model["directory"] / f"{c['name']}.onnx", ports(c["inputs"]), ports(c["outputs"]), c["max_sizes"]
        )
        for c in model["components"]
    ]


def attentions(model: dict[str, Any]) -> list[AttentionBlock]:
    """None: heads can't be told in a graph from outside."""
    del model
    return []


def program(model: dict[str, Any], directory: Path) -> dict[str, Any]:
    del directory
    return dict(model["program"])


def sizes(model: dict[str, Any]) -> tuple[int, int | None]:
    """(values in the weights, None: multiply-adds are not counted)."""
    return model["parameters"], None
