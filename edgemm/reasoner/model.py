"""The reference multimodal reasoning model: question and image in, answer out.

Axes: B batch of questions, N batch of images, T question tokens, P image positions, D width,
H heads, A answers. Three components, each exported as a graph of its own:

    image_encoder  pixel_values [N,3,64,64]                           -> image_tokens [N,P,D]
    text_encoder   input_ids, attention_mask [B,T]                    -> text_tokens  [B,T,D]
    fusion         text_tokens, attention_mask, image_tokens          -> logits       [B,A]

The encoders are transformers' ResNet and BERT, so a user's pretrained weights load into them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel


@dataclass(frozen=True, slots=True)
class ReasonerConfig:
    """Shape of the model. `image_size` in pixels; widths in channels."""

    answers: tuple[str, ...]
    vocab_size: int
    image_size: int = 64
    image_stride: int = 4
    image_channels: tuple[int, ...] = (128,)
    image_depths: tuple[int, ...] = (3,)
    max_tokens: int = 16
    width: int = 384
    heads: int = 12
    text_layers: int = 2
    fusion_layers: int = 4
    ffn_ratio: int = 2
    drop_head: float = 0.1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReasonerConfig:
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**kept)


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 [B,T], 1 at tokens and 0 at padding -> [B,1,1,T], 0 at tokens and -30 at padding.

    -30 and not -inf: e**-30 is nothing, and a large value would ruin the ranges that INT8 calibration sees.
    """
    return (1.0 - attention_mask[:, None, None, :].to(dtype)) * -30.0


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, fused: bool) -> Tensor:
    """scaled_dot_product_attention of [B,H,..,d] each; `mask` is added to the scores.

    fused   by torch's kernel; written out it trains two to three times as fast in bfloat16 on CPUs (torch 2.13)
    """
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    return (scores if mask is None else scores + mask).softmax(-1) @ value


class Attention(nn.Module):
    """Multi-head attention whose head count may be cut after training: `heads * head_dim` need not be D.

    In training whole heads are dropped at random (DropHead, Zhou et al. 2020), so that no head
    becomes indispensable; kept heads are rescaled, and nothing happens at inference.
    """

    def __init__(self, width: int, heads: int, drop_head: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_dim, self.drop_head = heads, width // heads, drop_head
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [B,T,D], keys [B,P,D], mask additive [B,1,1,P] or None -> [B,T,D]."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

        q, k, v = split(self.q_proj(query)), split(self.k_proj(keys)), split(self.v_proj(keys))
        context = attend(q, k, v, mask, fused=not self.training)
        if self.training and self.drop_head:
            context = F.dropout1d(context.flatten(2), self.drop_head).view_as(context)
        return self.o_proj(context.transpose(1, 2).flatten(2))


class FusionLayer(nn.Module):
    """Pre-norm: text attends to itself, then to the image, then a feed-forward step."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        d = config.width
        self.self_norm, self.cross_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attention = Attention(d, config.heads, config.drop_head)
        self.cross_attention = Attention(d, config.heads, config.drop_head)
        # Queries and keys start alike and strong: the encoders' spaces are aligned first (train.py, stage
        # 1), so that a word looks at what resembles it from the first step on.
        nn.init.xavier_uniform_(self.cross_attention.q_proj.weight, gain=1.5)
        nn.init.zeros_(self.cross_attention.q_proj.bias)
        self.cross_attention.k_proj.load_state_dict(self.cross_attention.q_proj.state_dict())
        self.fc1, self.fc2 = nn.Linear(d, config.ffn_ratio * d), nn.Linear(config.ffn_ratio * d, d)
        self.key_tokens: nn.Module | None = None

    def forward(self, text: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """text [B,T,D], mask additive [B,1,1,T], image [N,P,D] with B a multiple of N -> [B,T,D], image.

        Where B > N (training), the B/N questions of an image stand together and share its keys.
        With `key_tokens`, which pruning attaches, B = N and the image that goes on is [B,K,D].
        """
        x = self.self_norm(text)
        text = text + self.self_attention(x, x, mask)
        x = self.cross_norm(text)
        if self.key_tokens is not None:
            image = self.key_tokens(x, image, mask[:, 0, 0].exp())
        if not self.cross_attention.heads:
            text = text + self.cross_attention.o_proj.bias
        elif text.shape[0] == image.shape[0]:
            text = text + self.cross_attention(x, image)
        else:
            grouped = x.reshape(image.shape[0], -1, x.shape[-1])
            text = text + self.cross_attention(grouped, image).reshape(x.shape)
        return text + self.fc2(F.gelu(self.fc1(self.ffn_norm(text)))), image


class ImageEncoder(nn.Module):
    """ResNet grid, projected to the common width with a learned position each."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.resnet = ResNetModel(
            ResNetConfig(
                embedding_size=64,
                hidden_sizes=list(config.image_channels),
                depths=list(config.image_depths),
                layer_type="basic",
            )
        )
        side = config.image_size // config.image_stride
        self.project = nn.Linear(config.image_channels[-1], config.width)
        self.position = nn.Parameter(torch.randn(1, side * side, config.width) * 0.02)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float [N,3,S,S], normalised -> image_tokens [N,P,D]."""
        grid = self.resnet(pixel_values).last_hidden_state
        return self.norm(self.project(grid.flatten(2).transpose(1, 2)) + self.position)


class TextEncoder(nn.Module):
    """BERT without its pooler."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.heads,
                intermediate_size=config.ffn_ratio * config.width,
                max_position_embeddings=config.max_tokens,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=0,
            ),
            add_pooling_layer=False,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask int64 [B,T] -> text_tokens [B,T,D]."""
        mask = additive_mask(attention_mask, self.bert.dtype)
        hidden: Tensor = self.bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden


class Fusion(nn.Module):
    """Cross-modal layers and the answer head, which reads the first ([CLS]) token."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config) for _ in range(config.fusion_layers))
        self.norm = nn.LayerNorm(config.width)
        self.hidden = nn.Linear(config.width, config.width)
        self.answer = nn.Linear(config.width, len(config.answers))

    def forward(self, text_tokens: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """text_tokens [B,T,D], attention_mask int64 [B,T], image_tokens [N,P,D] -> logits [B,A]."""
        mask = additive_mask(attention_mask, text_tokens.dtype)
        for layer in self.layers:
            text_tokens, image_tokens = layer(text_tokens, mask, image_tokens)
        return self.answer(F.gelu(self.hidden(self.norm(text_tokens[:, 0]))))


class Reasoner(nn.Module):
    """The three components together, for training and as the FP32 reference."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.fusion = Fusion(config)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """pixel_values [N,3,S,S], input_ids and attention_mask [B,T], B a multiple of N -> logits [B,A]."""
        return self.fusion(
            self.text_encoder(input_ids, attention_mask), attention_mask, self.image_encoder(pixel_values)
        )
