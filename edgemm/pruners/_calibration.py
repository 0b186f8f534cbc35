"""What layers read while the calibration data passes, and output projections corrected by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.errors import InputError
from edgemm.models._hidden_units import matrix

RIDGE = 1e-3  # of the mean square of a column


@torch.inference_mode()
def watch(readers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None], run: Callable[[], object]) -> None:
    """`see(name, input)` whenever one of `readers` is called during `run`.

    Raises InputError naming the readers that the data never reached.
    """
    reached = set()

    def hook(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        reached.add(name)
        see(name, inputs[0])

    handles = [module.register_forward_pre_hook(partial(hook, name)) for name, module in readers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if missed := [name for name in readers if name not in reached]:
        raise not_reached(missed)


def not_reached(layers: Sequence[str]) -> InputError:
    return InputError(
        f"the calibration data never reached {', '.join(layers)}",
        fix="give data with every modality, or name other `layers`",
    )


def rows(module: nn.Module, x: Tensor) -> Tensor:
    """The input of a layer as float32[N, columns of `matrix`], one row for each place where the matrix is applied."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2)
    assert isinstance(module.padding, tuple)
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def grams(readers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """Normal equations of each reader, float64[C+1,C+1]: sum over rows of x x^T, x the input and a 1 for the bias."""
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = F.pad(rows(readers[name], x), (0, 1), value=1.0).double()
        found[name] = found[name].addmm_(x.T, x) if name in found else x.T @ x

    watch(readers, add, run)
    return found


@torch.no_grad()
def repair(reader: nn.Module, kept: list[int], per: int, gram: Tensor, ridge: float = RIDGE) -> None:
    """Let the units that stay, and the bias, say what those that go have said, as well as least squares can.

    To be called before the units are removed: their columns stay as they are.
    kept  units of `per` columns each;  gram  see `grams`;  ridge  x mean square holds the change small
    Follows Kwon et al., NeurIPS 2022 (arXiv 2204.09656), but corrects each column and not each unit.
    """
    weight = matrix(reader)
    stays = torch.zeros(weight.shape[1], dtype=torch.bool)
    stays.view(-1, per)[kept] = True
    gone = (~stays).nonzero().flatten()
    known = stays.nonzero().flatten()
    if reader.bias is not None:
        known = torch.cat([known, torch.tensor([weight.shape[1]])])
    if not len(gone):
        return
    left = gram[known][:, known]
    left.diagonal().add_(max(ridge * float(left.diagonal().mean()), torch.finfo(torch.float64).tiny))
    change = torch.linalg.solve(left, gram[known][:, gone] @ weight[:, gone].double().T).to(weight.dtype)
    weight[:, stays] += change[: int(stays.sum())].T
    if reader.bias is not None:
        reader.get_parameter("bias").add_(change[-1])
