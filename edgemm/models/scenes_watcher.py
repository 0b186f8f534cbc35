"""The watcher of clips (edgemm/reasoner/watcher.py) as a model family: frames by chunks, questions on what was seen.

watch         a chunk of frames, the memory's state before -> the state after; see runtime/recurrence.py
text_encoder  a question's words
reader        the words and the state -> the answer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertAttention

from edgemm.models import AttentionBlock, Component
from edgemm.models import Tensor as Spec
from edgemm.models._attentions import bert_attention
from edgemm.models._shrunk import read, write
from edgemm.reasoner.watcher import Watcher, WatcherConfig

MAX_BATCH = 16


def load(directory: Path) -> Watcher:
    return read(directory, lambda config: Watcher(WatcherConfig.from_dict(config)), attentions)


def save(model: Watcher, directory: Path, source: Path, *, half: bool = False) -> None:
    config = {"model_type": "scenes_watcher", **model.config.to_dict()}
    write(model, config, attentions, directory, source, half=half)


class Watch(nn.Module):
    def __init__(self, model: Watcher) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, state: Tensor) -> Tensor:
        """frames [B,F,3,S,S], -1..1, state [B,R,D] -> seen [B,R,D]."""
        return self.model.watch(frames, state)


class Reader(nn.Module):
    def __init__(self, model: Watcher) -> None:
        super().__init__()
        self.model = model

    def forward(self, text_tokens: Tensor, attention_mask: Tensor, seen: Tensor) -> Tensor:
        """text_tokens [B,T,D], attention_mask int64 [B,T], seen [B,R,D] -> logits [B,A]."""
        return self.model.read(text_tokens, attention_mask, seen)


def components(model: Watcher) -> list[Component]:
    config = model.config
    side, memory = config.image_size, ("batch", config.rows, config.width)
    batch, words = {"batch": MAX_BATCH}, {"batch": MAX_BATCH, "tokens": config.max_tokens}
    ids, mask = (Spec(name, "int64", ("batch", "tokens")) for name in ("input_ids", "attention_mask"))
    text = Spec("text_tokens", "float32", ("batch", "tokens", config.width))
    state, seen = (Spec(name, "float32", memory) for name in ("state", "seen"))
    frames = Spec("frames", "float32", ("batch", config.chunk, 3, side, side))
    logits = Spec("logits", "float32", ("batch", len(config.answers)))
    return [
        Component("watch", Watch(model), (frames, state), (seen,), batch, state=("state", "seen")),
        Component("text_encoder", model.text_encoder, (ids, mask), (text,), words, {"input_ids": config.vocab_size}),
        Component("reader", Reader(model), (text, mask, seen), (logits,), words),
    ]


def attentions(model: Watcher) -> list[AttentionBlock]:
    """The attention layers of the text encoder; those around the memory stay whole."""
    return [
        bert_attention(name, module.self, module.output, "self", "text", "text")
        for name, module in model.named_modules()
        if isinstance(module, BertAttention)
    ]


def program(model: Watcher, directory: Path) -> dict[str, Any]:
    """How the runtime turns a question into tensors, and logits into an answer."""
    del directory
    config = model.config
    text = {
        "ids": "input_ids",
        "mask": "attention_mask",
        "tokenizer": "tokenizer.json",
        "max_tokens": config.max_tokens,
    }
    output = {"kind": "labels", "tensor": "logits", "labels": list(config.answers)}
    return {"text": text, "tensors": [{"tensor": "frames", "kind": "tensor"}], "output": output}
