"""A heterogeneous graph over one scene: words, image regions and audio segments, with edges of several types.

Axes: B questions, N scenes (B a multiple of N: the questions of a scene stand together), T words, K keys, D width.

Edges join neighbours of one modality (words in a row, segments in time, the four sides of a grid's cell), and nodes of
two modalities whose cosine similarity is above a threshold, weighted by it. Messages pass by a weight of the edge's
type (R-GCN, Schlichtkrull et al. 2017). No edge leads from a word to another modality: what is asked does not change
what is seen, and a scene's own nodes are computed once for all its questions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.config import MODALITIES, ScenesConfig

NODES = ("text", *MODALITIES)
ACROSS = (("image", "text"), ("audio", "text"), ("audio", "image"), ("image", "audio"))  # from, to


class HeteroGraph(nn.Module):
    """One round of message passing."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.side = config.side
        self.threshold = config.graph_threshold
        d = config.width

        def weight() -> nn.Linear:
            return nn.Linear(d, d, bias=False)  # nodes of zeros, of an absent modality, send nothing

        self.norm = nn.ModuleDict({n: nn.LayerNorm(d) for n in NODES})
        self.own, self.near = (nn.ModuleDict({n: weight() for n in NODES}) for _ in range(2))
        self.across = nn.ModuleDict({f"{source}_{target}": weight() for source, target in ACROSS})

    def forward(
        self, words: Tensor, mask: Tensor, keys: Mapping[str, Tensor], present: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """words [B,T,D], mask int64 [B,T], keys by modality [N,K,D], present [N,M] -> words, keys."""
        there = {"text": mask[..., None].to(words.dtype)}
        there |= {m: present[:, MODALITIES.index(m), None, None].expand(-1, k.shape[1], 1) for m, k in keys.items()}
        nodes = {"text": words, **keys}
        normed = {n: self.norm[n](x) * there[n] for n, x in nodes.items()}
        made = {}
        for name, x in normed.items():
            message = self.own[name](x) + self.near[name](
                neighbours(x, there[name], self.side if name == "image" else 0)
            )
            for source, target in ACROSS:
                if target == name and source in keys:
                    message = message + self.across[f"{source}_{target}"](similar(x, normed[source], self.threshold))
            made[name] = nodes[name] + F.gelu(message)
        return made.pop("text"), made


def neighbours(x: Tensor, there: Tensor, side: int) -> Tensor:
    """The mean of each node's neighbours in x [N,K,D], 0 where it has none; there [N,K,1], 0 for nodes that are none.

    side   of a grid whose cells stand row by row; 0: the nodes are one row
    """
    steps = (1, -1, side, -side) if side else (1, -1)
    column = torch.arange(x.shape[1]) % side if side else None
    total, count = torch.zeros_like(x), torch.zeros_like(there)
    for step in steps:
        sent, sender = shift(x, step), shift(there, step)
        if column is not None and abs(step) == 1:  # a row's end is no neighbour of the next one's beginning
            keep = (column != (0 if step == 1 else side - 1)).to(x.dtype)[None, :, None]
            sent, sender = sent * keep, sender * keep
        total, count = total + sent, count + sender
    return total / count.clamp(min=1)


def shift(x: Tensor, step: int) -> Tensor:
    """x [N,K,D] with row i where row i + step was; zeros move in."""
    if step > 0:
        return F.pad(x, (0, 0, step, 0))[:, :-step]
    return F.pad(x, (0, 0, 0, -step))[:, -step:]


def similar(x: Tensor, others: Tensor, threshold: float) -> Tensor:
    """For each node of x [B,T,D] the mean of `others` [N,K,D] with a cosine above `threshold`, by the cosine."""
    grouped = x if x.shape[0] == others.shape[0] else x.reshape(others.shape[0], -1, x.shape[-1])
    cosine = F.normalize(grouped, dim=-1, eps=1e-6) @ F.normalize(others, dim=-1, eps=1e-6).transpose(1, 2)
    edges = torch.where(cosine > threshold, cosine, torch.zeros_like(cosine))
    found = edges @ others / edges.sum(-1, keepdim=True).clamp(min=1e-6)
    return found.reshape(x.shape)
