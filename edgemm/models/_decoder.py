"""What decoders share that are exported with a key/value cache: ports, mask, attention, generation settings.

The tensors of a decoder of text, T new tokens after P in the cache (see program.Generation):
    decoder_input_ids, position_ids int64[B,T], decoder_attention_mask int64[B,P+T], logits float32[B,V]
    past_key_i, past_value_i float32[B,H,P,d], present_key_i, present_value_i float32[B,H,P+T,d]  of layer i
    cross_key_i, cross_value_i float32[B,H,K,d]  keys and values of the cross-attention, which the encoder makes
    cross_bias float32[B,1,1,K]  what is added to the scores of those keys, where they do not count alike
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from edgemm.errors import InputError
from edgemm.models import AttentionBlock, Component, Tensor
from edgemm.models._transformers import read_json
from edgemm.plugins import validate

HIDDEN = -1e4  # added to scores: exp of it is 0 in float32, and float16 holds it
MAX_BATCH = 64
DEFAULT_NEW_TOKENS = 20  # what transformers makes where nothing says how many
Pair = tuple[torch.Tensor, torch.Tensor]
# Settings of generate that change its result and are not in program.Generation -> values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "early_stopping": (None, False),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "repetition_penalty": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "renormalize_logits": (None, False),
    "return_timestamps": (None, False),
}


class Settings(BaseModel):
    """What is read of generation_config.json; names and defaults are transformers'."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    decoder_start_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int]
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None

    @property
    def start(self) -> int:
        """The id that every text begins with."""
        start = self.bos_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id
        if start is None:
            raise InputError("generation_config.json has no decoder_start_token_id", fix="write it there")
        return start

    def generation(self, layers: int, prompt: list[int], max_new_tokens: int) -> dict[str, Any]:
        """program.json's `output` for a decoder of so many layers."""
        return {
            "kind": "generation",
            "cache": [[f"past_{part}_{i}", f"present_{part}_{i}"] for i in range(layers) for part in ("key", "value")],
            "prompt": prompt,
            "eos": self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id],
            "suppress": self.suppress_tokens or [],
            "suppress_first": self.begin_suppress_tokens or [],
            "max_new_tokens": max_new_tokens,
            "beams": self.num_beams or 1,
            "length_penalty": 1.0 if self.length_penalty is None else self.length_penalty,
        }

    def new_tokens(self, prompt: list[int]) -> int:
        """How many tokens generate makes at most: `max_length` counts the prompt."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return DEFAULT_NEW_TOKENS if self.max_length is None else self.max_length - len(prompt)


def read_settings(model: Any, directory: Path, kind: type[Settings] = Settings) -> Any:
    """generation_config.json as `kind`, or what config.json says where there is none.

    Raises InputError when a setting asks for a search that program.Generation can't say.
    """
    name = "generation_config.json"
    values = read_json(directory, name) if (directory / name).is_file() else model.generation_config.to_dict()
    for setting, neutral in NEUTRAL.items():
        if (value := values.get(setting)) not in neutral:
            raise InputError(
                f"{directory}: {name} sets {setting} = {value!r}, which is not supported",
                fix="remove it there: text is made by greedy or beam search",
            )
    return validate(kind, values, f"{directory}: {name}")


def heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[B,T,H*d] -> [B,H,T,d]."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scaled queries, keys, values [B,H,...,d] and what is added to the scores -> [B,T,H*d].

    Written out: of scaled_dot_product_attention the exporter makes a quarter more nodes, and OpenVINO fuses both.
    """
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def causal(mask: torch.Tensor, past: int, tokens: int) -> torch.Tensor:
    """int64[B,P+T], 0 where a slot holds nothing -> float32[B,1,T,P+T] to add: what a token must not see is HIDDEN."""
    slots = torch.arange(past + tokens)
    # The length is taken from `slots`: axes of different names may not be joined in torch.export.
    filled = mask.index_select(1, slots.clamp(max=mask.shape[1] - 1))
    seen = (slots <= torch.arange(past, past + tokens)[:, None]) & (filled[:, None, None] != 0)
    return torch.where(seen, 0.0, HIDDEN)


