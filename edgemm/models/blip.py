"""BLIP (Li et al. 2022): question answering, captioning and image-text retrieval.

Its generate() hears no generation_config.json: text is made greedily from bos to sep, and a caption goes on from a
text where there is one. What pads a question is hidden from the answer too, as in training; generate() shows it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextAttention

from edgemm.models import AttentionBlock, Component, _transformers
from edgemm.models import Tensor as Port
from edgemm.models._attentions import bert_attention, vit_attention
from edgemm.models._decoder import (
    DEFAULT_NEW_TOKENS,
    HIDDEN,
    MAX_BATCH,
    CachedDecoder,
    Pair,
    Settings,
    attend,
    cache_ports,
    cached_cross,
    causal,
    decoder,
    heads,
)
from edgemm.models._processors import image_spec, text_spec

CLASSES = {c.__name__: c for c in (BlipForQuestionAnswering, BlipForConditionalGeneration, BlipForImageTextRetrieval)}


class ImageAttention(nn.Module):
    """BlipAttention whose q, k and v are layers of their own and not one matrix, so that heads can leave."""

    def __init__(self, fused: BlipAttention) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim = fused.num_heads, fused.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(fused.embed_dim, fused.embed_dim) for _ in range(3))
        for i, linear in enumerate((self.q_proj, self.k_proj, self.v_proj)):
            linear.weight = nn.Parameter(fused.qkv.weight.detach().chunk(3)[i].clone())
            linear.bias = nn.Parameter(fused.qkv.bias.detach().chunk(3)[i].clone())
        self.o_proj = fused.projection

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        query, key, value = (heads(of(hidden_states), self.head_dim) for of in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(query * self.head_dim**-0.5, key, value, None)), None


def split(model: nn.Module) -> None:
    """Put ImageAttention in the place of each BlipAttention."""
    for module in [*model.modules()]:
        if isinstance(own := getattr(module, "self_attn", None), BlipAttention):
            module.self_attn = ImageAttention(own)


class ImageEncoder(nn.Module):
    """-> image_tokens float32[B,P,D] and, with a projection, image_embeds float32[B,E] of unit length."""

    def __init__(self, vision: nn.Module, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.vision, self.projection = vision, projection

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        tokens = self.vision(pixel_values).last_hidden_state
        return (tokens, F.normalize(self.projection(tokens[:, 0]), dim=-1)) if self.projection else tokens


class TextLayer(nn.Module):
    """A layer of the text encoder, which may have no head left that looks at the image."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, states: Tensor, mask: Tensor, image_tokens: Tensor | None) -> Tensor:
        layer = self.layer
        if image_tokens is None or layer.crossattention.self.num_attention_heads:
            return layer(states, image_tokens, attention_mask=mask)
        states, _ = layer.attention(states, attention_mask=mask)
        return layer.feed_forward_chunk(unlinked(layer.crossattention, states))


class TextEncoder(nn.Module):
    """BERT, whose layers attend to the image where it is given -> float32[B,T,D], or what `head` makes of a text."""

    def __init__(self, text: Any, head: nn.Linear | None = None, *, normalize: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(layer) for layer in text.encoder.layer)
        self.embeddings, self.head, self.normalize = text.embeddings, head, normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        states, mask = self.embeddings(input_ids), padding(attention_mask)
        for layer in self.layers:
            states = layer(states, mask, image_tokens)
        if self.head is None:
            return states
        out: Tensor = self.head(states[:, 0])
        return F.normalize(out, dim=-1) if self.normalize else out


class CrossCache(nn.Module):
    """Keys and values of the decoder layers' cross-attentions, float32[B,H,K,d]: the same for the whole text."""

    def __init__(self, text_decoder: Any) -> None:
        super().__init__()
        self.attentions: Any = nn.ModuleList(layer.crossattention.self for layer in text_decoder.bert.encoder.layer)

    def forward(self, image_tokens: Any = None, question_states: Any = None) -> tuple[Tensor, ...]:
        states = image_tokens if question_states is None else question_states
        left = [a for a in self.attentions if a.num_attention_heads]
        return tuple(heads(of(states), a.attention_head_size) for a in left for of in (a.key, a.value))


class DecoderLayer(nn.Module):
    """A layer of the text decoder on cached keys and values; see CachedDecoder."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, states: Tensor, mask: Tensor, past: Pair, cross: Pair | None, cross_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer, own, other = self.layer, self.layer.attention.self, self.layer.crossattention.self
        size = own.attention_head_size
        key = torch.cat([past[0], heads(own.key(states), size)], 2)
        value = torch.cat([past[1], heads(own.value(states), size)], 2)
        query = heads(own.query(states) * size**-0.5, size)
        states = layer.attention.output(attend(query, key, value, mask), states)
        if cross is None:
            states = unlinked(layer.crossattention, states)
        else:
            query = heads(other.query(states) * size**-0.5, size)
            states = layer.crossattention.output(attend(query, *cross, cross_mask), states)
        return layer.feed_forward_chunk(states), key, value


class Decoder(CachedDecoder):
    """The text decoder; `attention_mask` hides what pads the question."""

    def decode(
        self,
        decoder_input_ids: Tensor,
        position_ids: Tensor,
        decoder_attention_mask: Tensor,
        attention_mask: Tensor | None = None,
        **cache: Tensor,
    ) -> tuple[Tensor, ...]:
        states = self.embed(decoder_input_ids, position_ids)
        mask = causal(decoder_attention_mask, cache["past_key_0"].shape[2], decoder_input_ids.shape[1])
        cross_mask = None if attention_mask is None else padding(attention_mask)
        present = []
        for i, layer in enumerate(self.layers):
            past, cross = (cache[f"past_key_{i}"], cache[f"past_value_{i}"]), cached_cross(cache, i)
            states, key, value = layer(states, mask, past, cross, cross_mask)
            present += [key, value]
        return self.head(states[:, -1]), *present


def unlinked(attention: Any, states: Tensor) -> Tensor:
    """What an attention without heads makes: its output's bias is left."""
    output = attention.output
    return output.LayerNorm(output.dense.bias + states)


