"""Dual encoders against transformers' own full models: tiny, random, saved in FP16 and read as a user's checkpoint."""

from __future__ import annotations

import copy
import io
import json
import shutil
import wave
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DeiTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    XLMRobertaConfig,
)

from edgemm.errors import InputError
from edgemm.models import find_family, open_fp32, read_model
from edgemm.models._graph import check, onnx_export
from edgemm.models._hidden_units import hidden_units, matrix
from edgemm.runtime.query import Query

pytestmark = pytest.mark.usefixtures("one_thread")
PAD, BOS, EOS, LAST = 1, 0, 50, 98
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 20, "bos_token_id": BOS, "eos_token_id": EOS}
AUDIO = {
    **{"window_size": 4, "num_mel_bins": 16, "spec_size": 64, "hidden_size": 64, "depths": [2, 2]},
    **{"num_attention_heads": [2, 4], "patch_embeds_hidden_size": 32, "aff_block_r": 2},
}
EXTRACTOR = {"feature_size": 16, "sampling_rate": 1000, "hop_length": 10, "max_length_s": 2, "fft_window_size": 64}
FRAMES = 201


def joined(vision: Any, text: Any) -> VisionTextDualEncoderConfig:
    config = vision(**VISION).to_dict(), text(**{**TEXT, "pad_token_id": PAD}).to_dict()
    return VisionTextDualEncoderConfig(vision_config=config[0], text_config=config[1], projection_dim=24)


CONFIGS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "clip": (CLIPModel, CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)),
    "clip-legacy": (
        CLIPModel,
        CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION, projection_dim=24),
    ),
    "siglip": (SiglipModel, SiglipConfig(text_config=TEXT, vision_config=VISION)),
    "clap": (ClapModel, ClapConfig(text_config=TEXT, audio_config=AUDIO, projection_dim=24)),
    "clap-fused": (
        ClapModel,
        ClapConfig(text_config=TEXT, audio_config={**AUDIO, "enable_fusion": True}, projection_dim=24),
    ),
    "vit-bert": (VisionTextDualEncoderModel, joined(ViTConfig, BertConfig)),
    "clip-roberta": (VisionTextDualEncoderModel, joined(CLIPVisionConfig, RobertaConfig)),
    "deit-xlm_roberta": (VisionTextDualEncoderModel, joined(DeiTConfig, XLMRobertaConfig)),
}


class Case(NamedTuple):
    name: str
    directory: Path
    reference: Any
    family: ModuleType
    model: Any


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, checkpoints: Path) -> Case:
    return opened(request.param, checkpoints)


@cache
def opened(name: str, checkpoints: Path) -> Case:
    """A checkpoint, as transformers reads it (with sdpa) and as its family does; nothing in a test may change it."""
    directory = checkpoints / name
    if not directory.is_dir():
        write(name, directory)
    family = find_family(directory)
    reference = CONFIGS[name][0].from_pretrained(directory, dtype=torch.float32).eval()
    return Case(name, directory, reference, family, read_model(family, directory))


def write(name: str, directory: Path) -> None:
    """FP16 weights, wide enough that every head counts, a tokenizer and a processor."""
    cls, config = CONFIGS[name]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    model.half().save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"w{BOS} $A w{end(name)}", special_tokens=[(f"w{i}", i) for i in (BOS, end(name))]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=f"w{PAD}").save_pretrained(directory)
    if "clap" in name:
        truncation = "fusion" if name == "clap-fused" else "rand_trunc"
        ClapFeatureExtractor(**EXTRACTOR, frequency_max=400, truncation=truncation).save_pretrained(directory)
    else:
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))


def end(name: str) -> int:
    """The id that ends a text: the legacy CLIP takes the largest id in it for that."""
    return LAST if name == "clip-legacy" else EOS


def texts(name: str) -> list[list[int]]:
    """Four lengths, up to the longest; ids over the one that ends a text, where the model lets them be."""
    rng = np.random.default_rng(1)
    lengths = (5, 3, 9, 20 if name.startswith(("clip", "siglip")) and "roberta" not in name else 18)
    return [[BOS, *rng.integers(51, LAST, n - 2).tolist(), end(name)] for n in lengths]


