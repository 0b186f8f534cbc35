"""The painter of scenes (edgemm/reasoner/painter.py) as a model family: a caption in, a picture out.

text_encoder   the caption's words
cross_cache    keys and values of the words, which all steps share
decoder        the plan of the picture, token by token; see _decoder.py
image_decoder  plan -> codes -> picture
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention

from edgemm.models import AttentionBlock, Component
from edgemm.models import Tensor as Spec
from edgemm.models._attentions import bert_attention
from edgemm.models._decoder import MAX_BATCH, Settings, cache_ports, decoder
from edgemm.models._shrunk import read, write
from edgemm.reasoner.painter import Painter, PainterConfig


def load(directory: Path) -> Painter:
    return read(directory, lambda config: Painter(PainterConfig.from_dict(config)), attentions)


def save(model: Painter, directory: Path, source: Path, *, half: bool = False) -> None:
    config = {"model_type": "scenes_painter", **model.config.to_dict()}
    write(model, config, attentions, directory, source, half=half)


class CrossCache(nn.Module):
    """The keys and values of the words, and what is added to the scores of those that are padding."""

    def __init__(self, model: Painter) -> None:
        super().__init__()
        self.model = model

    def forward(self, text_tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """text_tokens [B,K,D], attention_mask int64 [B,K] -> cross_key_i, cross_value_i of each layer, cross_bias."""
        pairs, bias = self.model.cross(text_tokens, attention_mask)
        return *(part for pair in pairs for part in pair), bias


class ImageDecoder(nn.Module):
    """What fills in the codes, and the autoencoder's second half."""

    def __init__(self, model: Painter) -> None:
        super().__init__()
        self.model = model

    def forward(self, plan: Tensor) -> Tensor:
        """plan int64 [B,T] -> picture [B,3,S,S], -1..1."""
        return self.model.picture(plan)


def components(model: Painter) -> list[Component]:
    config = model.config
    d, side, words = config.width, config.image_size, {"batch": MAX_BATCH, "tokens": config.max_tokens}
    said = [Spec(name, "int64", ("batch", "tokens")) for name in ("input_ids", "attention_mask")]
    text = Spec("text_tokens", "float32", ("batch", "tokens", d))
    keys, mask = (
        Spec("text_tokens", "float32", ("batch", "keys", d)),
        Spec("attention_mask", "int64", ("batch", "keys")),
    )
    layers = list(model.layers)
    own, other = (
        [(a.heads, a.head_dim) for a in (getattr(layer, f"{kind}_attention") for layer in layers)]
        for kind in ("self", "cross")
    )
    cross = *cache_ports("cross", other, "keys"), Spec("cross_bias", "float32", ("batch", 1, 1, "keys"))
    sizes = {"vocabulary": config.end + 1, "positions": config.length + 1, "keys": config.max_tokens}
    looked_at = {"batch": MAX_BATCH, "keys": config.max_tokens}
    plan, batch = Spec("plan", "int64", ("batch", config.length)), {"batch": MAX_BATCH}
    picture = Spec("picture", "float32", ("batch", 3, side, side))
    return [
        Component("text_encoder", model.text_encoder, tuple(said), (text,), words, {"input_ids": config.vocab_size}),
        Component("cross_cache", CrossCache(model), (keys, mask), cross, looked_at),
        decoder(model.embed, layers, model.head, own, cross, **sizes),
        Component("image_decoder", ImageDecoder(model), (plan,), (picture,), batch, {"plan": config.begin}),
    ]


def attentions(model: Painter) -> list[AttentionBlock]:
    """The attention layers of the text encoder; those of the decoder share a cache, and stay whole."""
    return [
        bert_attention(name, module.self, module.output, "self", "text", "text")
        for name, module in model.named_modules()
        if isinstance(module, BertAttention)
    ]


def program(model: Painter, directory: Path) -> dict[str, Any]:
    """How the runtime turns a caption into tensors, and a plan into a picture."""
    del directory
    config = model.config
    text = {
        "ids": "input_ids",
        "mask": "attention_mask",
        "tokenizer": "tokenizer.json",
        "max_tokens": config.max_tokens,
    }
    output = Settings(eos_token_id=config.end).generation(len(model.layers), [config.begin], config.length)
    return {"text": text, "output": {**output, "picture": {"ids": "plan", "count": config.length}}}
