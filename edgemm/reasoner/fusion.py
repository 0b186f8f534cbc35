"""How words look at images and recordings, and how much each of these counts.

Axes: B questions, N scenes (B a multiple of N: the questions of a scene stand together), T words, K keys, D width,
M modalities, in the order of config.MODALITIES.

Every modality has attention heads of its own, so that they don't interfere, and an absent one is not run at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.config import MODALITIES, ScenesConfig
from edgemm.reasoner.model import Attention

ABSENT = -30.0  # and not -inf: e**-30 is nothing, and a large value would ruin the ranges that INT8 calibration sees
BOUND = 4.0  # of what the input adds to a gate's logit: no modality is lost for good, nor outdoes what is absent


class SparseAttention(Attention):
    """Attention in which every query keeps its `top_k` highest keys, 0 for all. There must be as many.

    Explicit Sparse Transformer (Zhao et al. 2019).
    """

    def __init__(self, width: int, heads: int, drop_head: float = 0.0, top_k: int = 0) -> None:
        super().__init__(width, heads, drop_head)
        self.top_k = top_k

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [B,T,D], keys [B,K,D], mask additive [B,1,1,K] or None -> [B,T,D]."""
        if not self.top_k:
            return super().forward(query, keys, mask)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

        q, k, v = split(self.q_proj(query)), split(self.k_proj(keys)), split(self.v_proj(keys))
        scores = q @ k.transpose(2, 3) / self.head_dim**0.5
        if mask is not None:
            scores = scores + mask
        lowest = scores.topk(self.top_k, dim=-1).values[..., -1:]
        scores = torch.where(scores < lowest, ABSENT + lowest, scores)
        context = scores.softmax(-1) @ v
        if self.training and self.drop_head:
            context = F.dropout1d(context.flatten(2), self.drop_head).view_as(context)
        return self.o_proj(context.transpose(1, 2).flatten(2))


class Gates(nn.Module):
    """How much each modality counts: a distribution over those that are there.

    dynamic  from the question's first token and the mean of the modality's tokens;  static  learned once
    """

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(len(MODALITIES)))
        self.hidden = self.score = None
        if config.fusion == "dynamic":
            self.hidden = nn.ModuleDict({m: nn.Linear(2 * config.width, config.width // 4) for m in MODALITIES})
            self.score = nn.ModuleDict({m: nn.Linear(config.width // 4, 1) for m in MODALITIES})

    def forward(self, question: Tensor, keys: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """question [B,T,D]; keys by modality [N,K,D]; present float [B,M], 1 where it is there -> gates [B,M].

        They sum to 1, or are all 0 where nothing is there.
        """
        scores = self.prior.expand(question.shape[0], -1)
        if self.hidden is not None and self.score is not None:
            found = []
            for m in MODALITIES:
                if m not in keys:
                    found.append(question.new_zeros(question.shape[0], 1))
                    continue
                mean = keys[m].mean(1)
                if mean.shape[0] != question.shape[0]:
                    mean = mean.repeat_interleave(question.shape[0] // mean.shape[0], 0)
                hidden = self.hidden[m](torch.cat([question[:, 0], mean], -1))
                found.append(BOUND * torch.tanh(self.score[m](F.gelu(hidden))))
            scores = scores + torch.cat(found, 1)
        return (scores + (1 - present) * ABSENT).softmax(1) * present


class Layer(nn.Module):
    """Pre-norm: words attend to each other, then to every modality by its gate, then a feed-forward step.

    keys   names of what is looked at: modalities, and `slots` where a level has them
    """

    def __init__(self, config: ScenesConfig, keys: tuple[str, ...]) -> None:
        super().__init__()
        d = config.width
        self.self_norm, self.cross_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attention = Attention(d, config.heads, config.drop_head)
        cross = {k: SparseAttention(d, config.heads, config.drop_head, config.top_k * (k in MODALITIES)) for k in keys}
        self.cross = nn.ModuleDict(cross)
        for attention in cross.values():
            # Queries and keys start alike and strong: the encoders' spaces are aligned first, so that a word
            # looks at what resembles it from the first step on.
            nn.init.xavier_uniform_(attention.q_proj.weight, gain=1.5)
            nn.init.zeros_(attention.q_proj.bias)
            attention.k_proj.load_state_dict(attention.q_proj.state_dict())
        self.fc1, self.fc2 = nn.Linear(d, config.ffn_ratio * d), nn.Linear(config.ffn_ratio * d, d)

    def forward(self, text: Tensor, mask: Tensor, keys: Mapping[str, Tensor], gates: Tensor) -> Tensor:
        """text [B,T,D], mask additive [B,1,1,T], keys by name [N,K,D], gates [B,M] -> [B,T,D]."""
        x = self.self_norm(text)
        text = text + self.self_attention(x, x, mask)
        x = self.cross_norm(text)
        for name, attention in self.cross.items():
            if name not in keys:
                continue
            looked = self._look(attention, x, keys[name])
            if name in MODALITIES:
                looked = looked * gates[:, MODALITIES.index(name), None, None]
            text = text + looked
        return text + self.fc2(F.gelu(self.fc1(self.ffn_norm(text))))

    @staticmethod
    def _look(attention: nn.Module, x: Tensor, keys: Tensor) -> Tensor:
        """The questions of a scene share its keys, which are projected once."""
        assert isinstance(attention, Attention)
        if not attention.heads:
            return attention.o_proj.bias.expand_as(x)
        if x.shape[0] == keys.shape[0]:
            return attention(x, keys)
        return attention(x.reshape(keys.shape[0], -1, x.shape[-1]), keys).reshape(x.shape)
