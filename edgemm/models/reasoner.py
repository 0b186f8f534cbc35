"""The reference multimodal reasoning model (edgemm/reasoner/) as a model family."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers.models.bert.modeling_bert import BertAttention, BertSelfAttention

from edgemm.data import Sample
from edgemm.models import AttentionBlock, Component
from edgemm.models import Tensor as Spec
from edgemm.reasoner.corpus import MEAN, STD
from edgemm.reasoner.model import Attention, Reasoner, ReasonerConfig
from edgemm.runtime.preprocess import image_to_pixels

IMAGES_PER_BATCH = 16


def load(directory: Path) -> Reasoner:
    """The model of config.json and model.safetensors (any float width), its heads as the config says."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model = Reasoner(ReasonerConfig.from_dict(config)).eval()
    for block in attentions(model):
        if (heads := config.get("pruned_heads", {}).get(block.name)) is not None:
            block.keep(list(range(heads)))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def save(model: Reasoner, directory: Path, tokenizer: Path, *, half: bool = False) -> None:
    """Write config.json, model.safetensors and tokenizer.json."""
    directory.mkdir(parents=True, exist_ok=True)
    pruned = {b.name: b.heads for b in attentions(model) if b.heads != model.config.heads}
    config = {"model_type": "reasoner", **model.config.to_dict(), "pruned_heads": pruned}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {n: t.half() if half and t.is_floating_point() else t for n, t in model.state_dict().items()}
    save_file({n: t.contiguous() for n, t in weights.items()}, directory / "model.safetensors")
    shutil.copyfile(tokenizer, directory / "tokenizer.json")


def components(model: Reasoner) -> list[Component]:
    config = model.config
    side = config.image_size // config.image_stride
    sizes = {"batch": 64, "tokens": config.max_tokens}
    mask = Spec("attention_mask", "int64", ("batch", "tokens"))
    text = Spec("text_tokens", "float32", ("batch", "tokens", config.width))
    image = Spec("image_tokens", "float32", ("batch", side * side, config.width))
    pixels = Spec("pixel_values", "float32", ("batch", 3, config.image_size, config.image_size))
    ids = Spec("input_ids", "int64", ("batch", "tokens"))
    logits = Spec("logits", "float32", ("batch", len(config.answers)))
    return [
        Component("image_encoder", model.image_encoder, (pixels,), (image,), sizes),
        Component("text_encoder", model.text_encoder, (ids, mask), (text,), sizes),
        Component("fusion", model.fusion, (text, mask, image), (logits,), sizes),
    ]


def attentions(model: Reasoner) -> list[AttentionBlock]:
    """Every multi-head attention, in the order they run."""
    blocks = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            linears = module.q_proj, module.k_proj, module.v_proj, module.o_proj
            sizes, resize = (module.heads, module.head_dim), partial(_resize, module)
            if name.endswith("cross_attention"):
                blocks.append(AttentionBlock(name, "cross", "text", "image", *sizes, *linears, resize))
            else:
                blocks.append(AttentionBlock(name, "self", "text", "text", *sizes, *linears, resize))
        elif isinstance(module, BertAttention):
            inner = module.self
            linears = inner.query, inner.key, inner.value, module.output.dense
            sizes, resize = (inner.num_attention_heads, inner.attention_head_size), partial(_resize_bert, inner)
            blocks.append(AttentionBlock(name, "self", "text", "text", *sizes, *linears, resize))
    return sorted(blocks, key=lambda b: b.name.startswith("fusion"))


def _resize(module: Attention, heads: int) -> None:
    module.heads = heads


def _resize_bert(module: BertSelfAttention, heads: int) -> None:
    module.num_attention_heads, module.all_head_size = heads, heads * module.attention_head_size


def program(model: Reasoner) -> dict[str, Any]:
    """How the runtime turns files into tensors and logits into an answer."""
    config = model.config
    return {
        "image": {
            "tensor": "pixel_values",
            "size": [config.image_size, config.image_size],
            "resample": "bilinear",
            "mean": list(MEAN),
            "std": list(STD),
        },
        "text": {
            "ids": "input_ids",
            "mask": "attention_mask",
            "tokenizer": "tokenizer.json",
            "max_tokens": config.max_tokens,
        },
        "output": {"tensor": "logits", "labels": list(config.answers)},
    }


@torch.inference_mode()
def predict(model: Reasoner, directory: Path, samples: list[Sample]) -> NDArray[np.float32]:
    """FP32 logits [samples, A]; each image is encoded, and its keys projected, once for all its questions."""
    image_data = program(model)["image"]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encoded = [e.ids for e in tokenizer.encode_batch([s.text for s in samples])]
    # Images with equally many questions of equal lengths go together: no padding, so no mask to add.
    rows: dict[Path, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        rows[sample.image].append(i)
    alike: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for indices in rows.values():
        by_length: dict[int, list[int]] = defaultdict(list)
        for i in indices:
            by_length[len(encoded[i])].append(i)
        for length, group in by_length.items():
            alike[len(group), length].append(group)

    logits = np.empty((len(samples), len(model.config.answers)), np.float32)
    tokens: dict[Path, torch.Tensor] = {}
    paths = list(rows)
    for start in range(0, len(paths), IMAGES_PER_BATCH):
        batch = paths[start : start + IMAGES_PER_BATCH]
        pixels = torch.from_numpy(np.concatenate([image_to_pixels(p, image_data) for p in batch]))
        tokens.update(zip(batch, model.image_encoder(pixels), strict=True))
    for groups in alike.values():
        for start in range(0, len(groups), IMAGES_PER_BATCH):
            part = groups[start : start + IMAGES_PER_BATCH]
            indices = [i for group in part for i in group]
            ids = torch.tensor([encoded[i] for i in indices])
            mask = torch.ones_like(ids)
            image = torch.stack([tokens[samples[group[0]].image] for group in part])
            logits[indices] = model.fusion(model.text_encoder(ids, mask), mask, image).numpy()
    return logits
