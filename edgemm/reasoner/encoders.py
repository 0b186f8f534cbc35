"""One encoder a modality, each to tokens of one width that keep where, or when, they are.

Axes: B batch, T words, P cells of the image's grid, W samples of a waveform, F audio frames, D width.

They are transformers' BERT, ResNet and Wav2Vec2, so a user's pretrained weights load into them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, Wav2Vec2Config, Wav2Vec2Model

from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.model import additive_mask


class TextEncoder(nn.Module):
    """BERT without its pooler."""

    def __init__(self, config: ScenesConfig) -> None:
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
        # As strong as BERT's own start, but alike for words that are as far apart: "the word before" is learned once.
        places = self.bert.embeddings.position_embeddings
        with torch.no_grad():
            places.weight.copy_(
                line_signal(config.max_tokens, config.width) * 2**0.5 * self.bert.config.initializer_range
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask int64 [B,T] -> text_tokens [B,T,D]."""
        mask = additive_mask(attention_mask, self.bert.dtype)
        hidden: Tensor = self.bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return hidden


class ImageEncoder(nn.Module):
    """ResNet grid, projected to the common width with a position each, learned from where sines and cosines start."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.resnet = ResNetModel(
            ResNetConfig(
                embedding_size=config.image_embedding,
                hidden_sizes=list(config.image_channels),
                depths=list(config.image_depths),
                layer_type=config.image_layer,
            )
        )
        self.project = nn.Linear(config.image_channels[-1], config.width)
        self.position = nn.Parameter(grid_signal(config.side, config.width) / 2)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values float [B,3,S,S], normalised -> image_tokens [B,P,D], row by row."""
        grid = self.resnet(pixel_values).last_hidden_state
        return self.norm(self.project(grid.flatten(2).transpose(1, 2)) + self.position)


class AudioEncoder(nn.Module):
    """Wav2Vec2 on the raw waveform. Layer norms alone: what a frame becomes does not hang on the length of the rest."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.wav2vec2 = Wav2Vec2Model(
            Wav2Vec2Config(
                hidden_size=config.width,
                num_hidden_layers=config.audio_layers,
                num_attention_heads=config.heads,
                intermediate_size=config.ffn_ratio * config.width,
                conv_dim=config.audio_channels,
                conv_kernel=config.audio_kernels,
                conv_stride=config.audio_strides,
                conv_bias=True,
                feat_extract_norm="layer",
                do_stable_layer_norm=True,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=config.heads,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                feat_proj_dropout=0.0,
                layerdrop=0.0,
                mask_time_prob=0.0,
                mask_feature_prob=0.0,
            )
        )
        for module in list(self.wav2vec2.modules()):  # plain weights, as exporters and quantizers look for
            for name in list(getattr(module, "parametrizations", {})):
                remove_parametrizations(module, name)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, input_values: Tensor) -> Tensor:
        """input_values float [B,W], 16 kHz -> audio_tokens [B,F,D]."""
        return self.norm(self.wav2vec2(input_values).last_hidden_state)


def line_signal(length: int, width: int) -> Tensor:
    """Sines, then cosines of 0 .. length-1 at rates from 1 to 0.01, float [length,width] (Vaswani et al. 2017)."""
    angles = torch.arange(length)[:, None] * 100 ** -torch.linspace(0, 1, width // 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def grid_signal(side: int, width: int) -> Tensor:
    """`line_signal` of each cell's row, then of its column, float [1,side*side,width], row by row.

    As strong as what is seen, or "left of" could not be learned: nothing before the levels asks where a cell is.
    """
    line = line_signal(side, width // 2)
    return torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], -1).flatten(0, 1)[None]
