"""The planted outliers leave the FP32 model as it was, and are a hundred times the rest."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

from tests import checkpoints
from tests.outliers import CHANNELS, plant


def test_fp32_is_unchanged(tmp_path: Path) -> None:
    source = checkpoints.write("vit", tmp_path / "plain")
    directories = source, plant(source, tmp_path / "planted")
    plain, planted = (tf.ViTForImageClassification.from_pretrained(path).eval() for path in directories)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(planted(pixels).logits, plain(pixels).logits, rtol=1e-4, atol=1e-5)
    gain, rest = (model.vit.layers[1].layernorm_after.weight.abs() for model in (planted, plain))
    rest = rest.clone()
    rest[list(CHANNELS)] = 0
    torch.testing.assert_close(gain[list(CHANNELS)], 100 * rest.max().expand(len(CHANNELS)))
