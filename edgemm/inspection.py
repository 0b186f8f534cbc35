"""What a model, a bundle and this machine are: inspect, evaluate, doctor."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgemm import artifact, plugins
from edgemm.errors import ToolchainError
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.session import Query, Session

TOOLS = ("torch", "transformers", "onnx", "onnxruntime", "nncf", "openvino", "numpy", "tokenizers", "easy-vqa")


def is_bundle(model: str) -> bool:
    return model.endswith(".edgemm")


def inspect(model: str) -> dict[str, Any]:
    """Components of a model or bundle; attention layers of a model; certificate and files of a bundle."""
    if is_bundle(model):
        bundle = read_bundle(Path(model))
        manifest = bundle.manifest
        listed = [{k: c[k] for k in ("name", "inputs", "outputs")} for c in manifest["program"]["components"]]
        return {"components": listed, "sha256": bundle.sha256, **{k: manifest[k] for k in ("certificate", "files")}}
    from edgemm.models import find_family, read_model, resolve, sizes

    directory = resolve(model)
    family = find_family(directory)
    module = read_model(family, directory)
    parameters, macs = sizes(family, module)
    fields = ("name", "kind", "queries", "keys", "heads", "head_dim")
    return {
        "components": [
            {"name": c.name, "inputs": [asdict(p) for p in c.inputs], "outputs": [asdict(p) for p in c.outputs]}
            for c in family.components(module)
        ],
        "attention": [{f: getattr(b, f) for f in fields} for b in family.attentions(module)],
        "parameters": parameters,
        "macs": macs,
    }


def evaluate(model: str, data: str) -> dict[str, dict[str, float]]:
    """Accuracy on the test split -> {"all" and each kind of question: {"n": samples, "accuracy": share}}."""
    samples = plugins.plugin("data", data).samples("test")
    if is_bundle(model):
        bundle = read_bundle(Path(model))
        program = bundle.manifest["program"]
        outputs = Session(bundle.files, program, model).logits([Query(s.image, s.text) for s in samples])
        labels = program["output"]["labels"]
    else:
        from edgemm.models import find_family, read_model, resolve

        directory = resolve(model)
        family = find_family(directory)
        module = read_model(family, directory)
        outputs = family.predict(module, directory, samples)
        labels = family.program(module)["output"]["labels"]
    right = [labels[i] == s.label for i, s in zip(outputs.argmax(1).tolist(), samples, strict=True)]
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for sample, is_right in zip(samples, right, strict=True):
        by_kind[sample.kind].append(is_right)
    groups = {"all": right, **dict(sorted(by_kind.items()))}
    return {name: {"n": len(values), "accuracy": float(np.mean(values))} for name, values in groups.items()}


def doctor() -> dict[str, dict[str, str]]:
    """Host, versions of tools, and what each backend can do here or how to get it."""
    from edgemm.stages.verify import host

    backends = {}
    for name in plugins.names("backends"):
        try:
            backends[name] = plugins.plugin("backends", name).doctor()
        except ToolchainError as e:
            backends[name] = str(e)
    tools = {k: v for k, v in artifact.tool_versions(TOOLS).items() if k != "edgemm"}
    return {"host": host(), "tools": tools, "backends": backends}
