"""Models that this project has never seen, through the whole command line: directories, graphs, factories."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import checkpoints

QUICK = ("--set", "verify.rounds=4", "--set", "verify.resamples=1000", "--set", "target.budgets.min_speedup=null")
SMALL = ("--set", "target.budgets.max_size_ratio=null", "--set", "calibration=4")
FAMILIES = {  # what the model takes -> kind of output, components
    "blip": ({"image", "text"}, "generation", ["image_encoder", "fusion", "cross_cache", "decoder"]),
    "clip": ({"image", "text"}, "embeddings", ["image_encoder", "text_encoder"]),
    "vilt": ({"image", "text"}, "labels", ["image_encoder", "fusion"]),
    "wav2vec2": ({"audio"}, "transcript", ["audio_encoder"]),
}


def compress(
    edgemm: Any, model: str | Path, data: str | Path, out: Path, *more: str
) -> tuple[int, dict[str, Any], str]:
    done = edgemm("compress", model, "--data", data, "-o", out, "--json", *QUICK, *SMALL, *more)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_of_each_shape_goes_all_the_way(name: str, edgemm: Any, tmp_path: Path) -> None:
    """Noise measures latency and size; of accuracy it says nothing, and the verdict says so."""
    directory = checkpoints.write(name, tmp_path / name)
    code, report, said = compress(edgemm, directory, "random:8", tmp_path / "out")
    (target,) = report["targets"]
    assert (code, target["verdict"]) == (5, "INCONCLUSIVE"), said
    assert target["accuracy"] == []
    assert "noise" in " ".join(target["notes"])
    modalities, kind, components = FAMILIES[name]
    assert [c["name"] for c in target["latency"]["components"]] == components
    assert target["pruning"] is None
    found = json.loads(edgemm("inspect", directory, "--json").stdout)
    assert (set(found["modalities"]), found["output"]) == (modalities, kind)
    assert [c["name"] for c in found["components"]] == components
    assert found["attention"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 40 images, each with a text, and labels that ViT's five classes have."""
    from easy_vqa import get_test_image_paths

    folder = tmp_path_factory.mktemp("pictures")
    rows = [
        {"image": str(path), "text": f"a picture {'abcdefghij'[i % 10]}", "label": f"LABEL_{i % 5}", "split": part}
        for i, path in enumerate(list(get_test_image_paths().values())[:40])
        for part in ["train" if i < 10 else "test"]
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "rows.jsonl"


def test_a_bundle_of_embeddings_answers_each_modality_alone(edgemm: Any, pictures: Path, tmp_path: Path) -> None:
    directory = checkpoints.write("clip", tmp_path / "clip")
    code, report, said = compress(
        edgemm, directory, pictures, tmp_path / "out", "--set", "verify.metrics=[{use: cosine, margin: 0.5}]"
    )
    assert code == 0, said
    (target,) = report["targets"]
    assert target["accuracy"][0]["compressed"] > 0.9
    bundle, image = target["bundle"]["path"], json.loads(pictures.read_text().splitlines()[0])["image"]
    whole, seen, read = (
        json.loads(edgemm("run", bundle, "--json", *given).stdout)["outputs"]
        for given in (("--image", image, "--text", "a cat"), ("--image", image), ("--text", "a cat"))
    )
    assert whole == {**seen, **read}
    assert {name: len(value) for name, value in whole.items()} == {"image_embeds": 16, "text_embeds": 16}
    done = edgemm("run", bundle, "--audio", image)
    assert done.returncode == 2
    assert "takes no audio" in done.stderr
    assert edgemm("verify", bundle, "--data", pictures).returncode == 0


def test_right_answers_make_it_accuracy(edgemm: Any, pictures: Path, tmp_path: Path) -> None:
    directory = checkpoints.write("vit", tmp_path / "vit")
    code, report, said = compress(edgemm, directory, pictures, tmp_path / "out", "--set", "verify.margin=0.9")
    assert code == 0, said
    assert report["targets"][0]["accuracy"][0]["metric"] == "accuracy"
    assert report["targets"][0]["accuracy"][0]["n"] == 30


def graph(path: Path, opset: int = 11, *, inputs: str = "pixels", width: int = 64) -> Path:
    """A small convolutional network as PyTorch of 2020 wrote it: opset 11."""
    rng = np.random.default_rng(0)
    weights = {
        "kernel": rng.standard_normal((width, 3, 3, 3)).astype(np.float32),
        "dense": rng.standard_normal((width, 16)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", [inputs, "kernel"], ["c"], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "dense"], ["embedding"]),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(inputs, TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 16])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path, save_as_external_data=opset > 11, location=f"{path.name}.data", size_threshold=0)
    return path


@pytest.mark.parametrize("opset", [11, 21])
def test_a_graph_from_anywhere(opset: int, edgemm: Any, pictures: Path, tmp_path: Path) -> None:
    """The newer one with its weights in a file beside it."""
    model = graph(tmp_path / "small.onnx", opset)
    code, report, said = compress(edgemm, model, pictures, tmp_path / "out", "--set", "verify.margin=0.5")
    assert code == 0, said
    (target,) = report["targets"]
    assert target["accuracy"][0]["metric"] == "cosine"
    assert target["pruning"] is None
    assert any("nothing was pruned" in note for note in target["notes"])
    assert target["latency"]["torch_p50_ms"] is None
    image = json.loads(pictures.read_text().splitlines()[0])["image"]
    answer = json.loads(edgemm("run", target["bundle"]["path"], "--image", image, "--json").stdout)
    assert len(answer["outputs"]["embedding"]) == 16


def test_several_graphs_are_joined_by_the_names_of_their_tensors(edgemm: Any, tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    folder.mkdir()
    graph(folder / "a_eye.onnx")
    weight = numpy_helper.from_array(np.eye(16, 4, dtype=np.float32), "w")
    head = helper.make_graph(
        [helper.make_node("MatMul", ["embedding", "w"], ["scores"])],
        "head",
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])],
        [weight],
    )
    onnx.save(
        helper.make_model(head, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "0_head.onnx"
    )
    found = json.loads(edgemm("inspect", folder, "--json").stdout)
    assert [c["name"] for c in found["components"]] == ["a_eye", "0_head"]
    assert (found["modalities"], found["output"]) == (["image"], "features")
    code, report, said = compress(edgemm, folder, "random:6", tmp_path / "out")
    assert code == 5, said
    assert [c["name"] for c in report["targets"][0]["latency"]["components"]] == ["a_eye", "0_head"]


FACTORY = """
import torch


class Gauge(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.seen = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
        self.read = torch.nn.Linear(4 + 16, 2)

    def forward(self, image, sensors):
        return self.read(torch.cat([self.seen(image).flatten(1), sensors], 1))


def make():
    return Gauge(), {"image": torch.rand(2, 3, 32, 32), "sensors": torch.rand(2, 4)}
"""


def test_a_factory_becomes_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "gauge.py").write_text(FACTORY, encoding="utf-8")
    command = [sys.executable, "-m", "edgemm", "compress", "gauge:make", "--data", "random:6", "-o", "out", "--json"]
    done = subprocess.run([*command, *QUICK, *SMALL], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 5, done.stderr
    report = json.loads(done.stdout)
    assert report["model"] == "gauge:make"
    assert report["targets"][0]["latency"]["speedup_p50"] > 0
