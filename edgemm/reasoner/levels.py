"""Progressive reasoning in three levels, each of which can answer: objects, relations between them, implications.

Axes: B questions, N scenes (B a multiple of N: the questions of a scene stand together), T words, K keys, S slots,
D width, M modalities, A answers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.config import MODALITIES, ScenesConfig
from edgemm.reasoner.fusion import Gates, Layer, SparseAttention
from edgemm.reasoner.graph import HeteroGraph
from edgemm.reasoner.model import Attention, additive_mask


class Objects(nn.Module):
    """Learned slots that gather what stands in a scene; they know of no question, so a scene has them once."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        d = config.width
        self.slots = nn.Parameter(torch.randn(1, config.slots, d) * 0.5)
        self.cross = nn.ModuleDict({m: SparseAttention(d, config.heads, config.drop_head) for m in MODALITIES})
        self.norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.fc1, self.fc2 = nn.Linear(d, config.ffn_ratio * d), nn.Linear(config.ffn_ratio * d, d)

    def forward(self, keys: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """keys by modality [N,K,D], present [N,M] -> slots [N,S,D]."""
        slots = self.slots.expand(present.shape[0], -1, -1).clone()
        x = self.norm(slots)
        for name, tokens in keys.items():
            slots = slots + self.cross[name](x, tokens) * present[:, MODALITIES.index(name), None, None]
        return slots + self.fc2(F.gelu(self.fc1(self.ffn_norm(slots))))


class Relations(nn.Module):
    """Slots attend to each other: what one is to another."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        d = config.width
        self.norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attention = Attention(d, config.heads, config.drop_head)
        self.fc1, self.fc2 = nn.Linear(d, config.ffn_ratio * d), nn.Linear(config.ffn_ratio * d, d)

    def forward(self, slots: Tensor) -> Tensor:
        """slots [N,S,D] -> [N,S,D]."""
        x = self.norm(slots)
        slots = slots + self.self_attention(x, x)
        return slots + self.fc2(F.gelu(self.fc1(self.ffn_norm(slots))))


class Exit(nn.Module):
    """An answer from the first word of a level; `temperature`, fitted afterwards, makes its confidence true."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.hidden = nn.Linear(config.width, config.width)
        self.answer = nn.Linear(config.width, len(config.answers))
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, words: Tensor) -> Tensor:
        """words [B,T,D] -> logits [B,A]."""
        return self.answer(F.gelu(self.hidden(self.norm(words[:, 0])))) / self.temperature


class Level(nn.Module):
    """One level, 0 to 2: its slots, its layers, its exit.

    Nothing looks at the slots of level 0 before level 1 does: `gather` makes them then, if it comes to that.
    """

    def __init__(self, config: ScenesConfig, index: int) -> None:
        super().__init__()
        self.gates = None if index else Gates(config)
        self.slots: nn.Module = Relations(config) if index else Objects(config)
        self.graph = HeteroGraph(config) if not index and "graph" in config.alignment else None
        looks = MODALITIES if "attention" in config.alignment else ()
        names = (*looks, "slots") if index else looks
        self.layers = nn.ModuleList(Layer(config, names) for _ in range(config.levels[index]))
        self.exit = Exit(config)

    def gather(self, keys: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """Of level 0: keys by modality [N,K,D], present [B,M] -> slots [N,S,D]."""
        slots: Tensor = self.slots(keys, one_each(keys, present))
        return slots

    def first(
        self, words: Tensor, mask: Tensor, keys: Mapping[str, Tensor], present: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of level 0: words [B,T,D], mask int64 [B,T], keys by modality [N,K,D], absent ones left out, present [B,M]
        -> words, gates [B,M], exit [B,A]."""
        assert self.gates is not None
        gates = self.gates(words, keys, present)
        if self.graph is not None:
            words, keys = self.graph(words, mask, keys, one_each(keys, present))
        words, answer = self.read(words, mask, keys, gates)
        return words, gates, answer

    def later(
        self, words: Tensor, mask: Tensor, keys: Mapping[str, Tensor], gates: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of levels 1 and 2: `slots` [N,S,D] of the level before, the gates -> words, slots, exit."""
        slots = self.slots(slots)
        words, answer = self.read(words, mask, {**keys, "slots": slots}, gates)
        return words, slots, answer

    def read(self, words: Tensor, mask: Tensor, keys: Mapping[str, Tensor], gates: Tensor) -> tuple[Tensor, Tensor]:
        """Words that look at all keys, and what they answer: [B,T,D], [B,A]."""
        additive = additive_mask(mask, words.dtype)
        for layer in self.layers:
            words = layer(words, additive, keys, gates)
        return words, self.exit(words)


def one_each(keys: Mapping[str, Tensor], present: Tensor) -> Tensor:
    """present [B,M] -> [N,M]: the questions of a scene have the same."""
    scenes = next(iter(keys.values())).shape[0] if keys else present.shape[0]
    return present if present.shape[0] == scenes else present[:: present.shape[0] // scenes]
