"""Engines by the real TensorRT-RTX, with no GPU: same bytes twice, INT8 and fused attention counted, profiles."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgemm.backends import _tensorrt, tensorrt, tensorrt_rtx
from edgemm.backends._tensorrt_counts import count
from edgemm.errors import InputError, ToolchainError
from edgemm.graph.lower import lower
from edgemm.graph.profiles import profiles
from edgemm.models import Component, Tensor
from edgemm.models._graph import onnx_export
from edgemm.quantizers import nncf
from edgemm.target import Target, load_target

WIDTH, HEADS = 64, 2
RTX = load_target("rtx")
TOKENS = Tensor("x", "float32", ("batch", "tokens", WIDTH))
SIZES = {"batch": 8, "tokens": 16}


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        parts = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """block.int8.onnx and block.fp16.onnx of a transformer block, and block.onnx."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("block")
    component = Component("block", Block().eval(), (TOKENS,), (dataclasses.replace(TOKENS, name="y"),), SIZES)
    onnx_export(component, folder / "block.onnx", 18)
    model = onnx.load(folder / "block.onnx")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 16, WIDTH)).astype(np.float32)} for _ in range(8)]
    quantized = nncf.quantize(model, samples, nncf.Options())
    for precision, made in lower(model, quantized, samples, 20, "block").items():
        onnx.save(made, folder / f"block.{precision}.onnx")
    return folder


def program(**changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Components and output of program.json."""
    port = {"name": "x", "dtype": "float32", "shape": ["batch", "tokens", WIDTH]}
    component = {"name": "block", "inputs": [port], "outputs": [], "max_sizes": SIZES, **changes}
    return [component], {"kind": "features"}


PROFILE = {"x": {"min": [1, 1, WIDTH], "opt": [1, 16, WIDTH], "max": [8, 16, WIDTH]}}
TWICE = """
import json, sys
from pathlib import Path
from edgemm.backends import tensorrt_rtx
from edgemm.target import load_target
tensorrt_rtx.compile_component(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), load_target("rtx"), {})
"""


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'edgemm[tensorrt-rtx]'")


@pytest.mark.usefixtures("rtx")
def test_every_product_runs_in_int8_and_attention_is_one_kernel(graphs: Path, tmp_path: Path) -> None:
    counts = tensorrt_rtx.compile_component(graphs / "block.int8.onnx", tmp_path, PROFILE, RTX, {})
    assert (counts["gemms"], counts["int8_gemms"]) == (6, 6)
    assert (counts["attention"], counts["fused_attention"]) == (1, 1)
    assert counts["float32_nodes"] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"block.int8.engine", "block.int8.onnx"}


@pytest.mark.usefixtures("rtx")
def test_an_fp16_engine_has_no_int8(graphs: Path, tmp_path: Path) -> None:
    counts = tensorrt_rtx.compile_component(graphs / "block.fp16.onnx", tmp_path, PROFILE, RTX, {})
    assert (counts["gemms"], counts["int8_gemms"], counts["fused_attention"]) == (6, 0, 1)


@pytest.mark.usefixtures("rtx")
def test_ranges_off_zero_cost_neither_int8_nor_the_fused_attention(graphs: Path) -> None:
    """What the preset `mixed` has zero points for is written with none."""
    import tensorrt_rtx_bindings as trt

    model = onnx.load(graphs / "block.onnx")
    samples = [{"x": np.random.default_rng(0).standard_normal((1, 16, WIDTH)).astype(np.float32)}]
    graph = lower(model, nncf.quantize(model, samples, nncf.Options(preset="mixed")), samples, 20, "block")["int8"]
    assert [n for n in graph.graph.node if n.name.endswith("/centered/Sub")], "a GELU's range"
    counts = count(graph, _tensorrt.build(trt, graph.SerializeToString(), PROFILE, RTX, "block").layers)
    assert (counts["gemms"], counts["int8_gemms"], counts["fused_attention"]) == (6, 6, 1)


@pytest.mark.usefixtures("rtx")
def test_q_dq_on_everything_costs_the_fused_attention(graphs: Path) -> None:
    """What our dialect is for: the quantizer's own placement, in TensorRT."""
    import tensorrt_rtx_bindings as trt

    model = onnx.load(graphs / "block.onnx")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 16, WIDTH)).astype(np.float32)} for _ in range(4)]
    everywhere = nncf.quantize(model, samples, nncf.Options())
    built = _tensorrt.build(trt, everywhere.SerializeToString(), PROFILE, RTX, "block")
    assert count(everywhere, built.layers)["fused_attention"] == 0


@pytest.mark.usefixtures("rtx")
def test_same_graph_same_engine_bytes_in_another_process(graphs: Path, tmp_path: Path) -> None:
    import json

    content = []
    for i in range(2):
        (out := tmp_path / str(i)).mkdir()
        command = [sys.executable, "-c", TWICE, str(graphs / "block.int8.onnx"), str(out), json.dumps(PROFILE)]
        subprocess.run(command, check=True, timeout=120)
        content.append((out / "block.int8.engine").read_bytes())
    assert content[0] == content[1]


