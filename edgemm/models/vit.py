"""Vision Transformer (Dosovitskiy et al. 2021): image classes, or the hidden state of every patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ViTForImageClassification, ViTModel

from edgemm.models import Component, Tensor, _transformers
from edgemm.models._dual_encoders import EAGER, attentions, token_layers
from edgemm.models._encoders import MAX_BATCH, ImageEncoder, drop_pooler, output, output_port
from edgemm.models._key_tokens import left
from edgemm.models._processors import image_spec

CLASSES = {"ViTForImageClassification": ViTForImageClassification, "ViTModel": ViTModel}


def load(directory: Path) -> Any:
    cls = _transformers.choose(directory, CLASSES)
    return _transformers.load(directory, cls, attentions, drop_pooler, unread="pooler.", tokens=token_layers, **EAGER)


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions, token_layers)


def components(model: Any) -> list[Component]:
    config = model.config
    pixels = Tensor("pixel_values", "float32", ("batch", config.num_channels, config.image_size, config.image_size))
    made = output_port(model, features(model))
    return [Component("image_encoder", ImageEncoder(model), (pixels,), (made,), {"batch": MAX_BATCH})]


def features(model: Any) -> Tensor:
    """The class token and one token a patch, of those that stay."""
    return Tensor("image_tokens", "float32", ("batch", 1 + left(token_layers(model)), model.config.hidden_size))


def program(model: Any, directory: Path) -> dict[str, Any]:
    return {"image": image_spec(directory, "pixel_values"), "output": output(model, features(model))}
