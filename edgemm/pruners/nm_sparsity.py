"""Zeros among the weights, the smallest first: 2:4 for TensorRT's sparse kernels, or any share, for size alone.

Shapes stay as they are, so this buys no time but where the device's kernels skip zeros; `note` says where that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgemm.console import log
from edgemm.errors import InputError
from edgemm.pruners._selection import matching
from edgemm.target import Target
from edgemm.yaml_files import Strict

LAST = True  # what another pass corrects or cuts afterwards would undo the pattern
GROUP, ZEROS = 4, 2


class Options(Strict):
    """One of `pattern` and `sparsity`.

    pattern   2:4: of each four weights that follow one another along the input channels, the two smallest become zero
    sparsity  this share of each layer's weights, the smallest, becomes zero
    layers    glob patterns over the names of linear and convolution layers
    """

    pattern: Literal["2:4"] | None = None
    sparsity: float | None = Field(None, gt=0, lt=1)
    layers: tuple[str, ...] = Field(("*",), min_length=1)

    @model_validator(mode="after")
    def one_of_both(self) -> Options:
        if (self.pattern is None) == (self.sparsity is None):
            raise ValueError('give one of pattern ("2:4") and sparsity (a share of the weights)')
        return self


@dataclass(frozen=True, slots=True)
class Matrix:
    """A layer with weights to multiply by."""

    name: str
    module: nn.Module

    @property
    def rows(self) -> Tensor:
        """Its weight with the input channels on the last axis, a view."""
        weight = self.module.get_parameter("weight").detach()
        return weight.T if isinstance(self.module, Conv1D) else weight.movedim(1, -1)


def prune(family: ModuleType, model: Any, run: Callable[[], object], options: Options) -> dict[str, Any]:
    """Zero weights in place; no head and no unit leaves.

    A layer whose input channels are no multiple of four has no 2:4 pattern: it stays, and the log names it.
    Raises InputError when no layer matches, or none of them can have the pattern.
    """
    del family, run  # weights alone decide
    kinds, tables = nn.Linear | Conv1D | nn.Conv2d | nn.Conv1d, [m for m in model.modules() if type(m) is nn.Embedding]
    found = [Matrix(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    matched = matching("nm_sparsity", [m for m in found if m.rows.numel()], options.layers)
    if tied := [m.name for m in matched if any(m.module.weight is table.weight for table in tables)]:
        log(f"nm_sparsity: the weights of {', '.join(tied)} are an embedding table too, and stay as they are")
        matched = [m for m in matched if m.name not in tied]
    if options.sparsity is not None:
        for matrix in matched:
            rows = matrix.rows
            smallest = rows.abs().flatten().argsort()[: round(options.sparsity * rows.numel())]
            rows.mul_(torch.ones(rows.numel()).index_fill(0, smallest, 0.0).view(rows.shape))
        return {}
    if odd := [m.name for m in matched if m.rows.shape[-1] % GROUP]:
        log(f"nm_sparsity: input channels are no multiple of {GROUP} in {', '.join(odd)}, which stay as they are")
    if not (even := [m for m in matched if not m.rows.shape[-1] % GROUP]):
        raise InputError(f"nm_sparsity: no layer has input channels in groups of {GROUP}", fix="sparsity: 0.5")
    for matrix in even:
        groups = matrix.rows.unflatten(-1, (-1, GROUP))
        groups.scatter_(-1, groups.abs().argsort(-1)[..., :ZEROS], 0.0)
    return {}


def note(options: Options, target: Target) -> str:
    """What the zeros buy on a target."""
    size = "weights that are zero are deflated in the bundle"
    if target.dialect == "openvino":
        return f"nm_sparsity: no time is bought, OpenVINO multiplies by zeros on a CPU as by any weight; {size}"
    if target.backend == "tensorrt_rtx":
        return f"nm_sparsity: no time is bought, TensorRT-RTX has no sparse kernels; {size}"
    if options.pattern and target.sparsity:
        return f"nm_sparsity: the device's builder may take sparse FP16 kernels, which was not measured here; {size}"
    need = "2:4 weights, and `sparsity: 2:4` and FP16 alone in the target"
    return f"nm_sparsity: no time is bought, TensorRT skips zeros only with {need}; {size}"
