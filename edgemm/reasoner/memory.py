"""Long inputs in constant memory: a resampler makes a few latents of each chunk, a recurrent memory keeps what counts.

Axes: N inputs, T tokens of a chunk, L latents, M slots of the memory, D width.

The cost is linear in the length: each chunk is looked at once, by a fixed number of latents, and the memory has a
fixed number of slots. One chunk from an empty memory is the whole of a short input: there is no other path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.model import Attention


class Look(nn.Module):
    """Queries look at keys: pre-norm attention and a feed-forward step."""

    def __init__(self, width: int, heads: int, ffn_ratio: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, ffn_ratio * width), nn.Linear(ffn_ratio * width, width)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [N,L,D], keys [N,T,D], what is added to their scores [N,1,1,T] or None -> [N,L,D]."""
        queries = queries + self.attention(self.query_norm(queries), self.key_norm(keys), mask)
        return queries + self.fc2(F.gelu(self.fc1(self.ffn_norm(queries))))


class Resampler(nn.Module):
    """As many latents of any number of tokens. Keys are tokens and latents, as in Alayrac et al. 2022 (Flamingo)."""

    def __init__(self, width: int, heads: int, ffn_ratio: int, latents: int, layers: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, latents, width) * 0.5)
        self.layers = nn.ModuleList(Look(width, heads, ffn_ratio) for _ in range(layers))

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """tokens [N,T,D], the logarithm [N,T] of how much each one counts, 0 for wholly -> latents [N,L,D]."""
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        mask = F.pad(weights, (0, latents.shape[1]))[:, None, None]
        for layer in self.layers:
            latents = layer(latents, torch.cat([tokens, latents], 1), mask)
        return latents


class RecurrentMemory(nn.Module):
    """Slots that take what is new by gates, as a GRU does: between what was and a normalised candidate.

    So no slot grows, however many chunks there are.
    """

    def __init__(self, width: int, heads: int, ffn_ratio: int, slots: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, slots, width) * 0.5)
        self.look = Look(width, heads, ffn_ratio)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(2 * width, width)

    def forward(self, state: Tensor, latents: Tensor) -> Tensor:
        """state [N,M,D], how far the slots are from where they start; latents [N,L,D] of a chunk -> state [N,M,D]."""
        slots = self.start + state
        candidate = self.norm(self.look(slots, torch.cat([slots, latents], 1)))
        gate = self.gate(torch.cat([slots, candidate], 2)).sigmoid()
        return slots + gate * (candidate - slots) - self.start

    def slots(self, state: Tensor) -> Tensor:
        """What can be looked at, [N,M,D]."""
        return self.start + state
