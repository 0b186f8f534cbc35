"""A model small enough to read, as the compile stage hands it over for a Jetson: two components, FP16 and INT8."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgemm.artifact import Artifact, build
from edgemm.data import noise
from edgemm.device.files import device_files
from edgemm.recipe import Recipe, Verify
from edgemm.runtime.bundle import write_bundle
from edgemm.target import Budgets, Target

WIDTHS = {"encoder": ("x", "h", 16, 32), "head": ("h", "logits", 32, 3)}
RECIPE = Recipe(name="tiny", model="tiny", data="random:40", verify=Verify(rounds=4))
TARGET = Target(
    name="jetson-test",
    backend="tensorrt",
    compile="on-device",
    sm=(87,),
    precision="f16",
    precisions=("int8", "fp16"),
    budgets=Budgets(max_p50_ms=1000, max_peak_mb=100_000),
)


def program(names: Sequence[str] = tuple(WIDTHS)) -> dict[str, Any]:
    """program.json of the named components."""
    first, last = WIDTHS[names[0]], WIDTHS[names[-1]]
    return {
        "backend": "tensorrt",
        "settings": {"threads": 1, "precision": "f16"},
        "components": [
            {
                "name": name,
                "inputs": [{"name": x, "dtype": "float32", "shape": ["batch", wide]}],
                "outputs": [{"name": y, "dtype": "float32", "shape": ["batch", high]}],
                "max_sizes": {"batch": 16},
            }
            for name, (x, y, wide, high) in ((n, WIDTHS[n]) for n in names)
        ],
        "tensors": [{"tensor": first[0], "kind": "tensor"}],
        "output": {"kind": "labels", "tensor": last[1], "labels": ["circle", "square", "star"]},
        "profiles": {
            name: {x: {"min": [1, wide], "opt": [1, wide], "max": [4, wide]}}
            for name, (x, _, wide, _) in ((n, WIDTHS[n]) for n in names)
        },
    }


def graph(name: str, precision: str) -> onnx.ModelProto:
    """y = x W with seeded weights: in FP32, in FP16, or with int8 Q/DQ on both sides, zero point 0."""
    x, y, wide, high = WIDTHS[name]
    weights = np.random.default_rng(len(name)).standard_normal((wide, high), np.float32) / wide**0.5
    constants = {"zero": np.int8(0), "x_scale": np.float32(4 / 127), "w_scale": np.float32(np.abs(weights).max() / 127)}
    if precision == "fp32":
        constants = {"w": weights}
        nodes = [helper.make_node("MatMul", [x, "w"], [y])]
    elif precision == "fp16":
        constants = {"w": weights.astype(np.float16)}
        nodes = [
            helper.make_node("Cast", [x], ["x16"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["x16", "w"], ["y16"]),
            helper.make_node("Cast", ["y16"], [y], to=TensorProto.FLOAT),
        ]
    else:
        constants["w"] = np.round(weights / constants["w_scale"]).astype(np.int8)
        nodes = [
            helper.make_node("QuantizeLinear", [x, "x_scale", "zero"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "w_scale", "zero"], ["wd"]),
            helper.make_node("MatMul", ["xd", "wd"], [y]),
        ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size]) for n, size in ((x, wide), (y, high))]
    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    made = helper.make_graph(nodes, name, ports[:1], ports[1:], initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def artifacts(runs: Path, made: dict[str, Any]) -> tuple[Artifact, Artifact]:
    """(engine, the FP32 graph behind it) of a program."""
    names = [c["name"] for c in made["components"]]

    def make_graph(out: Path) -> None:
        for name in names:
            onnx.save(graph(name, "fp32"), out / f"{name}.onnx")
        plain = {k: v for k, v in made.items() if k != "profiles"}
        plain |= {"backend": "onnxruntime", "settings": {"threads": 1}}
        (out / "program.json").write_text(json.dumps(plain))

    def make_engine(out: Path) -> None:
        for name in names:
            for precision in ("fp16", "int8"):
                onnx.save(graph(name, precision), out / f"{name}.{precision}.onnx")
        (out / "program.json").write_text(json.dumps(made))

    fp32 = build("graph", runs, config={"program": made}, make=make_graph)
    return build("engine", runs, parents=[fp32], config={}, make=make_engine), fp32


def bundle(folder: Path, names: Sequence[str] = tuple(WIDTHS), target: Target = TARGET, **certificate: Any) -> Path:
    """A bundle for `device_runner.py` of the named components."""
    made = program(names)
    engine, fp32 = artifacts(folder / "runs", made)
    files = {n: (engine.path / n).read_bytes() for n in engine.manifest.files if n != "program.json"}
    files |= device_files(engine, fp32, noise.samples(made, 12, 1), RECIPE, target)
    manifest = {
        "model": "tiny",
        "target": target.name,
        "program": made,
        "certificate": {"verdict": "UNVERIFIED", "accuracy": [], **certificate},
        "provenance": {
            "recipe": RECIPE.model_dump(mode="json", by_alias=True),
            "target": target.model_dump(mode="json", by_alias=True),
        },
    }
    path = folder / "tiny.edgemm"
    path.write_bytes(write_bundle(manifest, files))
    return path
