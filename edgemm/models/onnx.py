"""Graphs from anywhere: .onnx files, and Python factories, which become one.

A directory that bring_in made holds each component's .onnx and a config.json with what is known of them:
components (names, inputs, outputs, sizes) and program (pre- and post-processing).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from edgemm.artifact import build, sha256_file
from edgemm.console import log
from edgemm.errors import InputError
from edgemm.models import AttentionBlock, Component, Tensor
from edgemm.models._factory import call_factory, digest
from edgemm.models._graph import check, onnx_export
from edgemm.models._onnx_files import TARGET, check_joints, in_order, ports_of, read_graphs
from edgemm.models._processors import FILES, image_spec, text_spec

LENGTHS = {"image": 224, "audio": 80_000, "tokens": 128, "mask": 128, "tensor": 128}  # of axes that may have any size
AXES = {"image": ("batch", 3, "height", "width"), "audio": ("batch", "samples"), "tokens": ("batch", "tokens")}
RATE = 16_000
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
        parts |= {n: sha256_file(beside / n) for n in FILES if (beside / n).is_file()}
        config: dict[str, Any] = {"files": parts, "kinds": dict(kinds)}

        def make(out: Path) -> None:
            for name, graph in graphs.items():
                onnx.save(graph, out / f"{name}.onnx")
            _describe(out, beside, kinds)
    else:
        component = call_factory(model)
        config = {"factory": model, "module": digest(component), "kinds": dict(kinds)}

        def make(out: Path) -> None:
            onnx_export(component, out / "model.onnx", TARGET)
            check(component, out / "model.onnx", TOLERANCE)
            _describe(out, out, kinds)

    return build("imported", runs, config=config, tools=("onnx", "torch"), make=make).path


def _describe(out: Path, beside: Path, kinds: Mapping[str, str]) -> None:
    """Write config.json for the graphs in `out`; tokenizer and processors are looked for in `beside`."""
    for name in FILES:
        if (beside / name).is_file() and beside != out:
            shutil.copyfile(beside / name, out / name)
    graphs = {p.stem: onnx.load(p).graph for p in sorted(out.glob("*.onnx"))}
    ports = {name: (ports_of(g.input, g, name), ports_of(g.output, g, name)) for name, g in graphs.items()}
    check_joints(ports)
    ordered = in_order(ports)
    made = {p["name"] for _, outputs in ports.values() for p in outputs}
    sources = {p["name"]: p for name in ordered for p in ports[name][0] if p["name"] not in made}
    if unknown := sorted(kinds.keys() - sources.keys()):
        raise InputError(f"inputs.{unknown[0]}: no such input", fix=f"inputs: {', '.join(sources)}")
    for name, kind in kinds.items():
        shape = sources[name]["shape"]
        if kind in AXES and (len(shape) != len(AXES[kind]) or (kind == "image" and shape[1] != 3)):
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
