"""Hidden units: what one layer makes and only the next one reads, so that both can shrink.

Neurons of a feed-forward block, and channels inside a residual block of convolutions. They are found by the names that
the layers have in transformers' modules and in the reference model; a new layout is a row more in LAYOUTS.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer
from transformers.pytorch_utils import Conv1D

LAYOUTS = (
    ("fc1", "fc2"),  # CLIP, SigLIP, ViT, BLIP's images, Whisper, TrOCR, the reasoner
    ("intermediate.dense", "output.dense"),  # BERT and what was made from it
    ("intermediate_dense", "output_dense"),  # wav2vec 2.0
    ("c_fc", "c_proj"),  # GPT-2
)


@dataclass(frozen=True, slots=True)
class HiddenUnits:
    """Unit i is row i of `makes`, entry i of `norm`, and columns i*per..(i+1)*per of `reads`, see `matrix`.

    name   dotted path in the model: of the module that holds both layers
    makes  nn.Linear, Conv1D or nn.Conv2d; between it and `reads` every unit stays on its own
    reads  the same
    norm   of convolutions, between the two
    """

    name: str
    makes: nn.Module
    reads: nn.Module
    norm: nn.BatchNorm2d | None = None

    @property
    def units(self) -> int:
        return len(matrix(self.makes))

    @property
    def per(self) -> int:
        """Columns of `reads` for each unit: 1, or the size of a kernel."""
        return matrix(self.reads).shape[1] // self.units

    def keep(self, units: list[int]) -> None:
        """Shrink to `units`, in place: nothing is masked."""
        index = torch.tensor(sorted(units), dtype=torch.int64)
        for module, makes in ((self.makes, True), (self.reads, False)):
            weight = module.get_parameter("weight").detach()
            axis = int(makes) if isinstance(module, Conv1D) else int(not makes)
            module.weight = nn.Parameter(weight.index_select(axis, index))
            sizes = {nn.Linear: "features", nn.Conv2d: "channels", Conv1D: ""}[type(module)]
            name = ("nf" if makes else "nx") if not sizes else f"{'out' if makes else 'in'}_{sizes}"
            setattr(module, name, len(index))
        for part in [self.makes] if self.norm is None else [self.makes, self.norm]:
            if part.bias is not None:
                part.bias = nn.Parameter(part.get_parameter("bias").detach()[index])
        if self.norm is not None:
            self.norm.weight = nn.Parameter(self.norm.weight.detach()[index])
            for name in ("running_mean", "running_var"):
                setattr(self.norm, name, self.norm.get_buffer(name)[index])
            self.norm.num_features = len(index)


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer or convolution as a view float32[outputs, inputs x size of a kernel]."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight.view(len(weight), -1)


def hidden_units(model: nn.Module) -> list[HiddenUnits]:
    """All of a model, in the order of its modules; see `that_run`."""
    found = []
    for name, module in model.named_modules():
        for layout in LAYOUTS:
            makes, reads = (_part(module, path) for path in layout)
            if isinstance(makes, nn.Linear | Conv1D) and isinstance(reads, nn.Linear | Conv1D):
                found.append(HiddenUnits(name, makes, reads))
        if isinstance(module, ResNetBasicLayer | ResNetBottleNeckLayer):
            for i, (first, second) in enumerate(pairwise(module.layer)):
                units = HiddenUnits(f"{name}.layer.{i}", first.convolution, second.convolution, first.normalization)
                found.append(units)
    return found


def that_run(family: ModuleType, model: nn.Module) -> list[HiddenUnits]:
    """Those that a graph of the model runs: a model of several tasks has more."""
    called = running(family, model)
    return [hidden for hidden in hidden_units(model) if hidden.makes in called]


@torch.inference_mode()
def running(family: ModuleType, model: nn.Module) -> set[nn.Module]:
    """All modules that are called when the model's graphs are."""
    called: set[nn.Module] = set()
    handle = register_module_forward_pre_hook(lambda module, _inputs: called.add(module))
    try:
        for component in family.components(model):
            component.module(**component.example(batch=1, small=True))
    finally:
        handle.remove()
    return called


def _part(module: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(module)
    except AttributeError:
        return None
