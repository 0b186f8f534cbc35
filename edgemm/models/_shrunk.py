"""What pruning left of a model, as data; a fresh model shrunk to it; models of edgemm/reasoner/ as files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import nn

from edgemm.models import AttentionBlock
from edgemm.models._blocks import stacks
from edgemm.models._hidden_units import hidden_units
from edgemm.runtime.preprocess import read_tokenizer

Attentions = Callable[[Any], list[AttentionBlock]]
Model = TypeVar("Model", bound=nn.Module)


def left(model: nn.Module, attentions: Attentions) -> dict[str, dict[str, int]]:
    """Blocks of each stack, heads of each attention layer, hidden units of each step, by name."""
    return {
        "blocks": {s.name: len(s.layers) for s in stacks(model)},
        "heads": {b.name: b.heads for b in attentions(model) if b.q is not None},
        "units": {h.name: h.units for h in hidden_units(model)},
    }


def shrink(model: nn.Module, attentions: Attentions, sizes: dict[str, dict[str, int]]) -> None:
    """Make a model, whole and with any weights, as small as `left` found one."""
    for stack in stacks(model):
        stack.keep(list(range(sizes["blocks"][stack.name])))
    for block in attentions(model):
        if (heads := sizes["heads"].get(block.name)) is not None:
            block.keep(list(range(heads)))
    for hidden in hidden_units(model):
        hidden.keep(list(range(sizes["units"][hidden.name])))


def read(directory: Path, build: Callable[[dict[str, Any]], Model], attentions: Attentions) -> Model:
    """What `build` makes of config.json, with model.safetensors (any float width), pruned as the config says."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    read_tokenizer((directory / "tokenizer.json").read_bytes(), str(directory / "tokenizer.json"))
    model = build(config).eval()
    shrink(model, attentions, config["left"])
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in weights.items()})
    return model


def write(
    model: nn.Module, config: dict[str, Any], attentions: Attentions, directory: Path, source: Path, *, half: bool
) -> None:
    """Write config.json, model.safetensors, and the tokenizer.json of `source`."""
    directory.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({**config, "left": left(model, attentions)}, indent=2)
    (directory / "config.json").write_text(whole + "\n", encoding="utf-8")
    weights = {n: t.half() if half and t.is_floating_point() else t for n, t in model.state_dict().items()}
    save_file({n: t.contiguous() for n, t in weights.items()}, directory / "model.safetensors")
    shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
