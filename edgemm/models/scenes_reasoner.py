"""The scenes reasoner (edgemm/reasoner/) as a model family; _scenes_graphs.py has its graphs for each task."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers.models.bert.modeling_bert import BertAttention
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

from edgemm.models import AttentionBlock, Component
from edgemm.models._attentions import bert_attention
from edgemm.models._decoder import bart_attention
from edgemm.models._scenes_graphs import GRAPHS, most_tokens, output
from edgemm.models._shrunk import read, write
from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.corpus import MEAN, STD
from edgemm.reasoner.model import Attention
from edgemm.reasoner.scenes_model import ScenesReasoner

TASKS = ("answer", "find_image", "find_audio", "caption")


def for_task(directory: Path, task: str, out: Path) -> None:
    """Write the model of `directory` for another of TASKS to `out`."""
    out.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copyfile(directory / name, out / name)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, "task": task}, indent=2) + "\n", encoding="utf-8")


def load(directory: Path) -> ScenesReasoner:
    return read(directory, lambda config: ScenesReasoner(ScenesConfig.from_dict(config)), every_attention)


def save(model: ScenesReasoner, directory: Path, source: Path, *, half: bool = False) -> None:
    config = {"model_type": "scenes_reasoner", **model.config.to_dict()}
    write(model, config, every_attention, directory, source, half=half)


def components(model: ScenesReasoner) -> list[Component]:
    return GRAPHS[model.config.task](model)


def attentions(model: ScenesReasoner) -> list[AttentionBlock]:
    """Every multi-head attention of the encoders that the task runs and, where it answers, of the levels."""
    task = model.config.task
    unused = {
        "levels.": task != "answer",
        "text_encoder.": task == "caption",
        "audio_encoder.": task not in ("answer", "find_audio"),
    }
    starts = tuple(start for start, left_out in unused.items() if left_out)
    return [block for block in every_attention(model) if not block.name.startswith(starts)]


def every_attention(model: ScenesReasoner) -> list[AttentionBlock]:
    """Those of other tasks, too."""
    blocks: list[AttentionBlock] = []
    for name, module in model.named_modules():
        if isinstance(module, Attention) and name.startswith("levels."):
            linears = module.q_proj, module.k_proj, module.v_proj, module.o_proj
            sizes, resize = (module.heads, module.head_dim), partial(setattr, module, "heads")
            queries = "slots" if ".slots." in name else "text"
            keys = name.rpartition(".")[2] if ".cross." in name else queries
            kind: Literal["cross", "self"] = "cross" if ".cross." in name else "self"
            blocks.append(AttentionBlock(name, kind, queries, keys, *sizes, *linears, resize))
        elif isinstance(module, BertAttention):
            blocks.append(bert_attention(name, module.self, module.output, "self", "text", "text"))
        elif isinstance(module, Wav2Vec2Attention):
            blocks.append(bart_attention(name, module, "audio", "audio"))
    return blocks


def program(model: ScenesReasoner, directory: Path) -> dict[str, Any]:
    """How the runtime turns files into tensors and what the graphs make into an answer."""
    del directory
    config = model.config
    image = {
        "tensor": "pixel_values",
        "size": [config.image_size, config.image_size],
        "resample": "bilinear",
        "mean": list(MEAN),
        "std": list(STD),
    }
    text = {
        "ids": "input_ids",
        "mask": "attention_mask",
        "tokenizer": "tokenizer.json",
        "max_tokens": most_tokens(config),
    }
    audio = {
        "tensor": "input_values",
        "sampling_rate": 16_000,
        "seconds": config.audio_seconds,
        "pad_to": config.min_samples,
    }
    takes = {"answer": {"image", "audio"}, "find_audio": {"audio"}}.get(config.task, {"image"})
    media = {name: spec for name, spec in (("image", image), ("audio", audio)) if name in takes}
    return {**media, **({} if config.task == "caption" else {"text": text}), "output": output(model)}
