"""TensorRT targets on a machine without a GPU: what is built, what is claimed, and that it comes out the same twice."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

COMPONENTS = ("image_encoder", "text_encoder", "fusion")
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="pip install 'edgemm[tensorrt-rtx]'"
)


def engines(out: Path) -> list[Path]:
    """The artifacts of the compressed model: program.json with profiles, and graphs of two precisions."""
    return [p for p in sorted((out / ".runs").glob("engine-*")) if list(p.glob("*.int8.onnx"))]


def of(out: Path) -> dict[str, Any]:
    (target,) = json.loads((out / "report.json").read_text())["targets"]
    return target


@pytest.fixture(scope="module")
def rtx(edgemm: Any, tiny_model: Path, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory where `edgemm compress MODEL --target rtx` ran, with exit 0."""
    out = tmp_path_factory.mktemp("rtx")
    done = edgemm("compress", tiny_model, "--recipe", tiny_recipe, "--target", "rtx", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "level L2. L0: " in done.stdout
    return out


@needs_rtx
def test_engines_are_built_with_no_gpu_and_nothing_more_is_claimed(rtx: Path) -> None:
    target = of(rtx)
    assert (target["verdict"], target["level"], target["latency"], target["memory"]) == ("UNVERIFIED", "L2", None, None)
    assert target["accuracy"][0]["n"] == 200
    assert target["bundle"]["path"].endswith("rtx.edgemm")
    rows = {(r["component"], r["precision"]): r for r in target["layers"]}
    assert set(rows) == {(c, p) for c in COMPONENTS for p in ("int8", "fp16")}
    for (_, precision), row in rows.items():
        assert row["gemms"] > 0
        assert row["int8_gemms"] == row["quantized_gemms"] == (row["gemms"] if precision == "int8" else 0)
        assert row["fused_attention"] != "unknown"


@needs_rtx
def test_the_same_command_gives_the_same_engine_bytes(
    edgemm: Any, rtx: Path, tiny_model: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    done = edgemm("compress", tiny_model, "--recipe", tiny_recipe, "--target", "rtx", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    digests = [
        {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in engine.glob("*.engine")}
        for out in (rtx, tmp_path)
        for engine in engines(out)
    ]
    assert len(digests[0]) == 6
    assert digests[0] == digests[1]
    assert of(rtx)["bundle"]["sha256"] == of(tmp_path)["bundle"]["sha256"]


@needs_rtx
def test_a_level_that_is_not_reached_is_exit_5_and_the_bundle_is_there(
    edgemm: Any, rtx: Path, tiny_model: Path, tiny_recipe: Path
) -> None:
    arguments = ("compress", tiny_model, "--recipe", tiny_recipe, "--target", "rtx", "-o", rtx)
    done = edgemm(*arguments, "--set", "target.level=L3")
    assert done.returncode == 5, done.stderr
    assert "level L2 is reached, and L3 is asked" in done.stderr
    assert Path(of(rtx)["bundle"]["path"]).is_file()


def test_a_jetson_gets_graphs_profiles_and_level_1(
    edgemm: Any, tiny_model: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    arguments = ("compress", tiny_model, "--recipe", tiny_recipe, "--target", "jetson-orin-nano", "-o", tmp_path)
    done = edgemm(*arguments)
    assert done.returncode == 0, done.stderr
    target = of(tmp_path)
    assert (target["verdict"], target["level"], target["size"]) == ("UNVERIFIED", "L1", None)
    assert {(r["component"], r["int8_gemms"]) for r in target["layers"]} == {(c, "unknown") for c in COMPONENTS}
    assert "whether the engine builds on the device" in target["established"]
    (engine,) = engines(tmp_path)
    graphs = {f"{c}.{p}.onnx" for c in COMPONENTS for p in ("int8", "fp16")}
    assert {f.name for f in engine.iterdir()} == {
        *graphs,
        "layers.json",
        "program.json",
        "tokenizer.json",
        "manifest.json",
    }
    program = json.loads((engine / "program.json").read_text())
    assert program["backend"] == "tensorrt"
    assert program["profiles"]["text_encoder"]["input_ids"] == {"min": [1, 1], "opt": [1, 16], "max": [4, 16]}
