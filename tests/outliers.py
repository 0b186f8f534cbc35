"""A reasoner that plain INT8 breaks: outliers in three channels, which leave its FP32 answers as they were."""

from __future__ import annotations

from pathlib import Path

import torch

from edgemm.models import reasoner
from edgemm.reasoner.model import FusionLayer, Reasoner

CHANNELS, TIMES = (3, 11, 25), 100.0


def plant(source: Path, directory: Path) -> Path:
    """The reasoner in `source` with LayerNorm gains in CHANNELS TIMES the largest other, and weights that undo it."""
    model = reasoner.load(source)
    layers = [layer for layer in model.fusion.layers if isinstance(layer, FusionLayer)]
    with torch.no_grad():
        for layer in layers:
            attention = layer.self_attention
            amplify(layer.self_norm, attention.q_proj, attention.k_proj, attention.v_proj)
            amplify(layer.cross_norm, layer.cross_attention.q_proj)
            amplify(layer.ffn_norm, layer.fc1)
        readers = [p for x in layers for p in (x.cross_attention.k_proj, x.cross_attention.v_proj)]
        amplify(model.image_encoder.norm, *readers)
        amplify(model.fusion.norm, model.fusion.hidden)
    reasoner.save(model, directory, source)
    return directory


def amplify(norm: torch.nn.LayerNorm, *readers: torch.nn.Linear) -> None:
    channels = list(CHANNELS)
    rest = norm.weight.abs().clone()
    rest[channels] = 0
    times = TIMES * rest.max() / norm.weight[channels].abs()
    norm.weight[channels] *= times
    norm.bias[channels] *= times
    for linear in readers:
        linear.weight[:, channels] /= times


def answers(model: Reasoner) -> torch.Tensor:
    """Logits of a few random inputs."""
    generator = torch.Generator().manual_seed(0)
    side, length = model.config.image_size, model.config.max_tokens
    ids = torch.randint(1, model.config.vocab_size, (4, length), generator=generator)
    with torch.inference_mode():
        return model(torch.randn(4, 3, side, side, generator=generator), ids, torch.ones_like(ids))
