"""Tiny models as bundles, in ONNX Runtime and in OpenVINO: two encoders, alone or joined, and one that writes text."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

from edgemm.backends import openvino as openvino_backend
from edgemm.models import vision_encoder_decoder
from edgemm.models._graph import onnx_export
from edgemm.runtime.bundle import write_bundle
from edgemm.target import Target

BACKENDS = ("onnxruntime", "openvino")
TARGET = Target(name="box", backend="openvino")
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
WORDS = ("is", "it", "red", "light", "dark", "?", *(f"w{i}" for i in range(55)))
IMAGE = {"tensor": "pixel_values", "size": [4, 4], "resample": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
CAPTIONS = {"id": "model", "layers": 2, "vocabulary": 61, "start": 1, "eos": 48}


def two_encoders(backend: str, *, joined: bool, gain: float = 1.0) -> bytes:
    """A bundle of image and text that answers a or b where `joined`, else gives embeddings; `gain` of the weights."""
    graphs = {
        "image_encoder": graph(
            [node("Flatten", ["pixel_values"], ["flat"]), node("MatMul", ["flat", "w"], ["image_embeds"])],
            [("pixel_values", FLOAT, ["batch", 3, 4, 4])],
            [("image_embeds", FLOAT, ["batch", 4])],
            {"w": weights(48, 4, gain)},
        ),
        "text_encoder": graph(
            [
                node("Mul", ["input_ids", "attention_mask"], ["kept"]),
                node("Cast", ["kept"], ["float"], to=FLOAT),
                node("ReduceMean", ["float"], ["mean"], axes=[1], keepdims=1),
                node("MatMul", ["mean", "w"], ["text_embeds"]),
            ],
            [("input_ids", INT, ["batch", "text"]), ("attention_mask", INT, ["batch", "text"])],
            [("text_embeds", FLOAT, ["batch", 4])],
            {"w": weights(1, 4, gain)},
        ),
    }
    output: dict[str, Any] = {"kind": "embeddings", "tensors": {"image": "image_embeds", "text": "text_embeds"}}
    if joined:
        both = [("image_embeds", FLOAT, ["batch", 4]), ("text_embeds", FLOAT, ["batch", 4])]
        nodes = [node("Mul", ["image_embeds", "text_embeds"], ["m"]), node("MatMul", ["m", "w"], ["logits"])]
        graphs["fusion"] = graph(nodes, both, [("logits", FLOAT, ["batch", 2])], {"w": weights(4, 2, gain)})
        output = {"kind": "labels", "tensor": "logits", "labels": ["a", "b"]}
    text = {"ids": "input_ids", "mask": "attention_mask", "max_tokens": 16}
    return bundle(backend, graphs, {"image": IMAGE, "text": text, "output": output}, {})


def captions(folder: Path, backend: str, beams: int = 1) -> bytes:
    """A bundle that writes a text about an image: a random ViT-GPT2, whose cache OpenVINO keeps."""
    encoder, decoder = vision_encoder_decoder.components(_vit_gpt2())
    graphs = {}
    for component in (encoder, decoder):
        file = folder / f"{component.name}.onnx"
        if not file.is_file():
            onnx_export(component, file, 18)
        graphs[component.name] = onnx.load(file)
    cache = [[f"past_{p}_{i}", f"present_{p}_{i}"] for i in range(CAPTIONS["layers"]) for p in ("key", "value")]
    output = {"kind": "generation", "cache": cache, "prompt": [CAPTIONS["start"]], "eos": [CAPTIONS["eos"]]}
    output |= {"max_new_tokens": 12, "beams": beams}
    specs = {c.name: c.spec() for c in (encoder, decoder)}
    return bundle(backend, graphs, {"image": {**IMAGE, "size": [8, 8]}, "output": output}, specs)


def bundle(backend: str, graphs: dict[str, Any], program: dict[str, Any], specs: dict[str, Any]) -> bytes:
    """The bytes of a bundle; `specs` of components, made from the graphs where there is none."""
    files = {"tokenizer.json": tokenizer().encode()}
    for name, model in graphs.items():
        files |= compiled(backend, name, model, dict(program["output"].get("cache", ())) if name == "decoder" else {})
        specs = {name: spec_of(name, model), **specs}
    made = {
        "components": [specs[name] for name in graphs],
        "backend": backend,
        "settings": {"threads": 1, "precision": "f32"},
        **program,
    }
    manifest = {"model": "tiny", "target": "box", "program": made, "certificate": {}, "provenance": {}}
    return write_bundle(manifest, files)


def compiled(backend: str, name: str, model: onnx.ModelProto, cache: dict[str, str]) -> dict[str, bytes]:
    if backend == "onnxruntime":
        return {f"{name}.onnx": model.SerializeToString()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.onnx"
        file.write_bytes(model.SerializeToString())
        openvino_backend.compile_component(file, Path(folder), {}, TARGET, cache)
        return {f"{name}.{suffix}": file.with_suffix(f".{suffix}").read_bytes() for suffix in ("xml", "bin")}


def graph(nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: dict[str, Any]) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, **attributes)


def weights(rows: int, columns: int, gain: float) -> Any:
    return (gain * np.random.default_rng(rows).standard_normal((rows, columns))).astype(np.float32)


def spec_of(name: str, model: onnx.ModelProto) -> dict[str, Any]:
    def ports(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": v.name,
                "dtype": {FLOAT: "float32", INT: "int64"}[v.type.tensor_type.elem_type],
                "shape": [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            }
            for v in values
        ]

    inputs, outputs = ports(model.graph.input), ports(model.graph.output)
    return {"name": name, "inputs": inputs, "outputs": outputs, "max_sizes": {"batch": 16, "text": 16}}


def tokenizer() -> str:
    """Words apart by spaces, as word pieces are decoded."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return made.to_str()


@cache
def _vit_gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": CAPTIONS["layers"], "num_attention_heads": 2}
    encoder = ViTModel(ViTConfig(**sizes, intermediate_size=32, image_size=8, patch_size=4), add_pooling_layer=False)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=CAPTIONS["vocabulary"], n_positions=24)
    config.is_decoder = config.add_cross_attention = True
    made = VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(config)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    made.generation_config.decoder_start_token_id = CAPTIONS["start"]
    made.generation_config.eos_token_id = made.generation_config.pad_token_id = CAPTIONS["eos"]
    return made