def padding(mask: Tensor) -> Tensor:
    """int64[B,K], 0 at padding -> float32[B,1,1,K] to add to scores."""
    return (1.0 - mask[:, None, None].float()) * HIDDEN


def load(directory: Path) -> Any:
    return _transformers.load(directory, _transformers.choose(directory, CLASSES), attentions, split)


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    vision, text = model.config.vision_config, model.config.text_config
    sizes, high = {"batch": MAX_BATCH, "words": text.max_position_embeddings}, {"input_ids": text.vocab_size}
    pixels = Port("pixel_values", "float32", ("batch", 3, vision.image_size, vision.image_size))
    places = 1 + (vision.image_size // vision.patch_size) ** 2
    image = Port("image_tokens", "float32", ("batch", places, vision.hidden_size))
    ids, mask = (Port(name, "int64", ("batch", "words")) for name in ("input_ids", "attention_mask"))
    if isinstance(model, BlipForImageTextRetrieval):
        width = model.config.image_text_hidden_size
        image_embeds, text_embeds = (Port(f"{m}_embeds", "float32", ("batch", width)) for m in ("image", "text"))
        match, matcher = Port("match_logits", "float32", ("batch", 2)), TextEncoder(model.text_encoder, model.itm_head)
        image_encoder = ImageEncoder(model.vision_model, model.vision_proj)
        text_encoder = TextEncoder(model.text_encoder, model.text_proj, normalize=True)
        return [
            Component("image_encoder", image_encoder, (pixels,), (image, image_embeds), sizes),
            Component("text_encoder", text_encoder, (ids, mask), (text_embeds,), sizes, high),
            Component("fusion", matcher, (ids, mask, image), (match,), sizes, high),
        ]
    encoder = Component("image_encoder", ImageEncoder(model.vision_model), (pixels,), (image,), sizes)
    if isinstance(model, BlipForConditionalGeneration):
        return [encoder, *_generation(model.text_decoder, image)]
    question = Port("question_states", "float32", ("batch", "words", text.hidden_size))
    fusion = Component("fusion", TextEncoder(model.text_encoder), (ids, mask, image), (question,), sizes, high)
    return [encoder, fusion, *_generation(model.text_decoder, question, mask)]


def _generation(text_decoder: Any, states: Port, *masks: Port) -> list[Component]:
    """cross_cache and decoder, which tells of `states`."""
    config, cache = text_decoder.config, CrossCache(text_decoder)
    blocks, embed, head = text_decoder.bert.encoder.layer, text_decoder.bert.embeddings, text_decoder.cls
    layers: list[nn.Module] = [DecoderLayer(layer) for layer in blocks]
    own, other = (
        [(a.num_attention_heads, a.attention_head_size) for a in attentions]
        for attentions in ([layer.attention.self for layer in blocks], cache.attentions)
    )
    cross, most = cache_ports("cross", other, states.shape[1]), config.max_position_embeddings
    plain = decoder(embed, layers, head, own, (*masks, *cross), vocabulary=config.vocab_size, positions=most)
    module = Decoder(embed, layers, head, [port.name for port in plain.inputs])
    sizes = {**plain.max_sizes, "words": most}
    return [Component("cross_cache", cache, (states,), cross, sizes), replace(plain, module=module, max_sizes=sizes)]


def attentions(model: Any) -> list[AttentionBlock]:
    blocks = []
    for name, module in model.named_modules():
        if isinstance(module, ImageAttention):
            blocks.append(vit_attention(name, module))
        elif isinstance(module, BlipTextAttention):
            cross = name.endswith("crossattention")
            keys = "image" if cross else "text"
            if cross and isinstance(model, BlipForQuestionAnswering) and name.startswith("text_decoder"):
                keys = "text+image"  # the question's states, which have seen the image
            kind: Literal["self", "cross"] = "cross" if cross else "self"
            blocks.append(bert_attention(name, module.self, module.output, kind, "text", keys))
    return blocks


def program(model: Any, directory: Path) -> dict[str, Any]:
    config = model.config.text_config
    embeds = {"image": "image_embeds", "text": "text_embeds"}
    output: dict[str, Any] = {"kind": "embeddings", "tensors": embeds, "match": "match_logits"}
    if not isinstance(model, BlipForImageTextRetrieval):
        settings = Settings(eos_token_id=config.sep_token_id)
        output = settings.generation(
            len(model.text_decoder.bert.encoder.layer), [config.bos_token_id], DEFAULT_NEW_TOKENS
        )
        output["text_prompt"] = isinstance(model, BlipForConditionalGeneration)
    most = config.max_position_embeddings
    text = text_spec(directory, ids="input_ids", mask="attention_mask", max_tokens=most)
    return {"image": image_spec(directory), "text": text, "output": output}
