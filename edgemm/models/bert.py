"""BERT (Devlin et al. 2019): text classes, or the hidden state of every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification, BertModel

from edgemm.models import Component, Tensor, _transformers
from edgemm.models._dual_encoders import EAGER, attentions
from edgemm.models._encoders import MAX_BATCH, Encoder, drop_pooler, output, output_port
from edgemm.models._processors import text_spec

CLASSES = {"BertForSequenceClassification": BertForSequenceClassification, "BertModel": BertModel}


class TextEncoder(Encoder):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.run(input_ids=input_ids, attention_mask=attention_mask)


def load(directory: Path) -> Any:
    cls = _transformers.choose(directory, CLASSES)
    return _transformers.load(directory, cls, attentions, drop_pooler, unread="pooler.", **EAGER)


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    config = model.config
    ids, mask = (Tensor(n, "int64", ("batch", "tokens")) for n in ("input_ids", "attention_mask"))
    made = output_port(model, features(model))
    sizes = {"batch": MAX_BATCH, "tokens": config.max_position_embeddings}
    high = {"input_ids": config.vocab_size}
    return [Component("text_encoder", TextEncoder(model), (ids, mask), (made,), sizes, high)]


def features(model: Any) -> Tensor:
    return Tensor("text_tokens", "float32", ("batch", "tokens", model.config.hidden_size))


def program(model: Any, directory: Path) -> dict[str, Any]:
    tokens = model.config.max_position_embeddings
    text = text_spec(directory, ids="input_ids", mask="attention_mask", max_tokens=tokens)
    return {"text": text, "output": output(model, features(model))}
