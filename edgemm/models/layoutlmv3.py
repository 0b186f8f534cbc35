"""LayoutLMv3 (Huang et al. 2022) as transformers has it: words with their boxes and image patches in one sequence.

Scores get a bias by how far two tokens are apart, in reading order and on the page. Its tables have a column a head
and serve all layers, so config.json's `bias_heads` says which columns belong to the heads that a layer has left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LayoutLMv3ForSequenceClassification, LayoutLMv3ForTokenClassification, LayoutLMv3Model

from edgemm.errors import InputError
from edgemm.models import AttentionBlock, Component, _transformers
from edgemm.models import Tensor as Port
from edgemm.models._attentions import bert_attention
from edgemm.models._decoder import HIDDEN, MAX_BATCH, attend, heads
from edgemm.models._encoders import labels
from edgemm.models._processors import image_spec, text_spec

CLASSES = {
    c.__name__: c for c in (LayoutLMv3ForSequenceClassification, LayoutLMv3ForTokenClassification, LayoutLMv3Model)
}
COORDINATES = 1001  # of a box are under this


class ImageEncoder(nn.Module):
    """Patches -> tokens, after a [CLS] of their own."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.patch_embed, self.norm = base.patch_embed, base.norm
        self.cls_token, self.positions = base.cls_token, base.pos_embed

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32[B,3,H,W] -> float32[B,1+P,D]."""
        patches = self.patch_embed(pixel_values)
        first = self.cls_token.expand(patches.shape[0], -1, -1)
        return self.norm(torch.cat([first, patches], 1) + self.positions)


class Bias(nn.Module):
    """What a distance adds to the scores of every head: transformers' buckets as a table, which needs no logarithm."""

    def __init__(self, encoder: Any, linear: nn.Linear, bins: int, furthest: int) -> None:
        super().__init__()
        distances = torch.arange(-furthest, furthest + 1)  # past `furthest` there is one bucket
        buckets = encoder.relative_position_bucket(distances, num_buckets=bins, max_distance=furthest)
        size = encoder.layer[0].attention.self.attention_head_size
        self.furthest = furthest
        self.table = nn.Buffer(linear.weight.detach()[:, buckets] / size**0.5)

    def forward(self, places: Tensor) -> Tensor:
        """int64[B,N] -> float32[B,H,N,N]."""
        columns = (places[:, None, :] - places[:, :, None]).clamp(-self.furthest, self.furthest) + self.furthest
        return self.table.index_select(1, columns.flatten()).unflatten(1, columns.shape).transpose(0, 1)


class Distances(nn.Module):
    """The bias of all heads, in reading order and, where the model has it, on the page."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        config, encoder = base.config, base.encoder
        self.patch_boxes = nn.Buffer(base.visual_bbox.clone())
        self.order = Bias(encoder, encoder.rel_pos_bias, config.rel_pos_bins, config.max_rel_pos)
        self.page = config.has_spatial_attention_bias
        if self.page:
            self.across = Bias(encoder, encoder.rel_pos_x_bias, config.rel_2d_pos_bins, config.max_rel_2d_pos)
            self.down = Bias(encoder, encoder.rel_pos_y_bias, config.rel_2d_pos_bins, config.max_rel_2d_pos)

    def forward(self, bbox: Tensor) -> Tensor:
        """int64[B,T,4], boxes of the words -> float32[1 or B,H,N,N], N = T+1+P."""
        order = torch.cat([torch.arange(bbox.shape[1]), torch.arange(self.patch_boxes.shape[0])])
        if not self.page:
            return self.order(order[None])
        boxes = torch.cat([bbox, self.patch_boxes.expand(bbox.shape[0], -1, -1)], 1)
        return self.order(order[None]) + self.across(boxes[:, :, 0]) + self.down(boxes[:, :, 3])


class BiasedLayer(nn.Module):
    """An encoder layer whose heads use `columns` of the bias, all of them where it is None."""

    def __init__(self, layer: Any, columns: list[int] | None) -> None:
        super().__init__()
        self.layer, self.columns = layer, columns

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        layer, attention = self.layer, self.layer.attention.self
        size = attention.attention_head_size
        query = heads(attention.query(hidden) * size**-0.5, size)
        key, value = heads(attention.key(hidden), size), heads(attention.value(hidden), size)
        seen = attend(query, key, value, bias if self.columns is None else bias[:, self.columns])
        return layer.feed_forward_chunk(layer.attention.output(seen, hidden))


class Fusion(nn.Module):
    """Words and image tokens in one sequence. `head` reads the first word, or every word; None: all is given."""

    def __init__(self, base: Any, head: nn.Module | None, *, every_word: bool) -> None:
        super().__init__()
        self.words, self.layernorm = base.embeddings, base.LayerNorm
        self.distances = Distances(base) if base.config.has_relative_attention_bias else None
        every = base.config.num_attention_heads if self.distances else 0
        self.layers = nn.ModuleList(
            BiasedLayer(layer, columns if len(columns) < every else None)
            for layer, columns in zip(base.encoder.layer, bias_heads(base.config), strict=True)
        )
        self.head, self.every_word = head, every_word

    def forward(self, input_ids: Tensor, attention_mask: Tensor, bbox: Tensor, image_tokens: Tensor) -> Tensor:
        """int64[B,T], int64[B,T], int64[B,T,4], float32[B,1+P,D] -> float32[B,A], [B,T,A] or [B,T+1+P,D]."""
        hidden = self.layernorm(torch.cat([self.words(input_ids, bbox), image_tokens], 1))
        mask = F.pad((1.0 - attention_mask.float()) * HIDDEN, (0, image_tokens.shape[1]))[:, None, None]
        bias = mask if self.distances is None else mask + self.distances(bbox)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        if self.head is None:
            return hidden
        return self.head(hidden[:, : input_ids.shape[1]] if self.every_word else hidden[:, 0])


def bias_heads(config: Any) -> list[list[int]]:
    """Columns of the bias that each layer's heads use; a pruned layer has fewer."""
    if not hasattr(config, "bias_heads"):
        config.bias_heads = [list(range(config.num_attention_heads)) for _ in range(config.num_hidden_layers)]
    kept: list[list[int]] = config.bias_heads
    return kept


