"""A Vision Transformer that plain INT8 breaks: outliers in three channels, which leave FP32 answers as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers as tf

CHANNELS, TIMES = (3, 11, 25), 100.0


def plant(source: Path, directory: Path) -> Path:
    """The checkpoint `source` with LayerNorm gains in CHANNELS TIMES the largest other, and weights that undo it."""
    shutil.copytree(source, directory)
    model = tf.ViTForImageClassification.from_pretrained(source)
    with torch.no_grad():
        for layer in model.vit.layers:
            attention = layer.attention
            amplify(layer.layernorm_before, attention.q_proj, attention.k_proj, attention.v_proj)
            amplify(layer.layernorm_after, layer.mlp.fc1)
        amplify(model.vit.layernorm, model.classifier)
    model.save_pretrained(directory)
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
