"""Model families, one a file, found by a checkpoint's `model_type`. What each file provides:

load(directory) -> nn.Module          from config.json + model.safetensors, in FP32, eval mode
save(model, directory, tokenizer)     the same two files and tokenizer.json; shapes may be pruned
components(model) -> [Component]      graphs to export, in the order they run
attentions(model) -> [AttentionBlock] what head pruning may shrink
program(model) -> dict                pre- and post-processing as data, see edgemm/runtime/program.py
predict(model, directory, samples)    FP32 outputs of the whole model, one row a sample
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.runtime.preprocess import read_tokenizer

EMBEDDED = {"reasoner": plugins.PACKAGE / "reasoner" / "weights"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named input or output. `shape` holds sizes, and names for the dynamic axes."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Component:
    """One graph: a module whose keyword arguments are `inputs` and whose result is `outputs`.

    max_sizes  largest size of each dynamic axis
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_sizes: dict[str, int]

    def example(self, batch: int) -> dict[str, torch.Tensor]:
        """Seeded inputs of `batch` rows, every other dynamic axis at its largest."""
        rng = torch.Generator().manual_seed(0)

        def value(port: Tensor) -> torch.Tensor:
            shape = [batch if n == "batch" else self.max_sizes[n] if isinstance(n, str) else n for n in port.shape]
            if port.dtype == "int64":
                return torch.ones(shape, dtype=torch.int64)
            return torch.randn(shape, generator=rng)

        return {port.name: value(port) for port in self.inputs}


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """Multi-head attention made of four Linear layers; head h owns rows h*d..(h+1)*d of q, k, v and columns of o.

    name     dotted path in the model
    queries  modality of the queries;  keys  modality of the keys and values
    resize   tells the module its new number of heads
    """

    name: str
    kind: Literal["self", "cross", "merged"]
    queries: str
    keys: str
    heads: int
    head_dim: int
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    resize: Callable[[int], None]

    def keep(self, heads: list[int]) -> None:
        """Shrink to `heads`, in place: q, k, v lose rows and o loses columns; nothing is masked."""
        rows = torch.cat([torch.arange(h * self.head_dim, (h + 1) * self.head_dim) for h in sorted(heads)])
        for linear in (self.q, self.k, self.v):
            linear.weight = nn.Parameter(linear.weight.detach()[rows].clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
            linear.out_features = len(rows)
        self.o.weight = nn.Parameter(self.o.weight.detach()[:, rows].clone())
        self.o.in_features = len(rows)
        self.resize(len(heads))


def resolve(model: str) -> Path:
    """The directory of MODEL: an embedded name or a path."""
    directory = EMBEDDED.get(model, Path(model))
    if not directory.is_dir():
        raise InputError(f"no model {model!r}", fix=f"use {', '.join(EMBEDDED)} or the path of a model directory")
    return directory


def find_family(directory: Path) -> ModuleType:
    """The family module of a model directory, refused unless its weights are safetensors."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{directory}: no config.json with a model_type", fix="give a model directory") from e
    if model_type not in (known := plugins.names("models")):
        raise InputError(f"{directory}: model_type {model_type!r} is not known", fix=f"known: {', '.join(known)}")
    if not (directory / "model.safetensors").is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
        if pickles:
            raise InputError(
                f"{directory}: {pickles[0]} is a pickle, which can run any code when it is read",
                fix="save the weights as model.safetensors",
            )
        raise InputError(f"{directory}: no weights (model.safetensors)", fix="put model.safetensors beside config.json")
    if not (directory / "tokenizer.json").is_file():
        raise InputError(f"{directory}: no tokenizer.json", fix="save the tokenizer beside config.json")
    read_tokenizer((directory / "tokenizer.json").read_bytes(), str(directory / "tokenizer.json"))
    return plugins.plugin("models", model_type)


def read_model(family: ModuleType, directory: Path) -> Any:
    """`family.load` with its failures named."""
    try:
        return family.load(directory)
    except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as e:
        raise InputError(f"{directory}: weights and config don't fit: {e}", fix="save both again together") from e


def sizes(family: ModuleType, model: Any) -> tuple[int, int]:
    """(parameters, multiply-adds of one input at its largest size)."""
    components: list[Component] = family.components(model)
    parameters = sum(p.numel() for c in components for p in c.module.parameters())
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        for component in components:
            component.module(**component.example(batch=1))
    return parameters, counter.get_total_flops() // 2