@dataclass(frozen=True, slots=True)
class BiasedAttention(AttentionBlock):
    """`columns`: those of the bias that belong to its heads; they are cut with the heads."""

    columns: list[int] | None = None

    def keep(self, heads: list[int]) -> None:
        assert self.columns is not None
        AttentionBlock.keep(self, heads)
        self.columns[:] = [self.columns[h] for h in sorted(heads)]


def load(directory: Path) -> Any:
    """The model in FP32. Raises InputError for one that sees no words or no image."""
    model = _transformers.load(directory, _transformers.choose(directory, CLASSES), attentions)
    for part in ("text_embed", "visual_embed"):
        if not getattr(model.config, part):
            raise InputError(f"{directory}: {part} = false", fix="use a model that reads words and the image")
    return model


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    base, config = model.base_model, model.config
    width = config.hidden_size
    places = 1 + (config.input_size // config.patch_size) ** 2
    most = config.max_position_embeddings - config.pad_token_id - 1  # positions start after the padding's
    sizes = {"batch": MAX_BATCH, "tokens": most, "sequence": most + places}
    pixels = Port("pixel_values", "float32", ("batch", config.num_channels, config.input_size, config.input_size))
    image = Port("image_tokens", "float32", ("batch", places, width))
    ids, mask = (Port(name, "int64", ("batch", "tokens")) for name in ("input_ids", "attention_mask"))
    boxes = Port("bbox", "int64", ("batch", "tokens", 4))
    every_word = isinstance(model, LayoutLMv3ForTokenClassification)
    out = Port("logits", "float32", ("batch", *(("tokens",) if every_word else ()), config.num_labels))
    if base is model:
        out = Port("last_hidden_state", "float32", ("batch", "sequence", width))
    fusion = Fusion(base, None if base is model else model.classifier, every_word=every_word)
    high = {"input_ids": config.vocab_size, "bbox": min(COORDINATES, config.max_2d_position_embeddings)}
    return [
        Component("image_encoder", ImageEncoder(base), (pixels,), (image,), sizes),
        Component("fusion", fusion, (ids, mask, boxes, image), (out,), sizes, high),
    ]


def attentions(model: Any) -> list[AttentionBlock]:
    """Every layer: words and patches attend to each other in one sequence."""
    base = model.base_model
    blocks = []
    prefix = "" if base is model else "layoutlmv3."
    for i, (layer, columns) in enumerate(zip(base.encoder.layer, bias_heads(model.config), strict=True)):
        name, both, module = f"{prefix}encoder.layer.{i}.attention", "text+image", layer.attention
        block = partial(BiasedAttention, columns=columns)
        blocks.append(bert_attention(name, module.self, module.output, "merged", both, both, block))
    return blocks


def program(model: Any, directory: Path) -> dict[str, Any]:
    """Labels of a document; scores of every word, or hidden states, as they are."""
    config = model.config
    output: dict[str, Any] = {"kind": "features", "tensors": ["logits"]}
    if isinstance(model, LayoutLMv3Model):
        output["tensors"] = ["last_hidden_state"]
    elif isinstance(model, LayoutLMv3ForSequenceClassification):
        output = {"kind": "labels", "tensor": "logits", "labels": labels(model)}
    most = config.max_position_embeddings - config.pad_token_id - 1
    text = text_spec(directory, ids="input_ids", mask="attention_mask", boxes="bbox", max_tokens=most)
    return {"image": image_spec(directory), "text": text, "output": output}
