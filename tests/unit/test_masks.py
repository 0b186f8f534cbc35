"""Attention with one head and a mask: the same numbers, and one kernel in TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgemm.backends import _tensorrt
from edgemm.backends._tensorrt_counts import count
from edgemm.graph.lower import lower
from edgemm.graph.masks import spell_out_masks
from edgemm.models import Component, Tensor
from edgemm.models._graph import onnx_export
from edgemm.target import load_target

WIDTH, HEAD, TOKENS = 64, 32, 16
RNG = np.random.default_rng(0)
SAMPLE = {"x": RNG.standard_normal((2, TOKENS, WIDTH)).astype(np.float32), "m": np.ones((2, TOKENS), np.int64)}
SAMPLE["m"][1, 5:] = 0
PROFILE = {
    "x": {"min": [1, 1, WIDTH], "opt": [1, TOKENS, WIDTH], "max": [8, TOKENS, WIDTH]},
    "m": {"min": [1, 1], "opt": [1, TOKENS], "max": [8, TOKENS]},
}
X, Y = (Tensor(name, "float32", ("batch", "tokens", WIDTH)) for name in "xy")
MASK = Tensor("m", "int64", ("batch", "tokens"))


class OneHead(nn.Module):
    """Masked self-attention, one head of which pruning has left."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEAD) for _ in range(3))
        self.o, self.norm = nn.Linear(HEAD, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = (1.0 - m[:, None, None, :].to(x.dtype)) * -30.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def attention(heads: int, *, mask_first: bool = False, rows: bool = False) -> onnx.ModelProto:
    """Self-attention of x float32[B,T,W] under a mask m int64[B,T]; `rows`: the mask has a row for each query."""
    n = helper.make_node
    nodes = [n("MatMul", ["x", f"w{i}"], [f"p{i}"], f"p{i}") for i in "qkv"]
    nodes += [n("Add", [f"p{i}", "bias"], [f"b{i}"], f"b{i}") for i in "qkv"]
    nodes += [n("Reshape", [f"b{i}", "split"], [f"r{i}"], f"r{i}") for i in "qkv"]
    nodes += [n("Transpose", [f"r{i}"], [i], i, perm=[0, 2, 3, 1] if i == "k" else [0, 2, 1, 3]) for i in "qkv"]
    nodes += [
        n("MatMul", ["q", "k"], ["scores"], "scores"),
        n("Cast", ["m"], ["shown"], to=TensorProto.FLOAT),
        n("Sub", ["one", "shown"], ["hidden"]),
        n("Mul", ["hidden", "far"], ["low"]),
        n("Unsqueeze", ["low", "axes"], ["small"]),
        n("Shape", ["scores"], ["size"]),
        n("Expand", ["small", "size"], ["large"]),
        n("Add", ["large" if rows else "small", "scores"][:: 1 if mask_first else -1], ["masked"], "masked"),
        n("Softmax", ["masked"], ["probabilities"], "probabilities"),
        n("MatMul", ["probabilities", "v"], ["mixed"], "mixed"),
        n("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        n("Reshape", ["back", "join"], ["y"]),
    ]
    constants = {f"w{i}": RNG.standard_normal((WIDTH, heads * HEAD)).astype(np.float32) / WIDTH for i in "qkv"}
    constants |= {
        "bias": RNG.standard_normal(heads * HEAD).astype(np.float32),
        "one": np.float32(1),
        "far": np.float32(-30),
        "axes": np.array([1, 2]),
    }
    constants |= {"split": np.array([0, 0, heads, HEAD]), "join": np.array([0, 0, heads * HEAD])}
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", kind, ["b", "t", WIDTH]),
            helper.make_tensor_value_info("m", TensorProto.INT64, ["b", "t"]),
        ],
        [helper.make_tensor_value_info("y", kind, ["b", "t", heads * HEAD])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def run(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    return np.asarray(ort.InferenceSession(model.SerializeToString()).run(None, SAMPLE)[0])


@pytest.mark.parametrize("mask_first", [True, False])
def test_one_heads_mask_is_spelled_out_and_the_numbers_stay(mask_first: bool) -> None:
    model = attention(1, mask_first=mask_first)
    wanted = run(model)
    expanded = [n for n in spell_out_masks(model).graph.node if n.name == "masked/mask/Expand"]
    assert [list(n.input) for n in expanded] == [["small", "masked/scores"]]
    np.testing.assert_array_equal(run(model), wanted)


@pytest.mark.parametrize("model", [attention(2), attention(1, rows=True)])
def test_other_masks_are_left_as_they_are(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    assert spell_out_masks(model).SerializeToString(deterministic=True) == before


def test_masked_attention_with_one_head_is_one_kernel(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'edgemm[tensorrt-rtx]'")
    torch.manual_seed(0)
    component = Component("head", OneHead().eval(), (X, MASK), (Y,), {"batch": 8, "tokens": TOKENS})
    onnx_export(component, tmp_path / "head.onnx", 18)
    graph = lower(onnx.load(tmp_path / "head.onnx"), None, [SAMPLE], 20, "head")["fp16"]
    counts = count(graph, _tensorrt.build(trt, graph.SerializeToString(), PROFILE, load_target("rtx"), "head").layers)
    assert (counts["attention"], counts["fused_attention"]) == (1, 1)
