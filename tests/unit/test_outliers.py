"""The planted outliers leave the FP32 model as it was, and are a hundred times the rest."""

from __future__ import annotations

from pathlib import Path

import torch

from edgemm.models import reasoner
from tests.outliers import CHANNELS, answers, plant


def test_fp32_is_unchanged(tiny_model: Path, tmp_path: Path) -> None:
    planted, plain = reasoner.load(plant(tiny_model, tmp_path / "planted")), reasoner.load(tiny_model)
    torch.testing.assert_close(answers(planted), answers(plain), rtol=1e-4, atol=1e-5)
    gain, rest = planted.image_encoder.norm.weight.abs(), plain.image_encoder.norm.weight.abs()
    rest[list(CHANNELS)] = 0
    torch.testing.assert_close(gain[list(CHANNELS)], 100 * rest.max().expand(len(CHANNELS)))
