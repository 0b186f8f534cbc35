"""Any image and text encoder, joined by two projections and trained as CLIP is (Zhai et al. 2022, LiT)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import VisionTextDualEncoderModel

from edgemm.errors import InputError
from edgemm.models import Component, _transformers
from edgemm.models._dual_encoders import (
    EAGER,
    attentions,
    image_encoder,
    max_tokens,
    output,
    text_encoder,
    token_layers,
)
from edgemm.models._processors import image_spec, text_spec

TOWERS = {
    "vision_config": ("clip_vision_model", "deit", "vit"),
    "text_config": ("bert", "roberta", "xlm-roberta"),
}


def load(directory: Path) -> Any:
    """VisionTextDualEncoderModel; any float width becomes FP32. InputError when a tower is none of TOWERS."""
    cls = _transformers.choose(directory, {"VisionTextDualEncoderModel": VisionTextDualEncoderModel})
    config = _transformers.read_json(directory, "config.json")
    for part, known in TOWERS.items():
        if (model_type := (config.get(part) or {}).get("model_type")) not in known:
            raise InputError(f"{directory}: {part} has model_type {model_type!r}", fix=f"known: {', '.join(known)}")
    return _transformers.load(directory, cls, attentions, tokens=token_layers, **EAGER)


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions, token_layers)


def components(model: Any) -> list[Component]:
    width = model.config.projection_dim
    return [
        image_encoder(model, width),
        text_encoder(model, width, max_tokens(model.config.text_config), mask=True),
    ]


def program(model: Any, directory: Path) -> dict[str, Any]:
    tokens = max_tokens(model.config.text_config)
    return {
        "image": image_spec(directory, "pixel_values"),
        "text": text_spec(directory, ids="input_ids", mask="attention_mask", max_tokens=tokens),
        "output": output("image", model.logit_scale),
    }
