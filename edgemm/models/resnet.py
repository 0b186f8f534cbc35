"""ResNet (He et al. 2016): image classes, or the last feature map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ResNetForImageClassification, ResNetModel

from edgemm.models import AttentionBlock, Component, Tensor, _transformers
from edgemm.models._encoders import MAX_BATCH, ImageEncoder, output, output_port
from edgemm.models._processors import image_spec

CLASSES = {"ResNetForImageClassification": ResNetForImageClassification, "ResNetModel": ResNetModel}
STRIDE = 32


def load(directory: Path) -> Any:
    model = _transformers.load(directory, _transformers.choose(directory, CLASSES), attentions)
    sides = image_spec(directory, "pixel_values")
    model.image_size = sides.get("crop") or sides["size"]  # a config of a ResNet has none
    return model


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    pixels = Tensor("pixel_values", "float32", ("batch", model.config.num_channels, *model.image_size))
    made = output_port(model, features(model))
    return [Component("image_encoder", ImageEncoder(model), (pixels,), (made,), {"batch": MAX_BATCH})]


def features(model: Any) -> Tensor:
    sides = [-(-side // STRIDE) for side in model.image_size]
    return Tensor("feature_map", "float32", ("batch", model.config.hidden_sizes[-1], *sides))


def attentions(model: Any) -> list[AttentionBlock]:
    """None: convolutions alone."""
    del model
    return []


def program(model: Any, directory: Path) -> dict[str, Any]:
    return {"image": image_spec(directory, "pixel_values"), "output": output(model, features(model))}