@pytest.mark.usefixtures("rtx")
def test_the_same_builder_serves_tensorrt_itself(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tensorrt` has the same classes; on a host with it and a GPU, compile: host builds there."""
    import tensorrt_rtx_bindings as trt

    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    target = RTX.model_copy(update={"backend": "tensorrt"})
    assert tensorrt.compile_component(graphs / "block.int8.onnx", tmp_path, PROFILE, target, {})["int8_gemms"] == 6
    assert (tmp_path / "block.int8.engine").is_file()


@pytest.mark.usefixtures("rtx")
def test_a_library_without_strongly_typed_networks_is_too_old(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx_bindings as trt

    class Old:
        pass

    monkeypatch.setattr(trt, "NetworkDefinitionCreationFlag", Old)
    with pytest.raises(ToolchainError, match="has no strongly typed networks"):
        _tensorrt.build(trt, b"", PROFILE, RTX, "block")


def test_a_jetson_gets_the_linted_graph_and_needs_no_tensorrt_here(graphs: Path, tmp_path: Path) -> None:
    target = load_target("jetson-orin-nano")
    counts = tensorrt.compile_component(graphs / "block.int8.onnx", tmp_path, PROFILE, target, {})
    assert (counts["gemms"], counts["int8_gemms"], counts["fused_attention"]) == (6, "unknown", "unknown")
    assert [p.name for p in tmp_path.iterdir()] == ["block.int8.onnx"]
    narrow = {"x": {k: [*v[:2], 32] for k, v in PROFILE["x"].items()}}
    with pytest.raises(InputError, match=r"block.int8: TensorRT refuses x: its shape is"):
        tensorrt.compile_component(graphs / "block.int8.onnx", tmp_path, narrow, target, {})


def test_a_table_that_reads_otherwise_gives_unknown_and_no_guess(graphs: Path) -> None:
    model = onnx.load(graphs / "block.int8.onnx")
    assert _tensorrt.layer_table(["Layers:", "Name: a, LayerType: gemm, Precision: INT8"]) is None
    assert _tensorrt.layer_table(["built in 1 s"]) is None
    counts = count(model, None)
    assert (counts["gemms"], counts["attention"]) == (6, 1)
    assert {counts[k] for k in ("int8_gemms", "fused_attention", "layers")} == {"unknown"}


ROW = (
    "Name: m_myl0_2, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1], Datatype: Int8, Format: f }], "
    "Constants: [ { Name: w, Datatype: Int8, Format: f }], Outputs: [ { Name: y, Datatype: Half }], TacticName: t, "
    "StreamId: 0, Metadata: [ONNX Layer: layers[0].q]\x1f[ONNX Layer: x/DQ]"
)


def test_a_row_of_the_layer_table_is_read() -> None:
    (row,) = _tensorrt.layer_table(["Layers:", ROW, ""]) or ()
    assert (row.kind, row.inputs, row.constants) == ("gemm", {"Int8"}, {"Int8"})
    assert row.nodes == {"layers[0].q", "x/DQ"}


def test_profiles_take_the_targets_shapes_and_else_the_whole_exported_range() -> None:
    assert profiles(*program(), RTX) == {"block": PROFILE}
    sized = RTX.model_copy(update={"shapes": {"tokens": (4, 8, 12)}})
    found = profiles(*program(), sized)["block"]["x"]
    assert found == {"min": [1, 4, WIDTH], "opt": [1, 8, WIDTH], "max": [1, 12, WIDTH]}
    assert profiles(*program(min_sizes={"tokens": 3}), RTX)["block"]["x"]["min"] == [1, 3, WIDTH]


@pytest.mark.parametrize(("shapes", "shown"), [((1, 8, 32), r"\[1, 8, 32\]"), ((1, 2, 3), r"\[1, 2, 3\]")])
def test_a_profile_wider_than_the_exported_range_is_refused(shapes: tuple[int, int, int], shown: str) -> None:
    target = RTX.model_copy(update={"shapes": {"tokens": shapes}})
    with pytest.raises(
        InputError, match=rf"rtx: shapes.tokens = {shown} is wider than block was exported for, 2 to 16"
    ):
        profiles(*program(min_sizes={"tokens": 2}), target)


def test_a_decoders_profile_is_for_one_token_and_a_growing_cache() -> None:
    def port(name: str, *shape: int | str) -> dict[str, Any]:
        return {"name": name, "dtype": "float32", "shape": list(shape)}

    decoder = {
        "name": "decoder",
        "inputs": [port("ids", "batch", "tokens"), port("mask", "batch", "total"), port("p0", "batch", 2, "past", 8)],
        "outputs": [],
        "max_sizes": {"batch": 8, "tokens": 10, "past": 10, "total": 20},
    }
    output = {"kind": "generation", "decoder": "decoder", "ids": "ids", "mask": "mask", "cache": [["p0", "q0"]]}
    found = profiles([decoder], output, RTX)["decoder"]
    assert [found["ids"][k] for k in ("min", "opt", "max")] == [[1, 1], [1, 1], [8, 10]]
    assert [found["p0"][k][2] for k in ("min", "opt", "max")] == [1, 5, 10]
    assert [found["mask"][k][1] for k in ("min", "opt", "max")] == [2, 6, 20]


def test_a_fixed_target_has_fixed_profiles() -> None:
    fixed = program(inputs=[{"name": "x", "dtype": "float32", "shape": [1, 16, WIDTH]}])
    found = profiles(*fixed, Target(name="t", backend="tensorrt"))["block"]["x"]
    assert list(found.values()) == [[1, 16, WIDTH]] * 3
