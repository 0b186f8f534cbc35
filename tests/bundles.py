"""A bundle of two tiny ONNX graphs that runs, and keys to sign it with."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper

from edgemm.data.noise import samples
from edgemm.recipe import Recipe
from edgemm.report.bom import bill_of_materials
from edgemm.runtime.bundle import write_bundle
from edgemm.runtime.session import Session
from edgemm.runtime.signature import write_signature
from edgemm.stages.package import array_bytes, golden
from edgemm.target import Target
from tests import devices

RECIPE = Recipe(name="tiny", model="tiny", data="random:8")


def program() -> dict[str, Any]:
    made = {k: v for k, v in devices.program().items() if k != "profiles"}
    return made | {"backend": "onnxruntime", "settings": {"threads": 1, "precision": "f32"}}


def tiny_bundle(
    version: int = 1, expected: Mapping[str, Any] | None = None, gain: float = 1.0, **changes: Any
) -> bytes:
    """Bytes of a bundle.

    expected  replaces what its golden inputs gave;  gain  what the weights are multiplied by
    changes   of keys of the manifest
    """
    files = {f"{name}.onnx": weighted(name, gain) for name in devices.WIDTHS}
    made = program()
    session = Session(files, made, "tiny")
    inputs = golden(samples(made, 2, 1), session)
    if expected is not None:
        inputs["golden/expected.npz"] = array_bytes(np.savez, **expected)
    files |= inputs
    files["check.npz"] = array_bytes(np.savez, **reference())
    manifest = {
        "version": version,
        "model": "tiny",
        "target": "box",
        "program": made,
        "certificate": {"verdict": "PASS", "accuracy": []},
        "provenance": {
            "engine": "0" * 64,
            "source": "1" * 64,
            "data": "2" * 64,
            "recipe": RECIPE.model_copy(update={"version": version}).model_dump(mode="json", by_alias=True),
            "target": Target(name="box", backend="onnxruntime").model_dump(mode="json", by_alias=True),
            "versions": {"edgemm": "3" * 16, "onnxruntime": "1.32.0"},
        },
        **changes,
    }
    files["bom.cdx.json"] = bill_of_materials(manifest, files)
    return write_bundle(manifest, files)


def reference(n: int = 2) -> dict[str, Any]:
    """What verify reads: here with an output of many zeros, which a bundle deflates."""
    hidden = np.zeros((n, 16384), np.float32)
    hidden[:, ::3] = np.random.default_rng(0).standard_normal((n, 5462))
    names = np.array([str(i) for i in range(n)])
    return {"ids": names, "groups": names, "targets": np.array([""] * n), "out.hidden": hidden}


def weighted(name: str, gain: float) -> bytes:
    """The graph of a component, its weights multiplied."""
    model = devices.graph(name, "fp32")
    weights = model.graph.initializer[0]
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(gain), weights.name))
    return model.SerializeToString()


def signed(path: Path, content: bytes, private: Path) -> Path:
    """Write a bundle and its signature, whether or not it deserves one."""
    path.write_bytes(content)
    write_signature(path, hashlib.sha256(content).hexdigest(), private, None, [])
    return path


def key_pair(folder: Path, name: str = "key", curve: str = "prime256v1") -> tuple[Path, Path]:
    """(private key, public key) as `openssl` makes them."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", private)
    openssl("ec", "-in", private, "-pubout", "-out", public)
    return private, public


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
