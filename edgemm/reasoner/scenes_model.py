"""The scenes reasoner, whole: text, image and recording in any combination; an answer at each of three levels.

Axes: B questions, N scenes (B a multiple of N: the questions of a scene stand together), T words, P cells of the
image's grid, F audio frames, W samples of a waveform, K keys, D width, M modalities, A answers.

Without a question the model answers a learned one: how many things there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.alignment import Contrast
from edgemm.reasoner.captioner import Captioner
from edgemm.reasoner.config import MODALITIES, ScenesConfig
from edgemm.reasoner.encoders import AudioEncoder, ImageEncoder, TextEncoder
from edgemm.reasoner.fusion import ABSENT
from edgemm.reasoner.levels import Level


@dataclass(frozen=True, slots=True)
class Reasoned:
    """What the levels made: words [B,T,D] and logits [B,A] of each, and the gates [B,M]."""

    words: list[Tensor]
    logits: list[Tensor]
    gates: Tensor


class Match(nn.Module):
    """Does a text belong to what its words looked at? As little as its least true word does."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.word = nn.Linear(config.width, 1)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """words [B,T,D] of level 1, mask int64 [B,T] -> logits [B,2]: it doesn't, it does."""
        held = self.word(words)[..., 0] + (1 - mask.to(words.dtype)) * -ABSENT
        least = mask.to(words.dtype).sum(1).log() - torch.logsumexp(-held, 1)  # 0 of words that are all 0
        return torch.stack([torch.zeros_like(least), least], 1)


class ScenesReasoner(nn.Module):
    """Encoders, the contrastive pools, and the levels."""

    def __init__(self, config: ScenesConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = TextEncoder(config)
        self.image_encoder = ImageEncoder(config)
        self.audio_encoder = AudioEncoder(config)
        self.contrast = Contrast(config)
        self.no_question = nn.Parameter(torch.randn(1, 1, config.width) * 0.5)
        self.levels = nn.ModuleList(Level(config, i) for i in range(len(config.levels)))
        self.match = Match(config)
        self.captioner = Captioner(config)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
    ) -> Tensor:
        """Logits [B,A] of the last level, of whichever modalities are given; the encoders of others are not run.

        pixel_values [N,3,S,S]; input_ids, attention_mask int64 [B,T]; input_values [N,W]
        """
        keys = {}
        if pixel_values is not None:
            keys["image"] = self.image_encoder(pixel_values)
        if input_values is not None:
            keys["audio"] = self.audio_encoder(input_values)
        words = None
        if input_ids is not None and attention_mask is not None:
            words = self.text_encoder(input_ids, attention_mask)
        return self.reason(words, attention_mask, keys).logits[-1]

    def level(self, index: int) -> Level:
        found = self.levels[index]
        assert isinstance(found, Level)
        return found

    def reason(
        self, words: Tensor | None, mask: Tensor | None, keys: Mapping[str, Tensor], levels: int | None = None
    ) -> Reasoned:
        """words [B,T,D] with their mask int64 [B,T], or None; keys by modality [N,K,D], absent ones left out.

        levels   how many to run; None: all
        """
        if words is None or mask is None:
            words = self.no_question.expand(len(next(iter(keys.values()))), -1, -1)
            mask = torch.ones(words.shape[:2], dtype=torch.int64)
        weights = torch.tensor([[float(m in keys) for m in MODALITIES]]).expand(len(words), -1)
        slots, made, logits = None, [], []
        for index in range(levels or len(self.levels)):
            level = self.level(index)
            words, slots, weights, answer = level.run(words, mask, keys, weights, slots)
            made.append(words)
            logits.append(answer)
        return Reasoned(made, logits, weights)


class Given(nn.Module):
    """What the levels take, of one subset of the modalities: a graph without weights, but for the learned question."""

    def __init__(self, model: ScenesReasoner) -> None:
        super().__init__()
        self.no_question, self.tokens = model.no_question, model.config.question_tokens
        self.keys = {"image": model.config.patches, "audio": model.config.min_frames}

    def forward(
        self,
        text_tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
        audio_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens [B,T,D], [B,P,D], [B,F,D] -> question, question_mask, image_keys, audio_keys, present [B,M].

        What is absent is zeros that count for nothing: as many words and cells as there may be, as few audio frames.
        """
        tokens = next(t for t in (text_tokens, image_tokens, audio_tokens) if t is not None)
        batch, width = tokens.shape[0], tokens.shape[2]
        if text_tokens is None or attention_mask is None:
            question = F.pad(self.no_question, (0, 0, 0, self.tokens - 1)).expand(batch, -1, -1)
            mask = F.pad(torch.ones(batch, 1, dtype=torch.int64), (0, self.tokens - 1))
        else:
            question, mask = text_tokens, attention_mask
        given = dict(zip(MODALITIES, (image_tokens, audio_tokens), strict=True))
        image, audio = (torch.zeros(batch, self.keys[m], width) if t is None else t for m, t in given.items())
        present = torch.tensor([[float(t is not None) for t in given.values()]]).expand(batch, -1)
        return question.clone(), mask.clone(), image.clone(), audio.clone(), present.clone()
