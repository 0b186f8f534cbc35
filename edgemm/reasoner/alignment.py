"""Contrastive alignment: captions, images and recordings in one space, each near what belongs to it.

Axes: N scenes, K tokens, D width, E embedding, H hard negatives of a scene.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.config import MODALITIES, ScenesConfig
from edgemm.reasoner.model import Attention, additive_mask

QUERIES = 4
SCALE = 14.0  # of the similarities at the start, as CLIP has it (Radford et al. 2021)


class Pool(nn.Module):
    """Tokens to one unit vector: learned queries look at them, and what each found is bent before it is summed.

    The bend keeps what belongs together: a sum of tokens alone can't tell a red box and a blue ball from a blue
    box and a red ball.
    """

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        d = config.width
        self.queries = nn.Parameter(torch.randn(1, QUERIES, d) * 0.5)
        self.norm = nn.LayerNorm(d)
        self.attention = Attention(d, config.heads)
        self.hidden, self.project = nn.Linear(d, 2 * d), nn.Linear(2 * d, config.embedding)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens [N,K,D], mask int64 [N,K] or None -> [N,E], of length 1."""
        additive = None if mask is None else additive_mask(mask, tokens.dtype)
        queries = self.queries.expand(tokens.shape[0], -1, -1).clone()
        found = self.attention(queries, self.norm(tokens), additive)
        return F.normalize(self.project(F.gelu(self.hidden(found)).sum(1)), dim=-1)


class Contrast(nn.Module):
    """A pool for text and for each modality, and the learned temperature of their similarities."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.pools = nn.ModuleDict({name: Pool(config) for name in ("text", *MODALITIES)})
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by; at most 100, as CLIP has it."""
        return self.log_scale.exp().clamp(max=100.0)


def info_nce(
    text: Tensor, other: Tensor, scale: Tensor, hard: Tensor | None = None, same: Tensor | None = None
) -> Tensor:
    """Cross-entropy of finding row i of `other` among all by row i of `text`, and the other way (van den Oord 2018).

    text, other  [N,E], of length 1;  hard  texts [N,H,E] that row i of `other` must tell from its own, too
    same         bool[N,N], true where row j would be as right as row i: such pairs are left out
    """
    logits = scale * other @ text.T
    if same is not None:
        logits = logits.masked_fill(same & ~torch.eye(len(text), dtype=torch.bool), -torch.inf)
    to_other = F.cross_entropy(logits.T, torch.arange(len(text)))
    if hard is not None:
        logits = torch.cat([logits, scale * (hard @ other[:, :, None]).squeeze(2)], 1)
    return (to_other + F.cross_entropy(logits, torch.arange(len(text)))) / 2


def triplet(anchor: Tensor, positive: Tensor, negatives: Tensor, margin: float = 0.2) -> Tensor:
    """Mean of what the most similar negative lacks to be `margin` less similar than the positive.

    anchor, positive  [N,E];  negatives  [N,H,E]; all of length 1 (Schroff et al. 2015, hardest negative)
    """
    near = (anchor * positive).sum(1)
    far = (negatives @ anchor[:, :, None]).squeeze(2).amax(1)
    return F.relu(margin + far - near).mean()
