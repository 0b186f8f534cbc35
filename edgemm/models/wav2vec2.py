"""wav2vec 2.0 (Baevski et al. 2020): transcripts by CTC, audio classes, or the hidden state of every frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import (
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

from edgemm.models import AttentionBlock, Component, Tensor, _transformers
from edgemm.models._decoder import bart_attention
from edgemm.models._encoders import MAX_BATCH, Encoder, output, output_port
from edgemm.models._processors import feature_extractor

CLASSES = {
    "Wav2Vec2ForCTC": Wav2Vec2ForCTC,
    "Wav2Vec2ForSequenceClassification": Wav2Vec2ForSequenceClassification,
    "Wav2Vec2Model": Wav2Vec2Model,
}
SECONDS = 30
FRAME = 400  # samples that the convolutions need for one frame


class AudioEncoder(Encoder):
    """No mask: a recording comes alone and unpadded."""

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return self.run(input_values=input_values)


def load(directory: Path) -> Any:
    cls = _transformers.choose(directory, CLASSES)
    return _transformers.load(directory, cls, attentions, fold_weight_norm, attn_implementation="eager")


def fold_weight_norm(model: Any) -> None:
    """Plain weights in place of direction and length: the same values, and what quantizers look for."""
    for module in model.modules():
        for name in list(getattr(module, "parametrizations", {})):
            remove_parametrizations(module, name)


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    values = Tensor("input_values", "float32", ("batch", "samples"))
    if isinstance(model, Wav2Vec2ForCTC):
        made = Tensor("logits", "float32", ("batch", "frames", model.config.vocab_size))
    else:
        made = output_port(model, features(model))
    sizes = {"batch": MAX_BATCH, "samples": SECONDS * 16_000, "frames": SECONDS * 50}
    return [Component("audio_encoder", AudioEncoder(model), (values,), (made,), sizes, min_sizes={"samples": 8_000})]


def features(model: Any) -> Tensor:
    return Tensor("audio_tokens", "float32", ("batch", "frames", model.config.hidden_size))


def attentions(model: Any) -> list[AttentionBlock]:
    return [
        bart_attention(name, module, "audio", "audio")
        for name, module in model.named_modules()
        if isinstance(module, Wav2Vec2Attention)
    ]


def program(model: Any, directory: Path) -> dict[str, Any]:
    extractor = feature_extractor(Wav2Vec2FeatureExtractor, directory)
    audio = {
        "tensor": "input_values",
        "sampling_rate": extractor.sampling_rate,
        "seconds": SECONDS,
        "min_samples": FRAME,
        "normalize": extractor.do_normalize,
    }
    if isinstance(model, Wav2Vec2ForCTC):
        blank = model.config.pad_token_id
        return {"audio": audio, "output": {"kind": "transcript", "tensor": "logits", "blank": blank}}
    return {"audio": audio, "output": output(model, features(model))}
