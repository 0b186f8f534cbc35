"""CLIP (Radford et al. 2021): images and texts in one space.

The text encoder takes no mask: its attention is causal and its output stands at the text's end, so what pads a text
comes too late to be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPModel

from edgemm.models import Component, _transformers
from edgemm.models._dual_encoders import EAGER, attentions, image_encoder, output, text_encoder, token_layers
from edgemm.models._processors import image_spec, text_spec


def load(directory: Path) -> Any:
    """CLIPModel; any float width becomes FP32."""
    return _transformers.load(
        directory, _transformers.choose(directory, {"CLIPModel": CLIPModel}), attentions, tokens=token_layers, **EAGER
    )


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions, token_layers)


def components(model: Any) -> list[Component]:
    width = model.config.projection_dim
    return [image_encoder(model, width), text_encoder(model, width, model.config.text_config.max_position_embeddings)]


def program(model: Any, directory: Path) -> dict[str, Any]:
    tokens = model.config.text_config.max_position_embeddings
    return {
        "image": image_spec(directory, "pixel_values"),
        "text": text_spec(directory, ids="input_ids", max_tokens=tokens),
        "output": output("image", model.logit_scale),
    }
