"""Key tokens: before a layer, only those that its queries look at most go on; what the others cost leaves with them.

The choice is made for each input, by exactly the attention that the layer pays with all tokens there (as EViT does by
the class token's; Liang et al. 2022, arXiv 2202.07800). How many stay is fixed, so that shapes are: TopK and Gather in
the graph, before the layer's keys and values are projected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.models import AttentionBlock


class KeyTokens(nn.Module):
    """`keep` tokens for all of them, by `heads` of `size` that look from `width` values.

    q, k    a copy of the layer's when it was attached: heads that leave the layer later still choose, and quantizers
            find the weights of each product at one place. Nothing is learned here: a choice has no gradient
    merge   each token that goes is averaged into the one that stays and is most like it (as ToMe does, arXiv
            2210.09461, which pairs them off); without it they are dropped
    """

    def __init__(self, *, keep: int, merge: bool, heads: int, size: int, width: int, bias: bool) -> None:
        super().__init__()
        self.spec = {"keep": keep, "merge": merge, "heads": heads, "size": size, "width": width, "bias": bias}
        self.keep, self.merge = keep, merge
        self.q = nn.Linear(width, heads * size, bias=bias).requires_grad_(requires_grad=False)
        self.k = nn.Parameter(torch.empty(heads, size, width), requires_grad=False)

    @classmethod
    def of(cls, attention: AttentionBlock, keep: int, *, merge: bool) -> KeyTokens:
        """What chooses as `attention` attends now."""
        q, k, *_ = attention.linears
        shape = {"heads": attention.heads, "size": attention.head_dim, "width": q.in_features}
        made = cls(keep=keep, merge=merge, bias=q.bias is not None, **shape)
        made.q.load_state_dict(q.state_dict())
        made.k.data.copy_(k.weight.detach().view_as(made.k))
        return made.eval()

    def forward(
        self, queries: Tensor, keys: Tensor, weight: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """queries [B,T,D], keys [B,P,D], weight of each query [B,T], tokens [B,P,D] that leave, or keys -> [B,K,D]."""
        tokens = keys if tokens is None else tokens
        chosen = take(tokens, self.received(queries, keys, weight).topk(self.keep).indices)
        if not self.merge:
            return chosen
        likeness = F.normalize(tokens, dim=-1) @ F.normalize(chosen, dim=-1).transpose(1, 2)
        nearest = F.one_hot(likeness.argmax(-1), self.keep).to(tokens.dtype).transpose(1, 2)  # [B,K,P]
        # Those that stay are among the tokens: counted twice, so that none is ever an average of nothing.
        return (nearest @ tokens + chosen) / (nearest.sum(-1, keepdim=True) + 1)

    def received(self, queries: Tensor, keys: Tensor, weight: Tensor | None) -> Tensor:
        """Attention that each key gets, [B,P]: the sum over heads and queries.

        Queries go through the projection of the keys, and not P keys through it. Its bias adds the same to all
        scores of a query, which softmax does not see.
        """
        heads, size, _ = self.k.shape
        split = self.q(queries).unflatten(-1, (heads, size)).transpose(1, 2)
        scores = (split @ self.k).flatten(1, 2) @ keys.transpose(1, 2)
        paid = (scores * size**-0.5).softmax(-1)
        if weight is not None:
            paid = paid * weight.repeat(1, heads)[..., None]
        return paid.sum(1)


@dataclass(frozen=True, slots=True)
class TokenLayer:
    """A layer before which tokens can leave.

    name       dotted path in the model
    tokens     how many reach the first layer; a class token is not counted and always stays
    attention  of the layer, which chooses;  kept  what an earlier pass has attached
    attach     puts a KeyTokens before the layer, in place of an earlier one
    """

    name: str
    tokens: int
    attention: AttentionBlock
    kept: KeyTokens | None
    attach: Callable[[KeyTokens], None]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B,P,D], index [B,K] -> [B,K,D], as a Gather of whole rows."""
    first = torch.arange(tokens.shape[0])[:, None] * tokens.shape[1]
    return F.embedding(index + first, tokens.flatten(0, 1))


def specs(layers: list[TokenLayer]) -> dict[str, dict[str, Any]]:
    """What a config keeps of them, by layer."""
    return {layer.name: layer.kept.spec for layer in layers if layer.kept}


def restore(layers: list[TokenLayer], found: dict[str, dict[str, Any]]) -> None:
    """Attach what `specs` said."""
    for layer in layers:
        if (spec := found.get(layer.name)) is not None:
            layer.attach(KeyTokens(**spec).eval())


def left(layers: list[TokenLayer]) -> int:
    """Tokens that come out of the last layer."""
    return min([layers[0].tokens, *(layer.kept.keep for layer in layers if layer.kept)])


def class_token_layers(found: list[tuple[str, nn.Module, nn.Module, AttentionBlock]], tokens: int) -> list[TokenLayer]:
    """Layers of a pre-norm encoder whose first token is the class token, which chooses and stays.

    found   (name, layer, the norm before its attention, the attention) in the order they run
    tokens  without the class token
    """

    def attach(first: int, kept: KeyTokens) -> None:
        found[first][1].key_tokens = kept
        for _, module, norm, _ in found[first:]:
            if not hasattr(module, "fewer_tokens"):
                module.fewer_tokens = True  # type: ignore[assignment]
                module.register_forward_pre_hook(partial(before_layer, norm))

    return [
        TokenLayer(name, tokens, attention, getattr(module, "key_tokens", None), partial(attach, i))
        for i, (name, module, _, attention) in enumerate(found)
    ]


def before_layer(norm: nn.Module, layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a layer takes instead of (hidden, mask, ...): fewer tokens, and no mask, which is for all and hides none."""
    hidden, _, *others = args
    if hasattr(layer, "key_tokens"):
        read = norm(hidden)
        stay = layer.key_tokens(read[:, :1], read[:, 1:], tokens=hidden[:, 1:])
        hidden = torch.cat([hidden[:, :1], stay], 1)
    return hidden, None, *others