def padded(rows: list[list[int]], length: int = 0, pad: int = PAD) -> dict[str, torch.Tensor]:
    length = length or max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def media(case: Case, rows: int = 3) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    if "clap" in case.name:
        return {"input_features": torch.randn(rows, 1, FRAMES, 16, generator=rng)}
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=rng)}


@torch.inference_mode()
def run(family: ModuleType, model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All outputs by name; each component takes what it names."""
    return {
        c.outputs[0].name: c.module(**{p.name: tensors[p.name] for p in c.inputs}) for c in family.components(model)
    }


@torch.inference_mode()
def expected(case: Case, tensors: dict[str, torch.Tensor]) -> Any:
    """transformers' full model on the same tensors, in the form that its own processor gives them."""
    tensors = dict(tensors)
    if case.name == "siglip":
        del tensors["attention_mask"]
    if case.name == "clap-fused":
        tensors["input_features"] = tensors["input_features"].expand(-1, 4, -1, -1)
        tensors["is_longer"] = torch.ones(len(tensors["input_features"]), 1, dtype=torch.bool)
    return case.reference(**tensors)


def close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), atol=tolerance, rtol=0)


def test_components_are_what_the_full_model_computes(case: Case) -> None:
    tensors = {**media(case), **padded(texts(case.name), 20 if case.name == "siglip" else 0)}
    got, wanted = run(case.family, case.model, tensors), expected(case, tensors)
    medium = "audio" if "clap" in case.name else "image"
    assert set(got) == {f"{medium}_embeds", "text_embeds"}
    for name, value in got.items():
        close(value, wanted[name])
        assert torch.pdist(value).min() > 1e-3  # else all rows are alike, and any model would do
    output = case.family.program(case.model, case.directory)["output"]
    similarity = got[output["tensors"][medium]] @ got[output["tensors"]["text"]].T
    close(output["scale"] * similarity + output.get("bias", 0.0), wanted[f"logits_per_{medium}"], 1e-4)
    assert output["activation"] == ("sigmoid" if case.name == "siglip" else "softmax")


def test_fp16_weights_become_fp32_and_every_encoder_is_eager(case: Case) -> None:
    assert {p.dtype for p in case.model.parameters()} == {torch.float32}
    encoders = [m for m in case.model.modules() if isinstance(m, PreTrainedModel)]
    assert len(encoders) == 3 and {m.config._attn_implementation for m in encoders} == {"eager"}


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"siglip"}))
def test_padding_does_not_change_a_text(name: str, checkpoints: Path) -> None:
    case = opened(name, checkpoints)
    (component,) = (c for c in case.family.components(case.model) if c.name == "text_encoder")
    rows = texts(name)
    # OpenAI's CLIP pads with the token that ends the text.
    together = padded(rows, pad=EOS if name == "clip" else PAD)
    with torch.inference_mode():
        batch = component.module(**{p.name: together[p.name] for p in component.inputs})
        for row, embeds in zip(rows, batch, strict=True):
            alone = padded([row])
            close(component.module(**{p.name: alone[p.name] for p in component.inputs})[0], embeds)


def test_siglip_takes_texts_of_one_length(checkpoints: Path) -> None:
    case = opened("siglip", checkpoints)
    component = case.family.components(case.model)[1]
    assert [(p.name, p.shape) for p in component.inputs] == [("input_ids", ("batch", 20))]
    assert component.max_sizes == {"batch": 64}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes(name: str, checkpoints: Path) -> None:
    case = opened(name, checkpoints)
    for component in case.family.components(case.model):
        assert component.max_sizes.pop("batch") == 64
        if "tokens" in component.max_sizes:
            # RoBERTa's first position is behind that of its padding.
            assert component.max_sizes["tokens"] == (18 if "clap" in name or "roberta" in name else 20)
            assert component.high == {"input_ids": 99}


