"""Attention layers of transformers' modules, by the names that their four Linear layers have there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from edgemm.models import AttentionBlock


def bert_attention(
    name: str,
    inner: Any,
    output: Any,
    kind: Literal["self", "cross", "merged"],
    queries: str,
    keys: str,
    block: Callable[..., AttentionBlock] = AttentionBlock,
) -> AttentionBlock:
    """As BERT and what was made from it: query, key and value are in `inner`, o is in `output`."""

    def resize(heads: int) -> None:
        inner.num_attention_heads, inner.all_head_size = heads, heads * inner.attention_head_size

    linears = inner.query, inner.key, inner.value, output.dense
    return block(name, kind, queries, keys, inner.num_attention_heads, inner.attention_head_size, *linears, resize)


def vit_attention(name: str, module: Any) -> AttentionBlock:
    """As ViT and DeiT, and BLIP's images once q, k and v are layers."""
    linears = module.q_proj, module.k_proj, module.v_proj, module.o_proj
    sizes, resize = (module.num_attention_heads, module.head_dim), partial(setattr, module, "num_attention_heads")
    return AttentionBlock(name, "self", "image", "image", *sizes, *linears, resize)
