"""Progressive reasoning in three levels, each of which can answer: objects, relations between them, implications.

Axes: B questions, N scenes (B a multiple of N: the questions of a scene stand together), T words, K keys, S slots,
D width, M modalities, A answers. Each level is exported as a graph of its own:

    level_1  question [B,T,D], question_mask [B,T], image_keys, audio_keys [N,K,D], present [B,M]
             -> words_1 [B,T,D], slots_1 [N,S,D], gates [B,M], exit_1 [B,A]
    level_2  words_1, question_mask, image_keys, audio_keys, gates, slots_1 -> words_2, slots_2, exit_2
    level_3  words_2, question_mask, image_keys, audio_keys, gates, slots_2 -> logits [B,A]
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
    """One level, 0 to 2: its slots, its layers, its exit."""

    def __init__(self, config: ScenesConfig, index: int) -> None:
        super().__init__()
        self.gates = None if index else Gates(config)
        self.slots: nn.Module = Relations(config) if index else Objects(config)
        self.graph = HeteroGraph(config) if not index and "graph" in config.alignment else None
        looks = MODALITIES if "attention" in config.alignment else ()
        names = (*looks, "slots") if index else looks
        self.layers = nn.ModuleList(Layer(config, names) for _ in range(config.levels[index]))
        self.exit = Exit(config)

    def run(
        self, words: Tensor, mask: Tensor, keys: Mapping[str, Tensor], weights: Tensor, slots: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """words [B,T,D], mask int64 [B,T], keys by modality [N,K,D], absent ones left out -> words, slots, gates, exit.

        weights   of level 0: which modalities are there, [B,M]; of later ones: the gates
        slots     [N,S,D] of the level before
        """
        if self.gates is not None:
            gates = self.gates(words, keys, weights)
            scenes = next(iter(keys.values())).shape[0] if keys else weights.shape[0]
            one_each = weights if weights.shape[0] == scenes else weights[:: weights.shape[0] // scenes]
            slots = self.slots(keys, one_each)
            if self.graph is not None:
                words, keys = self.graph(words, mask, keys, one_each)
        else:
            gates, slots = weights, self.slots(slots)
        additive = additive_mask(mask, words.dtype)
        seen = {**keys, "slots": slots}
        for layer in self.layers:
            words = layer(words, additive, seen, gates)
        return words, slots, gates, self.exit(words)


class LevelGraph(nn.Module):
    """A level as a graph: both modalities' keys as inputs, one of zeros where a modality is absent."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.level = level


class FirstGraph(LevelGraph):
    def forward(
        self, question: Tensor, question_mask: Tensor, image_keys: Tensor, audio_keys: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the module's docstring."""
        keys = {"image": image_keys, "audio": audio_keys}
        return self.level.run(question, question_mask, keys, present, None)


class MiddleGraph(LevelGraph):
    def forward(
        self,
        words_1: Tensor,
        question_mask: Tensor,
        image_keys: Tensor,
        audio_keys: Tensor,
        gates: Tensor,
        slots_1: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the module's docstring."""
        keys = {"image": image_keys, "audio": audio_keys}
        words, slots, _, logits = self.level.run(words_1, question_mask, keys, gates, slots_1)
        return words, slots, logits


class LastGraph(LevelGraph):
    def forward(
        self,
        words_2: Tensor,
        question_mask: Tensor,
        image_keys: Tensor,
        audio_keys: Tensor,
        gates: Tensor,
        slots_2: Tensor,
    ) -> Tensor:
        """See the module's docstring."""
        keys = {"image": image_keys, "audio": audio_keys}
        return self.level.run(words_2, question_mask, keys, gates, slots_2)[3]
