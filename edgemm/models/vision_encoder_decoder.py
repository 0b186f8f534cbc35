"""Images to text by an image encoder and a text decoder: TrOCR (https://arxiv.org/abs/2109.10282), ViT-GPT2.

Components: image_encoder (which makes the keys and values of the cross-attention, too) and decoder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import VisionEncoderDecoderModel
from transformers.models.deit.modeling_deit import DeiTAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.trocr.modeling_trocr import TrOCRAttention
from transformers.models.vit.modeling_vit import ViTAttention

from edgemm.errors import InputError
from edgemm.models import AttentionBlock, Component, Tensor, _transformers
from edgemm.models._attentions import vit_attention
from edgemm.models._decoder import (
    MAX_BATCH,
    BartKeys,
    BartLayer,
    Pair,
    Settings,
    attend,
    bart_attention,
    cache_ports,
    decoder,
    heads,
    read_settings,
)
from edgemm.models._encoders import drop_pooler
from edgemm.models._processors import image_spec

ENCODERS = ("deit", "vit")
DECODERS = ("gpt2", "trocr")


CLASSES = {"VisionEncoderDecoderModel": VisionEncoderDecoderModel}


class ImageEncoder(nn.Module):
    """pixel_values float32[B,3,H,W] -> key and value of each cross-attention."""

    def __init__(self, model: Any, keys: list[nn.Module]) -> None:
        super().__init__()
        self.encoder, self.cross = model.encoder, nn.ModuleList(keys)
        self.projection = getattr(model, "enc_to_dec_proj", nn.Identity())

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = self.projection(self.encoder(pixel_values).last_hidden_state)
        return tuple(tensor for keys in self.cross for tensor in keys(states))


class TrOCREmbed(nn.Module):
    """Ids and positions -> states; TrOCR counts positions from behind the padding's id."""

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.tokens, self.norm = parts.embed_tokens, parts.layernorm_embedding or nn.Identity()
        self.learned = parts.config.use_learned_position_embeddings
        self.padding = parts.padding_idx
        positions = parts.embed_positions
        if self.learned:
            self.table, self.offset = positions.weight, positions.offset
        else:  # made here, since the module's own table is no weight, and is not there after from_pretrained
            rows = parts.config.max_position_embeddings + self.padding + 1
            table = positions.get_embedding(rows, positions.embedding_dim, self.padding)
            self.register_buffer("table", table, persistent=False)
            self.offset = self.padding + 1

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = positions + self.offset
        if not self.learned:
            rows = torch.where(ids == self.padding, self.padding, rows)
        return self.norm(self.tokens(ids) + nn.functional.embedding(rows, self.table))


class GPT2Embed(nn.Module):
    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.wte, self.wpe = parts.wte, parts.wpe

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.wte(ids) + self.wpe(positions)


class GPT2Keys(nn.Module):
    """Encoder states [B,K,D] -> key and value [B,H,K,d] of one cross-attention."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.c_attn, self.head_dim = attention.c_attn, attention.head_dim

    def forward(self, states: torch.Tensor) -> Pair:
        key, value = self.c_attn(states).chunk(2, -1)
        return heads(key, self.head_dim), heads(value, self.head_dim)


class GPT2Layer(nn.Module):
    """A GPT-2 block with cross-attention; see CachedDecoder."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, past: Pair, cross: Pair | None, cross_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block, own, other = self.block, self.block.attn, self.block.crossattention
        query, key, value = (heads(x, own.head_dim) for x in own.c_attn(block.ln_1(states)).chunk(3, -1))
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        states = states + own.c_proj(attend(query * own.scaling, key, value, mask))
        query = heads(other.q_attn(block.ln_cross_attn(states)), other.head_dim)
        assert cross  # q, k and v of GPT-2 are one matrix: its heads stay
        states = states + other.c_proj(attend(query * other.scaling, *cross, cross_mask))
        return states + block.mlp(block.ln_2(states)), key, value


def load(directory: Path) -> Any:
    cls = _transformers.choose(directory, CLASSES)
    config = _transformers.read_json(directory, "config.json")
    for part, known in (("encoder", ENCODERS), ("decoder", DECODERS)):
        if (found := (config.get(part) or {}).get("model_type")) not in known:
            raise InputError(
                f"{directory}: {part} model_type {found!r} is not known",
                fix=f"known {part}s: {', '.join(known)}; any other model goes in as an .onnx file "
                "(edgemm compress model.onnx) or as a Python factory (edgemm compress package.module:factory)",
            )
    return _transformers.load(
        directory,
        cls,
        attentions,
        lambda model: drop_pooler(model.encoder),
        unread="encoder.pooler.",
        attn_implementation="eager",
    )


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    image, text = model.config.encoder, model.config.decoder
    embed: nn.Module
    layers: list[nn.Module]
    keys: list[nn.Module]
    if text.model_type == "trocr":
        parts = model.decoder.model.decoder
        blocks = parts.layers
        own, cross = [b.self_attn for b in blocks], [b.encoder_attn for b in blocks]
        embed, head = TrOCREmbed(parts), model.decoder.output_projection
        layers, keys = (
            [BartLayer(b, normalize_first=False) for b in blocks],
            [BartKeys(a) for a in cross if a.num_heads],
        )
    else:
        parts = model.decoder.transformer
        blocks = parts.h
        own, cross = [b.attn for b in blocks], [b.crossattention for b in blocks]
        embed, head = GPT2Embed(parts), nn.Sequential(parts.ln_f, model.decoder.lm_head)
        layers, keys = [GPT2Layer(b) for b in blocks], [GPT2Keys(a) for a in cross]
    own_sizes, cross_sizes = ([(a.num_heads, a.head_dim) for a in attention] for attention in (own, cross))
    size = image.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = Tensor("pixel_values", "float32", ("batch", image.num_channels, height, width))
    made = cache_ports("cross", cross_sizes, model.encoder.embeddings.position_embeddings.shape[1])
    return [
        Component("image_encoder", ImageEncoder(model, keys).eval(), (pixels,), made, {"batch": MAX_BATCH}),
        decoder(
            embed,
            layers,
            head,
            own_sizes,
            made,
            vocabulary=text.vocab_size,
            positions=text.max_position_embeddings,
        ),
    ]


def attentions(model: Any) -> list[AttentionBlock]:
    """Every attention layer, in the order they run. GPT-2's q, k and v are one matrix: listed and not pruned."""
    blocks = []
    for name, module in model.named_modules():
        if isinstance(module, (ViTAttention, DeiTAttention)):
            blocks.append(vit_attention(name, module))
        elif isinstance(module, TrOCRAttention):
            blocks.append(bart_attention(name, module, "text", "image" if name.endswith("encoder_attn") else "text"))
        elif isinstance(module, GPT2Attention):
            block = partial(AttentionBlock, name, heads=module.num_heads, head_dim=module.head_dim, queries="text")
            blocks.append(
                block(kind="cross", keys="image") if module.is_cross_attention else block(kind="self", keys="text")
            )
    return blocks


def program(model: Any, directory: Path) -> dict[str, Any]:
    """An image to text, as transformers' generate makes it."""
    settings: Settings = read_settings(model, directory)
    prompt = [settings.start]
    decoder = model.decoder
    layers = decoder.model.decoder.layers if hasattr(decoder, "model") else decoder.transformer.h
    return {
        "image": image_spec(directory, "pixel_values"),
        "output": settings.generation(len(layers), prompt, settings.new_tokens(prompt)),
    }
