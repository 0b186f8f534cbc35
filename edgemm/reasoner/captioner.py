"""Captions, word by word: a causal decoder that looks at the tokens of a picture, with a key/value cache.

Axes: N scenes, T words, P words in the cache, K keys, H heads, d width of a head, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.encoders import line_signal
from edgemm.reasoner.model import Attention, attend

Pair = tuple[Tensor, Tensor]
BEGIN, END = 2, 3  # [CLS] and [SEP] of corpus.build_tokenizer


class CaptionLayer(nn.Module):
    """Pre-norm: words attend to those before them, then to the picture, then a feed-forward step."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        d = config.width
        self.self_norm, self.cross_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attention, self.cross_attention = Attention(d, config.heads), Attention(d, config.heads)
        self.fc1, self.fc2 = nn.Linear(d, config.ffn_ratio * d), nn.Linear(config.ffn_ratio * d, d)

    def forward(
        self, states: Tensor, mask: Tensor | None, past: Pair | None, cross: Pair, cross_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """states [N,T,D], past and cross (key, value) [N,H,..,d] -> states, key and value of all P+T words.

        mask, cross_mask   what is added to the scores of words [..,T,P+T], and of the picture's tokens [..,K]
        """
        own, fused = self.self_attention, not self.training
        x = self.self_norm(states)
        query, key, value = (heads(project(x), own) for project in (own.q_proj, own.k_proj, own.v_proj))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        states = states + own.o_proj(joined(attend(query, key, value, mask, fused=fused)))
        other = self.cross_attention
        query = heads(other.q_proj(self.cross_norm(states)), other)
        states = states + other.o_proj(joined(attend(query, *cross, cross_mask, fused=fused)))
        return states + self.fc2(F.gelu(self.fc1(self.ffn_norm(states)))), key, value


def heads(x: Tensor, attention: Attention) -> Tensor:
    """[N,T,H*d] -> [N,H,T,d]."""
    return x.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2)


def joined(context: Tensor) -> Tensor:
    """[N,H,T,d] -> [N,T,H*d]."""
    return context.transpose(1, 2).flatten(2)


class CaptionWords(nn.Module):
    """Words and their places."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding.from_pretrained(line_signal(config.max_tokens, config.width), freeze=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """int64 [N,T] each -> [N,T,D]."""
        return self.words(ids) + self.places(positions)


class Captioner(nn.Module):
    """The decoder, for training whole sentences at once; exported, it goes word by word."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.embed = CaptionWords(config)
        self.layers = nn.ModuleList(CaptionLayer(config) for _ in range(config.caption_layers))
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.vocab_size))

    def cross(self, tokens: Tensor) -> list[Pair]:
        """tokens [N,K,D] of a picture -> keys and values [N,H,K,d] of each layer, which all words share."""
        found = []
        for layer in self.layers:
            assert isinstance(layer, CaptionLayer)
            other = layer.cross_attention
            found.append((heads(other.k_proj(tokens), other), heads(other.v_proj(tokens), other)))
        return found

    def forward(self, ids: Tensor, tokens: Tensor) -> Tensor:
        """ids int64 [N,T] of captions, tokens [N,K,D] of their pictures -> logits [N,T,V] of what follows each word."""
        length = ids.shape[1]
        states = self.embed(ids, torch.arange(length).expand_as(ids))
        mask = torch.full((length, length), -torch.inf).triu(1)
        for layer, cross in zip(self.layers, self.cross(tokens), strict=True):
            states, _, _ = layer(states, mask.to(states.dtype), None, cross)
        return self.head(states)

    @torch.inference_mode()
    def write(self, tokens: Tensor) -> list[list[int]]:
        """tokens [N,K,D] of pictures -> the likeliest word at each step until END, as ids without BEGIN and END."""
        cross: list[Pair] = self.cross(tokens)
        past: list[Pair | None] = [None] * len(cross)
        ids, written = torch.full((len(tokens), 1), BEGIN), []
        for place in range(self.embed.places.num_embeddings - 1):  # a place is left for the last word itself
            states = self.embed(ids, torch.full_like(ids, place))
            for i, layer in enumerate(self.layers):
                states, key, value = layer(states, None, past[i], cross[i])
                past[i] = key, value
            ids = self.head(states).argmax(-1)
            written.append(ids[:, 0])
            if bool((torch.stack(written, 1) == END).any(1).all()):
                break
        rows: list[list[int]] = torch.stack(written, 1).tolist()
        return [row[: row.index(END)] if END in row else row for row in rows]
