"""What dual encoders share: towers `vision_model`, `text_model`, `audio_model`, whose projected outputs are compared.

They are read with eager attention: its MatMul, Softmax, MatMul is what OpenVINO and ONNX Runtime fuse. Of sdpa the
exporter makes a third more nodes, and an IsNaN that OpenVINO does not fuse where there is a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertAttention
from transformers.models.clap.modeling_clap import ClapAudioAttention, ClapTextAttention
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.deit.modeling_deit import DeiTAttention
from transformers.models.roberta.modeling_roberta import RobertaAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaAttention

from edgemm.models import AttentionBlock, Component, Tensor
from edgemm.models._attentions import bert_attention, vit_attention
from edgemm.models._decoder import bart_attention
from edgemm.models._key_tokens import TokenLayer, class_token_layers

EAGER: dict[str, Any] = {"attn_implementation": "eager"}
MAX_BATCH = 64


class Tower(nn.Module):
    """An encoder of one modality and its projection -> float32[B,D] of unit length."""

    def __init__(self, model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.model, self.projection = model, projection

    def embed(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        embeds = self.projection(self.model(**inputs).pooler_output)
        return embeds / embeds.norm(dim=-1, keepdim=True)


class ImageTower(Tower):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.embed(pixel_values=pixel_values)


class TextTower(Tower):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if attention_mask is not None:
            # What transformers makes of it, but [B,1,1,T] and not [B,1,T,T], and without its index arithmetic.
            tokens = attention_mask[:, None, None, :] == 1
            attention_mask = torch.where(tokens, 0.0, torch.finfo(torch.float32).min)
        return self.embed(input_ids=input_ids, attention_mask=attention_mask)


def image_encoder(model: Any, width: int) -> Component:
    """pixel_values float32[B,3,H,W] -> image_embeds float32[B,`width`]."""
    size = model.config.vision_config.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    pixels = Tensor("pixel_values", "float32", ("batch", 3, *sides))
    tower = ImageTower(model.vision_model, getattr(model, "visual_projection", nn.Identity()))
    embeds = Tensor("image_embeds", "float32", ("batch", width))
    return Component("image_encoder", tower, (pixels,), (embeds,), {"batch": MAX_BATCH})


def text_encoder(model: Any, width: int, tokens: int, *, mask: bool = False, fixed: bool = False) -> Component:
    """input_ids (and attention_mask) int64[B,T] -> text_embeds float32[B,`width`]; T up to `tokens`, or `fixed`."""
    shape = ("batch", tokens if fixed else "tokens")
    names = ("input_ids", "attention_mask") if mask else ("input_ids",)
    return Component(
        "text_encoder",
        TextTower(model.text_model, getattr(model, "text_projection", nn.Identity())),
        tuple(Tensor(name, "int64", shape) for name in names),
        (Tensor("text_embeds", "float32", ("batch", width)),),
        {"batch": MAX_BATCH} if fixed else {"batch": MAX_BATCH, "tokens": tokens},
        {"input_ids": model.config.text_config.vocab_size},
    )


def output(modality: str, scale: torch.Tensor, bias: float = 0.0, activation: str = "softmax") -> dict[str, Any]:
    """program.json's `output` of an encoder of `modality` and one of texts."""
    return {
        "kind": "embeddings",
        "tensors": {modality: f"{modality}_embeds", "text": "text_embeds"},
        "scale": scale.exp().item(),
        "bias": bias,
        "activation": activation,
    }


def max_tokens(text: Any) -> int:
    """Longest text in tokens by its config: RoBERTa and its kin count positions from pad_token_id + 1."""
    taken = 0 if text.model_type == "bert" else text.pad_token_id + 1
    return int(text.max_position_embeddings) - taken


def attentions(model: Any) -> list[AttentionBlock]:
    """Every attention layer of a dual encoder, or of a BERT or ViT that stands alone."""
    return [block for name, module in model.named_modules() if (block := _attention(name, module))]


def _attention(name: str, module: Any) -> AttentionBlock | None:
    """Two kinds are listed and not pruned: q, k and v in one matrix, and a table of positions with a column a head."""
    if isinstance(module, (CLIPAttention, SiglipAttention)):
        modality = "text" if name.startswith("text_model.") else "image"
        return bart_attention(name, module, modality, modality)
    if isinstance(module, (ViTAttention, DeiTAttention)):
        return vit_attention(name, module)
    if isinstance(module, (BertAttention, RobertaAttention, XLMRobertaAttention, ClapTextAttention)):
        return bert_attention(name, module.self, module.output, "self", "text", "text")
    if isinstance(module, nn.MultiheadAttention):
        return AttentionBlock(name, "self", "image", "image", module.num_heads, module.head_dim)
    if isinstance(module, ClapAudioAttention):
        sizes = module.self.num_attention_heads, module.self.attention_head_size
        return AttentionBlock(name, "self", "audio", "audio", *sizes)
    return None


def token_layers(model: Any) -> list[TokenLayer]:
    """Layers of an image encoder of CLIP's or ViT's build, whose class token chooses; none of other builds."""
    blocks = {block.name: block for block in attentions(model)}
    config = getattr(model.config, "vision_config", model.config)
    found: list[tuple[str, nn.Module, nn.Module, AttentionBlock]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, CLIPEncoderLayer) and not name.startswith("text_model."):
            part, norm = "self_attn", layer.layer_norm1
        elif isinstance(layer, ViTLayer):
            part, norm = "attention", layer.layernorm_before
        else:
            continue
        found.append((name, layer, norm, blocks[f"{name}.{part}"]))
    return class_token_layers(found, (config.image_size // config.patch_size) ** 2) if found else []
