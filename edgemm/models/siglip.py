"""SigLIP (Zhai et al. 2023), and SigLIP 2 at a fixed resolution (NaFlex, model_type "siglip2", is another model).

Texts are padded to the full length and the padding is no less read than the text, as in training: no mask, and one
length. The output stands at the last token, padding or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import SiglipModel

from edgemm.errors import InputError
from edgemm.models import Component, _transformers
from edgemm.models._dual_encoders import EAGER, attentions, image_encoder, output, text_encoder
from edgemm.models._processors import image_spec, text_spec


def load(directory: Path) -> Any:
    """SiglipModel; any float width becomes FP32. InputError when it has no head that pools the image."""
    cls = _transformers.choose(directory, {"SiglipModel": SiglipModel})
    model = _transformers.load(directory, cls, attentions, **EAGER)
    if not model.vision_model.use_head:
        raise InputError(f"{directory}: vision_use_head is false: nothing pools the image", fix="give a model with it")
    return model


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    image, text = model.config.vision_config, model.config.text_config
    return [
        image_encoder(model, image.hidden_size),
        text_encoder(model, text.projection_size, text.max_position_embeddings, fixed=True),
    ]


def program(model: Any, directory: Path) -> dict[str, Any]:
    tokens = model.config.text_config.max_position_embeddings
    return {
        "image": image_spec(directory, "pixel_values"),
        "text": {**text_spec(directory, ids="input_ids", max_tokens=tokens), "pad_to": tokens},
        "output": output("image", model.logit_scale, bias=model.logit_bias.item(), activation="sigmoid"),
    }