class CachedDecoder(nn.Module):
    """A whole decoder as one graph.

    embed   module: ids, positions int64[B,T] -> float32[B,T,D]
    layers  modules: states, added mask, past (key, value), cross (key, value) or None, what is added to the scores of
            cross or None -> states, key, value
    head    module: states of one token [B,D] -> logits [B,V]
    inputs  names of the inputs, in order
    """

    def __init__(self, embed: nn.Module, layers: Iterable[nn.Module], head: nn.Module, inputs: list[str]) -> None:
        super().__init__()
        self.embed, self.layers, self.head = embed, nn.ModuleList(layers), head

        def forward(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.decode(**tensors)

        # torch.export asks for the names of all inputs, and there are as many as layers.
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def decode(
        self,
        decoder_input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        decoder_attention_mask: torch.Tensor,
        **cache: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        states = self.embed(decoder_input_ids, position_ids)
        mask = causal(decoder_attention_mask, cache["past_key_0"].shape[2], decoder_input_ids.shape[1])
        present = []
        for i, layer in enumerate(self.layers):
            past = cache[f"past_key_{i}"], cache[f"past_value_{i}"]
            states, key, value = layer(states, mask, past, cached_cross(cache, i), cache.get("cross_bias"))
            present += [key, value]
        return self.head(states[:, -1]), *present


def decoder(
    embed: nn.Module,
    layers: list[nn.Module],
    head: nn.Module,
    sizes: list[tuple[int, int]],
    cross: tuple[Tensor, ...],
    *,
    vocabulary: int,
    positions: int,
    keys: int = 0,
) -> Component:
    """The component `decoder`.

    embed, layers, head  see CachedDecoder
    sizes      (heads, head_dim) of each layer's self-attention
    cross      what the encoder makes, see cache_ports
    positions  the most tokens that the decoder has positions for
    keys       the most keys of the cross-attention, where their number is an axis of that name
    """
    inputs = (
        Tensor("decoder_input_ids", "int64", ("batch", "tokens")),
        Tensor("position_ids", "int64", ("batch", "tokens")),
        Tensor("decoder_attention_mask", "int64", ("batch", "total")),
        *cache_ports("past", sizes, "past"),
        *cross,
    )
    outputs = (Tensor("logits", "float32", ("batch", vocabulary)), *cache_ports("present", sizes, "total"))
    module = CachedDecoder(embed, layers, head, [port.name for port in inputs])
    max_sizes = {"batch": MAX_BATCH, "tokens": positions, "past": positions, "total": 2 * positions}
    max_sizes |= {"keys": keys} if keys else {}
    high = {"decoder_input_ids": vocabulary, "position_ids": positions}
    return Component("decoder", module.eval(), inputs, outputs, max_sizes, high)


def cache_ports(kind: str, sizes: list[tuple[int, int]], length: int | str) -> tuple[Tensor, ...]:
    """<kind>_key_i and <kind>_value_i float32[B,H,length,d] of each layer of (heads, head_dim) in `sizes`.

    A cross-attention without heads has none.
    """
    return tuple(
        Tensor(f"{kind}_{part}_{i}", "float32", ("batch", n, length, width))
        for i, (n, width) in enumerate(sizes)
        for part in ("key", "value")
        if n
    )


def cached_cross(cache: Mapping[str, torch.Tensor], layer: int) -> Pair | None:
    """Key and value of a layer's cross-attention; None where it has no head left."""
    name = f"cross_key_{layer}"
    return (cache[name], cache[f"cross_value_{layer}"]) if name in cache else None


class BartKeys(nn.Module):
    """Encoder states [B,K,D] -> key and value [B,H,K,d] of one cross-attention."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.head_dim = attention.k_proj, attention.v_proj, attention.head_dim

    def forward(self, states: torch.Tensor) -> Pair:
        return heads(self.k_proj(states), self.head_dim), heads(self.v_proj(states), self.head_dim)


class BartLayer(nn.Module):
    """A decoder layer of BART's parts, which Whisper (`normalize_first`) and TrOCR have; see CachedDecoder."""

    def __init__(self, layer: Any, *, normalize_first: bool) -> None:
        super().__init__()
        self.layer, self.normalize_first = layer, normalize_first

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, past: Pair, cross: Pair | None, cross_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = self.layer

        def before(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return norm(x) if self.normalize_first else x

        def after(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return x if self.normalize_first else norm(x)

        def query(attention: Any, x: torch.Tensor) -> torch.Tensor:
            return heads(attention.q_proj(x) * attention.scaling, attention.head_dim)

        own, other = layer.self_attn, layer.encoder_attn
        x = before(layer.self_attn_layer_norm, states)
        key = torch.cat([past[0], heads(own.k_proj(x), own.head_dim)], 2)
        value = torch.cat([past[1], heads(own.v_proj(x), own.head_dim)], 2)
        states = states + own.out_proj(attend(query(own, x), key, value, mask))
        states = after(layer.self_attn_layer_norm, states)
        if cross is None:
            states = states + other.out_proj.bias
        else:
            x = before(layer.encoder_attn_layer_norm, states)
            states = states + other.out_proj(attend(query(other, x), *cross, cross_mask))
        states = after(layer.encoder_attn_layer_norm, states)
        x = before(layer.final_layer_norm, states)
        states = states + layer.fc2(layer.activation_fn(layer.fc1(x)))
        return after(layer.final_layer_norm, states), key, value


def bart_attention(name: str, module: Any, queries: str, keys: str) -> AttentionBlock:
    """The AttentionBlock of a BART-like attention, cross where `queries` and `keys` differ."""
    linears = module.q_proj, module.k_proj, module.v_proj, module.out_proj
    sizes, resize = (module.num_heads, module.head_dim), partial(setattr, module, "num_heads")
    return AttentionBlock(name, "self" if queries == keys else "cross", queries, keys, *sizes, *linears, resize)
