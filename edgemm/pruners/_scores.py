"""What a head, or a link, is worth: by its weights, by what it carries, or by what the answer loses without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from edgemm.models import AttentionBlock
from edgemm.models._calibration import Calibration
from edgemm.pruners._calibration import not_reached

Edge = tuple[str, str]  # modality of the queries, of the keys


def magnitude(blocks: Sequence[AttentionBlock]) -> dict[str, list[float]]:
    """L2 norm of all weights of each head."""

    def norms(block: AttentionBlock) -> Tensor:
        *inner, o = block.linears
        rows = [linear.weight.detach().unflatten(0, (block.heads, -1)).flatten(1) for linear in inner]
        columns = o.weight.detach().T.unflatten(0, (block.heads, -1)).flatten(1)
        return torch.cat([*rows, columns], 1).norm(dim=1)

    return {b.name: norms(b).tolist() for b in blocks}


def attention(blocks: Sequence[AttentionBlock], run: Callable[[], object]) -> dict[str, list[float]]:
    """Mean over queries of sum over keys of probability x ||W_o v||, for each head (Kobayashi et al. 2020)."""
    found = links(blocks, run)
    return {b.name: found[b.name][b.queries, b.keys] for b in blocks}


@torch.inference_mode()
def links(
    blocks: Sequence[AttentionBlock], run: Callable[[], object], words: Callable[[], int] | None = None
) -> dict[str, dict[Edge, list[float]]]:
    """Magnitude of each link -> layer: edge: a number a head. Mean over queries of sum over keys, as `attention`.

    words   how many words stand before the other tokens of a merged sequence, when a layer is called; with it such
            a layer has an edge for each pair of modalities, without it one
    The calibration data must come without padding: masks (causal ones too) and added biases are not seen here.
    """
    sums: dict[str, dict[Edge, Tensor]] = {b.name: {} for b in blocks}
    counts: dict[str, dict[Edge, int]] = {b.name: {} for b in blocks}

    def parts(block: AttentionBlock, of: str, length: int) -> dict[str, slice]:
        """Where the tokens of each modality stand."""
        if block.kind != "merged" or words is None:
            return {of: slice(length)}
        first, rest = of.split("+")
        return {first: slice(words()), rest: slice(words(), length)}

    def add(b: AttentionBlock, seen: dict[str, Tensor], _m: nn.Module, _i: object) -> None:
        q, k, v = (seen[part].unflatten(-1, (b.heads, b.head_dim)).transpose(1, 2) for part in "qkv")
        probability = (q @ k.transpose(-1, -2) / b.head_dim**0.5).softmax(-1)
        o = b.linears[3].weight.T.unflatten(0, (b.heads, b.head_dim))
        carried = (v @ (o @ o.mT) * v).sum(-1, keepdim=True).clamp(min=0).sqrt()  # ||W_o v||, in H x d and not D
        for queries, rows in parts(b, b.queries, q.shape[2]).items():
            for keys, columns in parts(b, b.keys, k.shape[2]).items():
                mass = (probability[:, :, rows, columns] @ carried[:, :, columns]).sum((0, 2, 3))
                edge, n = (queries, keys), q.shape[0] * len(range(q.shape[2])[rows])
                sums[b.name][edge] = sums[b.name].get(edge, 0) + mass
                counts[b.name][edge] = counts[b.name].get(edge, 0) + n

    def remember(part: str, seen: dict[str, Tensor], _m: nn.Module, _i: object, output: Tensor) -> None:
        seen[part] = output

    handles = []
    for block in blocks:
        seen: dict[str, Tensor] = {}
        *inner, o = block.linears
        for part, linear in zip("qkv", inner, strict=True):
            handles.append(linear.register_forward_hook(partial(remember, part, seen)))
        handles.append(o.register_forward_pre_hook(partial(add, block, seen)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if missed := [name for name, found in counts.items() if not found]:
        raise not_reached(missed)
    return {name: {e: (s / counts[name][e]).tolist() for e, s in found.items()} for name, found in sums.items()}


def fisher(readers: Mapping[str, tuple[nn.Module, int]], run: Callable[[], object]) -> dict[str, list[float]]:
    """What the loss against the model itself rises by without each head or unit, by its Fisher information.

    readers  name: (what reads the heads or units, how many there are)
    A gate of 1 stands before each; half of its squared gradient, mean over samples, is the second order of what
    closing it costs, and the first order is nothing; see Calibration.losses (Kwon et al. 2022, arXiv 2204.09656).
    Raises InputError for layers that no sample reaches.
    """
    assert isinstance(run, Calibration)
    gates = {name: torch.ones(n, requires_grad=True) for name, (_, n) in readers.items()}
    sums = {name: torch.zeros(n) for name, (_, n) in readers.items()}
    reached, samples = set(), 0

    def gate(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, axis = inputs[0], 1 if isinstance(module, nn.Conv2d) else inputs[0].ndim - 1
        values = gates[name].repeat_interleave(x.shape[axis] // len(gates[name]))
        return x * values.view([-1 if i == axis else 1 for i in range(x.ndim)]), *inputs[1:]

    handles = [module.register_forward_pre_hook(partial(gate, name)) for name, (module, _) in readers.items()]
    frozen = [p for p in run.model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for loss in run.losses():
            samples += 1
            found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
            for name, gradient in zip(gates, found, strict=True):
                if gradient is not None:
                    reached.add(name)
                    sums[name] += gradient.square() / 2
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    if missed := [name for name in readers if name not in reached]:
        raise not_reached(missed)
    return {name: (total / samples).tolist() for name, total in sums.items()}
