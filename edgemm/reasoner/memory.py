"""Long inputs in constant memory: a resampler makes a few latents of each chunk, a memory keeps what counts of them.

Axes: N inputs, T keys, L latents of a chunk, W latents of the window, M slots, D width.

The cost is linear in the length: each chunk is looked at once, the memory is a window of the last chunks' latents and a
fixed number of slots. One chunk from an empty memory is the whole of a short input: there is no other path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.model import Attention

NOTHING = 1e-13  # e**-30: as good as not there


class Look(nn.Module):
    """Queries look at keys: pre-norm attention and a feed-forward step.

    alike  queries and keys start alike and strong, so that each looks at what resembles it from the first step on
    """

    def __init__(self, width: int, heads: int, ffn_ratio: int, *, alike: bool = False) -> None:
        super().__init__()
        self.query_norm, self.key_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, ffn_ratio * width), nn.Linear(ffn_ratio * width, width)
        if alike:
            nn.init.xavier_uniform_(self.attention.q_proj.weight, gain=1.5)
            nn.init.zeros_(self.attention.q_proj.bias)
            self.attention.k_proj.load_state_dict(self.attention.q_proj.state_dict())

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries [N,L,D], keys [N,T,D], what is added to their scores [N,1,1,T] or None -> [N,L,D]."""
        queries = queries + self.attention(self.query_norm(queries), self.key_norm(keys), mask)
        return queries + self.fc2(F.gelu(self.fc1(self.ffn_norm(queries))))


class Resampler(nn.Module):
    """A latent of each seed, however many tokens there are. Keys are both, as in Alayrac et al. 2022 (Flamingo).

    Seeds are tokens themselves, and not learned queries: each is of one thing from the first step on.
    """

    def __init__(self, width: int, heads: int, ffn_ratio: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Look(width, heads, ffn_ratio, alike=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, seeds: Tensor, names: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        """seeds [N,L,D], tokens [N,T,D], the logarithm [N,T] of how much each counts, 0 for wholly -> latents [N,L,D].

        names  [N,L,D] of what seeds are of: half of a latent, so that words find it by them
        The squares of a latent's numbers are 1 on average.
        """
        mask = F.pad(weights, (0, seeds.shape[1]))[:, None, None]
        for layer in self.layers:
            seeds = layer(seeds, torch.cat([tokens, seeds], 1), mask)
        latents: Tensor = self.norm(self.norm(seeds) + names)
        return latents


class RecurrentMemory(nn.Module):
    """A window of the last chunks' latents, and slots that take what leaves it.

    As in Rae et al. 2020 (Compressive Transformer), but slots take by gates, as a GRU does: between what was and a
    normalised candidate, so none grows, however many chunks there are. The state [N,W+M,D] is the window, oldest first,
    zeros where there was nothing, then how far the slots are from where they start. Any W that is a multiple of L will
    do.
    """

    def __init__(self, width: int, heads: int, ffn_ratio: int, slots: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, slots, width) * 0.5)
        self.look = Look(width, heads, ffn_ratio)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(2 * width, width)

    def forward(self, state: Tensor, latents: Tensor) -> Tensor:
        """state [N,W+M,D], latents [N,L,D] of a chunk -> state [N,W+M,D]."""
        window, slots = self.parts(state)
        leaves, stays = window[:, : latents.shape[1]], window[:, latents.shape[1] :]
        return torch.cat([stays, latents, self.absorb(slots, leaves) - self.start], 1)

    def absorb(self, slots: Tensor, leaves: Tensor) -> Tensor:
        """slots [N,M,D], the latents [N,L,D] that leave the window -> slots [N,M,D]; nothing changes nothing."""
        candidate = self.norm(self.look(slots, torch.cat([slots, leaves], 1)))
        gate = self.gate(torch.cat([slots, candidate], 2)).sigmoid() * leaves.square().mean((1, 2), keepdim=True)
        return slots + gate * (candidate - slots)

    def parts(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """state [N,W+M,D] -> window [N,W,D], slots [N,M,D]."""
        count = self.start.shape[1]
        return state[:, :-count], self.start + state[:, -count:]


def known(latents: Tensor) -> Tensor:
    """The logarithm [N,L] of how much latents [N,L,D] count: 0, or -30 for zeros."""
    return latents.square().mean(2).clamp(min=NOTHING).log()
