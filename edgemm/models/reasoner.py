"""The reference multimodal reasoning model (edgemm/reasoner/) as a model family."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.models.bert.modeling_bert import BertAttention

from edgemm.models import AttentionBlock, Component
from edgemm.models import Tensor as Spec
from edgemm.models._attentions import bert_attention
from edgemm.models._blocks import stacks
from edgemm.models._hidden_units import hidden_units
from edgemm.models._key_tokens import KeyTokens, TokenLayer, restore, specs
from edgemm.reasoner.corpus import MEAN, STD
from edgemm.reasoner.model import Attention, Reasoner, ReasonerConfig
from edgemm.runtime.preprocess import read_tokenizer


def load(directory: Path) -> Reasoner:
    """The model of config.json and model.safetensors (any float width), pruned as the config says."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    read_tokenizer((directory / "tokenizer.json").read_bytes(), str(directory / "tokenizer.json"))
    model = Reasoner(ReasonerConfig.from_dict(config)).eval()
    for stack in stacks(model):
        if (blocks := config.get("blocks", {}).get(stack.name)) is not None:
            stack.keep(list(range(blocks)))
    for block in attentions(model):
        if (heads := config.get("pruned_heads", {}).get(block.name)) is not None:
            block.keep(list(range(heads)))
    for hidden in hidden_units(model):
        if (units := config.get("hidden_units", {}).get(hidden.name)) is not None:
            hidden.keep(list(range(units)))
    restore(token_layers(model), config.get("key_tokens", {}))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def save(model: Reasoner, directory: Path, source: Path, *, half: bool = False) -> None:
    """Write config.json, model.safetensors, and the tokenizer.json of `source`."""
    directory.mkdir(parents=True, exist_ok=True)
    pruned = {b.name: b.heads for b in attentions(model) if b.heads != model.config.heads}
    units = {h.name: h.units for h in hidden_units(model)}
    built = {"fusion.layers": model.config.fusion_layers, "text_encoder.bert.encoder.layer": model.config.text_layers}
    blocks = {s.name: len(s.layers) for s in stacks(model) if len(s.layers) != built[s.name]}
    left: dict[str, Any] = {"blocks": blocks, "pruned_heads": pruned, "hidden_units": units}
    if tokens := specs(token_layers(model)):
        left |= {"key_tokens": tokens}
    config = {"model_type": "reasoner", **model.config.to_dict(), **left}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {n: t.half() if half and t.is_floating_point() else t for n, t in model.state_dict().items()}
    save_file({n: t.contiguous() for n, t in weights.items()}, directory / "model.safetensors")
    shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")


def components(model: Reasoner) -> list[Component]:
    config = model.config
    sizes = {"batch": 64, "tokens": config.max_tokens}
    mask = Spec("attention_mask", "int64", ("batch", "tokens"))
    text = Spec("text_tokens", "float32", ("batch", "tokens", config.width))
    image = Spec("image_tokens", "float32", ("batch", image_tokens(config), config.width))
    pixels = Spec("pixel_values", "float32", ("batch", 3, config.image_size, config.image_size))
    ids = Spec("input_ids", "int64", ("batch", "tokens"))
    logits = Spec("logits", "float32", ("batch", len(config.answers)))
    return [
        Component("image_encoder", model.image_encoder, (pixels,), (image,), sizes),
        Component("text_encoder", model.text_encoder, (ids, mask), (text,), sizes, {"input_ids": config.vocab_size}),
        Component("fusion", model.fusion, (text, mask, image), (logits,), sizes),
    ]


def attentions(model: Reasoner) -> list[AttentionBlock]:
    """Every multi-head attention, in the order they run."""
    blocks = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            linears = module.q_proj, module.k_proj, module.v_proj, module.o_proj
            sizes, resize = (module.heads, module.head_dim), partial(setattr, module, "heads")
            if name.endswith("cross_attention"):
                blocks.append(AttentionBlock(name, "cross", "text", "image", *sizes, *linears, resize))
            else:
                blocks.append(AttentionBlock(name, "self", "text", "text", *sizes, *linears, resize))
        elif isinstance(module, BertAttention):
            blocks.append(bert_attention(name, module.self, module.output, "self", "text", "text"))
    return sorted(blocks, key=lambda b: b.name.startswith("fusion"))


def image_tokens(config: ReasonerConfig) -> int:
    return (config.image_size // config.image_stride) ** 2


def token_layers(model: Reasoner) -> list[TokenLayer]:
    """Layers of the fusion; the question, as it looks at the image there, chooses."""
    cross = [b for b in attentions(model) if b.kind == "cross"]
    return [
        TokenLayer(
            block.name.removesuffix(".cross_attention"),
            image_tokens(model.config),
            block,
            layer.key_tokens if isinstance(layer.key_tokens, KeyTokens) else None,
            partial(setattr, layer, "key_tokens"),
        )
        for block, layer in zip(cross, model.fusion.layers, strict=True)
    ]


def program(model: Reasoner, directory: Path) -> dict[str, Any]:
    """How the runtime turns files into tensors and logits into an answer."""
    del directory
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
        "output": {"kind": "labels", "tensor": "logits", "labels": list(config.answers)},
    }
