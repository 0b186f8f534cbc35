"""ViLT (Kim et al. 2021) as transformers has it: one transformer over words and image patches together.

transformers draws the patches in random order (torch.multinomial), which does not export. With
max_image_length -1 it keeps all of them, and attention does not see their order, so the embedding
of the image is written anew here, in order, for one image of any size without padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViltForImageAndTextRetrieval, ViltForQuestionAnswering

from edgemm.errors import InputError
from edgemm.models import AttentionBlock, Component, _transformers
from edgemm.models import Tensor as Port
from edgemm.models._attentions import bert_attention
from edgemm.models._decoder import HIDDEN, MAX_BATCH
from edgemm.models._encoders import labels
from edgemm.models._processors import image_spec, text_spec

CLASSES = {c.__name__: c for c in (ViltForQuestionAnswering, ViltForImageAndTextRetrieval)}
LONGEST = 1333 / 800  # longest edge / shortest edge, at most: ViltImageProcessor's rule


class ImageEncoder(nn.Module):
    """Patches -> tokens with interpolated positions and the image's modality embedding, after a [CLS] of its own."""

    def __init__(self, embeddings: Any, side: int) -> None:
        super().__init__()
        self.patches = embeddings.patch_embeddings.projection
        self.cls_token = embeddings.cls_token
        self.positions = embeddings.position_embeddings
        self.modality = embeddings.token_type_embeddings
        self.side = side

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float32[B,3,H,W], sides multiples of the patch -> float32[B,1+P,D]."""
        patches = self.patches(pixel_values)
        grid = self.positions[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        grid = F.interpolate(grid, size=patches.shape[2:], mode="bilinear", align_corners=True)
        tokens = (patches + grid).flatten(2).transpose(1, 2)
        first = (self.cls_token + self.positions[:, :1]).expand(tokens.shape[0], -1, -1)
        return torch.cat([first, tokens], 1) + self.modality.weight[1]


class Fusion(nn.Module):
    """Words and image tokens in one sequence; `head` reads the pooled first word."""

    def __init__(self, vilt: Any, head: nn.Module) -> None:
        super().__init__()
        self.words = vilt.embeddings.text_embeddings
        self.modality = vilt.embeddings.token_type_embeddings
        self.layers, self.layernorm, self.pooler, self.head = vilt.encoder.layer, vilt.layernorm, vilt.pooler, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """int64[B,T], int64[B,T], float32[B,1+P,D] -> float32[B,A]."""
        hidden = torch.cat([self.words(input_ids) + self.modality.weight[0], image_tokens], 1)
        mask = F.pad((1.0 - attention_mask.float()) * HIDDEN, (0, image_tokens.shape[1]))[:, None, None]
        for layer in self.layers:
            (hidden,) = layer(hidden, mask)
        return self.head(self.pooler(self.layernorm(hidden)))


def load(directory: Path) -> Any:
    """The model in FP32. Raises InputError when its configuration asks for a random choice of patches."""
    model = _transformers.load(directory, _transformers.choose(directory, CLASSES), attentions)
    if (most := model.config.max_image_length) >= 0:
        raise InputError(
            f"{directory}: max_image_length = {most} keeps that many patches, drawn at random",
            fix="set max_image_length to -1 in config.json: all patches are kept",
        )
    return model


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    config, embeddings = model.config, model.vilt.embeddings
    head = model.classifier if isinstance(model, ViltForQuestionAnswering) else model.rank_output
    answers = config.num_labels if isinstance(model, ViltForQuestionAnswering) else 1
    side = config.image_size // config.patch_size
    long = longest_edge(config)
    sizes = {
        "batch": MAX_BATCH,
        "height": long,
        "width": long,
        "tokens": config.max_position_embeddings,
        "patches": 1 + side * (long // config.patch_size),
    }
    smallest = {"height": config.patch_size, "width": config.patch_size}
    pixels = Port("pixel_values", "float32", ("batch", config.num_channels, "height", "width"))
    image = Port("image_tokens", "float32", ("batch", "patches", config.hidden_size))
    ids = Port("input_ids", "int64", ("batch", "tokens"))
    mask = Port("attention_mask", "int64", ("batch", "tokens"))
    logits = Port("logits", "float32", ("batch", answers))
    encoder, fusion = ImageEncoder(embeddings, side), Fusion(model.vilt, head)
    return [
        Component("image_encoder", encoder, (pixels,), (image,), sizes, min_sizes=smallest),
        Component("fusion", fusion, (ids, mask, image), (logits,), sizes, {"input_ids": config.vocab_size}),
    ]


def longest_edge(config: Any) -> int:
    """Pixels: the most that an image whose shortest edge is config.image_size may have, in whole patches."""
    return int(LONGEST * config.image_size) // config.patch_size * config.patch_size


def attentions(model: Any) -> list[AttentionBlock]:
    """Every layer: words and patches attend to each other in one sequence."""
    blocks = []
    for i, layer in enumerate(model.vilt.encoder.layer):
        name, both, module = f"vilt.encoder.layer.{i}.attention", "text+image", layer.attention
        blocks.append(bert_attention(name, module.attention, module.output, "merged", both, both))
    return blocks


def program(model: Any, directory: Path) -> dict[str, Any]:
    """Answers are scored one by one (sigmoid); a retrieval model gives its score of the pair as it is."""
    config = model.config
    output: dict[str, Any] = {"kind": "features", "tensors": ["logits"]}
    if isinstance(model, ViltForQuestionAnswering):
        output = {"kind": "labels", "tensor": "logits", "labels": labels(model), "activation": "sigmoid"}
    return {
        "image": image_spec(directory),
        "text": text_spec(directory, ids="input_ids", mask="attention_mask", max_tokens=config.max_position_embeddings),
        "output": output,
    }
