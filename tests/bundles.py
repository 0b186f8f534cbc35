"""A bundle of two tiny ONNX graphs that runs, and keys to sign it with."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from edgemm.data.noise import samples
from edgemm.recipe import Recipe
from edgemm.report.bom import bill_of_materials
from edgemm.runtime.bundle import write_bundle
from edgemm.runtime.session import Session
from edgemm.stages.package import array_bytes, golden
from edgemm.target import Target
from tests import devices

RECIPE = Recipe(name="tiny", model="tiny", data="random:8")


def program() -> dict[str, Any]:
    made = {k: v for k, v in devices.program().items() if k != "profiles"}
    return made | {"backend": "onnxruntime", "settings": {"threads": 1, "precision": "f32"}}


def tiny_bundle(version: int = 1, expected: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """Bytes of a bundle; `expected` replaces what its golden inputs gave, `changes` the keys of its manifest."""
    files = {f"{name}.onnx": devices.graph(name, "fp32").SerializeToString() for name in devices.WIDTHS}
    made = program()
    session = Session(files, made, "tiny")
    inputs = golden(samples(made, 2, 1), session)
    if expected is not None:
        inputs["golden/expected.npz"] = array_bytes(np.savez, **expected)
    files |= inputs
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


def key_pair(folder: Path, name: str = "key", curve: str = "prime256v1") -> tuple[Path, Path]:
    """(private key, public key) as `openssl` makes them."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", private)
    openssl("ec", "-in", private, "-pubout", "-out", public)
    return private, public


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
