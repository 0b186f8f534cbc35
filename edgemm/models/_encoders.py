"""What models of one encoder share: a head that answers or, without one, features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgemm.models import Tensor

MAX_BATCH = 64


class Encoder(nn.Module):
    """A transformers model -> its logits where it has a head, else its last hidden state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        made = self.model(**inputs)
        return made.logits if "logits" in made else made.last_hidden_state


class ImageEncoder(Encoder):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.run(pixel_values=pixel_values)


def drop_pooler(model: Any) -> None:
    """Take away the pooler of a bare encoder: nothing reads it, and not all checkpoints have its weights."""
    if hasattr(model, "pooler"):
        model.pooler = None


def has_head(model: Any) -> bool:
    """Whether the model classifies."""
    return "For" in type(model).__name__


def labels(model: Any) -> list[str]:
    """The names of the classes, in the order of the logits."""
    names = model.config.id2label
    return [str(names[i]) for i in range(len(names))]


def output_port(model: Any, features: Tensor) -> Tensor:
    """logits [B,A] of a model that classifies, else `features`."""
    return Tensor("logits", "float32", ("batch", len(labels(model)))) if has_head(model) else features


def output(model: Any, features: Tensor) -> dict[str, Any]:
    """program.json's `output` for that port."""
    if has_head(model):
        return {"kind": "labels", "tensor": "logits", "labels": labels(model)}
    return {"kind": "features", "tensors": [features.name]}