def thinned(case: Case) -> tuple[Any, Any]:
    """The model with heads and neurons removed, uneven by layer; and whole, with zeros where those were read."""
    pruned, zeroed = copy.deepcopy(case.model), copy.deepcopy(case.model)
    kept = [[0, 2], [1], [3, 1, 0], [2, 3]]
    blocks = [b for b in case.family.attentions(pruned) if b.q is not None]
    whole = [b for b in case.family.attentions(zeroed) if b.q is not None]
    for i, (block, full) in enumerate(zip(blocks, whole, strict=True)):
        block.keep(kept[i % 4])
        for head in set(range(full.heads)) - set(kept[i % 4]):
            full.o.weight.data[:, head * full.head_dim : (head + 1) * full.head_dim] = 0
    for i, (hidden, full) in enumerate(zip(hidden_units(pruned), hidden_units(zeroed), strict=True)):
        left = list(range(i % 3, full.units, 2 + i % 2))
        hidden.keep(left)
        matrix(full.reads)[:, [n for n in range(full.units) if n not in left]] = 0
    return pruned, zeroed


def test_removed_heads_are_heads_whose_output_is_nothing(case: Case, tmp_path: Path) -> None:
    pruned, zeroed = thinned(case)
    tensors = {**media(case), **padded(texts(case.name), 20 if case.name == "siglip" else 0)}
    got, whole = run(case.family, pruned, tensors), run(case.family, case.model, tensors)
    for name, value in run(case.family, zeroed, tensors).items():
        close(got[name], value)
        assert name == "audio_embeds" or (value - whole[name]).abs().max() > 0.01
    assert len(hidden_units(pruned)) == 4 + 2 * ("clap" in case.name) + (case.name == "siglip")
    heads = [b.heads for b in case.family.attentions(pruned) if b.q is not None]
    assert heads == [2, 1, 3, 2][: len(heads)]
    case.family.save(pruned, tmp_path, case.directory)
    for name, value in run(case.family, read_model(case.family, tmp_path), tensors).items():
        close(value, got[name], 0.0)


@pytest.mark.parametrize(
    "graph",
    [
        "clip/image",
        "clip/text",
        "clip-legacy/text",
        "siglip/image",
        "siglip/text",
        "clap-fused/audio",
        "clip-roberta/text",
    ],
)
def test_graphs_are_what_torch_computes(graph: str, checkpoints: Path, tmp_path: Path) -> None:
    """`check`: one row at the largest sizes, three at small ones. Two heads are gone from the first layers."""
    name, modality = graph.split("/")
    case = opened(name, checkpoints)
    model = copy.deepcopy(case.model)
    blocks = [b for b in case.family.attentions(model) if b.queries == modality]
    if blocks[0].q is not None:
        blocks[0].keep([1, 3])
    for i, hidden in enumerate(hidden_units(model)):
        hidden.keep(list(range(i, hidden.units, 2)))
    (component,) = (c for c in case.family.components(model) if c.name == f"{modality}_encoder")
    path = tmp_path / f"{component.name}.onnx"
    onnx_export(component, path, 18)
    check(component, path, 1e-4)
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert counts["Softmax"] == len(blocks)
    assert not counts.keys() & {"If", "Loop", "IsNaN"}


ATTENTION = {
    "clip": "text_model.encoder.layers.{}.self_attn vision_model.encoder.layers.{}.self_attn",
    "siglip": "text_model.encoder.layers.{}.self_attn vision_model.encoder.layers.{}.self_attn",
    "clap": "text_model.encoder.layer.{}.attention",
    "vit-bert": "vision_model.layers.{}.attention text_model.encoder.layer.{}.attention",
}
NOT_PRUNABLE = {
    "siglip": [("vision_model.head.attention", "image", 4, 8)],
    "clap": [
        (f"audio_model.audio_encoder.layers.{stage}.blocks.{i}.attention", "audio", 2 << stage, 16)
        for stage in range(2)
        for i in range(2)
    ],
}


@pytest.mark.parametrize("name", ATTENTION)
def test_every_attention_layer_is_listed(name: str, checkpoints: Path) -> None:
    case = opened(name, checkpoints)
    blocks = case.family.attentions(case.model)
    assert {(b.kind, b.queries == b.keys) for b in blocks} == {("self", True)}
    modalities = {"text": "text", "vision": "image"}
    wanted = [
        (layer.format(i), modalities[layer.partition("_")[0]], 4, 8)
        for layer in ATTENTION[name].split()
        for i in range(2)
    ]
    assert [(b.name, b.queries, b.heads, b.head_dim) for b in blocks if b.q is not None] == wanted
    assert [(b.name, b.queries, b.heads, b.head_dim) for b in blocks if b.q is None] == NOT_PRUNABLE.get(name, [])


def picture() -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def sound() -> bytes:
    samples = np.random.default_rng(4).integers(-9999, 9999, 1500).astype("<i2")
    with wave.open(file := io.BytesIO(), "wb") as out:
        out.setparams((1, 2, 1000, len(samples), "NONE", ""))
        out.writeframes(samples.tobytes())
    return file.getvalue()


def test_a_session_answers(case: Case) -> None:
    """Files in, embeddings out, by the program alone; the full model on the same tensors says the same."""
    session = open_fp32(case.family, case.model, case.directory)
    given = {"audio": sound()} if "clap" in case.name else {"image": picture()}
    query = Query(text="w7 w60 w9", **given)
    tensors = {name: torch.from_numpy(value) for name, value in session.tensors(query).items()}
    ids = [BOS, 7, 60, 9, end(case.name)]
    assert tensors["input_ids"].tolist() == [ids + [PAD] * 15 if case.name == "siglip" else ids]
    tensors.setdefault("attention_mask", torch.ones_like(tensors["input_ids"]))
    wanted = expected(case, tensors)
    answer = session.answer(query)
    for name, value in answer.outputs.items():
        close(value, wanted[name][0])
    if case.name == "siglip":
        assert answer.probability == pytest.approx(wanted.logits_per_image.sigmoid().item(), abs=1e-4)
    else:
        assert answer.probability is None
    (only_text,) = session.run_many([Query(text="w7")])
    assert set(only_text.outputs) == {"text_embeds"}


def changed(case: Case, directory: Path, file: str, **values: Any) -> Path:
    """A copy of the checkpoint whose JSON `file` has other values."""
    shutil.copytree(case.directory, directory)
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return directory


@pytest.mark.parametrize(
    ("name", "file", "values", "message"),
    [
        ("clip", "config.json", {"architectures": ["CLIPForImageClassification"]}, "'CLIPForImageClassification'"),
        ("siglip", "config.json", {"architectures": None}, "'\\(none\\)' is not known"),
        ("siglip", "config.json", {"vision_config": {**VISION, "vision_use_head": False}}, "head"),
        ("siglip", "config.json", {"model_type": "siglip2"}, "model_type 'siglip2' is not known"),
        ("vit-bert", "config.json", {"vision_config": {"model_type": "swin"}}, "vision_config has model_type 'swin'"),
        ("vit-bert", "config.json", {"text_config": None}, "text_config has model_type None"),
        ("clap", "preprocessor_config.json", {"feature_size": 17}, "spectrograms of 201 x 17"),
        ("clap", "preprocessor_config.json", {"max_length_s": 3}, "spectrograms of 301 x 16"),
        ("clap", "preprocessor_config.json", {"padding": "repeat"}, "padding 'repeat'"),
    ],
)
def test_what_is_not_known_is_named(
    name: str, file: str, values: dict[str, Any], message: str, checkpoints: Path, tmp_path: Path
) -> None:
    directory = changed(opened(name, checkpoints), tmp_path / "model", file, **values)
    with pytest.raises(InputError, match=message):
        read_model(find_family(directory), directory)


def test_clap_without_its_feature_extractor(checkpoints: Path, tmp_path: Path) -> None:
    case = opened("clap", checkpoints)
    shutil.copytree(case.directory, directory := tmp_path / "model")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"cannot read preprocessor_config\.json"):
        read_model(case.family, directory)
