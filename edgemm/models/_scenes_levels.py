"""The levels of the scenes reasoner as graphs, for a question on any set of what can be looked at.

Axes: B questions, each on its own scene, T words, P cells of the image's grid, F audio frames, D width, S slots,
M modalities, A answers.

    unasked_image, unasked_audio   where there is no text: the learned question, in the place of its tokens
    level_1_text_image_audio, level_1_text_image, level_1_text_audio, level_1_text
                                   the first level, in which most stay: what is absent is not run
    given_image_audio .. given_text   what the later levels take of what is there
    level_2, level_3               one for all: what is absent is zeros there
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.models import Component
from edgemm.models import Tensor as Spec
from edgemm.reasoner.config import MODALITIES
from edgemm.reasoner.scenes_model import ScenesReasoner, there

Port = Callable[..., Spec]
LOOKED_AT = [subset for n in (2, 1, 0) for subset in combinations(MODALITIES, n)]


class Unasked(nn.Module):
    def __init__(self, model: ScenesReasoner) -> None:
        super().__init__()
        self.no_question, self.tokens = model.no_question, model.config.question_tokens

    def forward(self, image_tokens: Tensor | None = None, audio_tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Either [B,..] -> the learned question as text_tokens [B,T,D] and attention_mask int64 [B,T]."""
        tokens = image_tokens if audio_tokens is None else audio_tokens
        assert tokens is not None
        more, batch = self.tokens - 1, tokens.shape[0]
        question = F.pad(self.no_question, (0, 0, 0, more)).expand(batch, -1, -1)
        return question.clone(), F.pad(torch.ones(1, 1, dtype=torch.int64), (0, more)).expand(batch, -1).clone()


class First(nn.Module):
    def __init__(self, model: ScenesReasoner) -> None:
        super().__init__()
        self.level = model.level(0)

    def forward(
        self,
        text_tokens: Tensor,
        attention_mask: Tensor,
        image_tokens: Tensor | None = None,
        audio_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B,T,D], int64 [B,T], [B,P,D], [B,F,D] -> words_1 [B,T,D], gates [B,M], exit_1 [B,A]."""
        given = zip(MODALITIES, (image_tokens, audio_tokens), strict=True)
        keys = {name: tokens for name, tokens in given if tokens is not None}
        return self.level.first(text_tokens, attention_mask, keys, there(keys, text_tokens))


class Given(nn.Module):
    def __init__(self, model: ScenesReasoner) -> None:
        super().__init__()
        self.least = {"image": model.config.patches, "audio": model.config.min_frames}

    def forward(
        self,
        image_tokens: Tensor | None = None,
        audio_tokens: Tensor | None = None,
        text_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> image_keys [B,P,D], audio_keys [B,F,D], present [B,M]; what is absent is zeros, as few as there may be."""
        tokens = next(t for t in (image_tokens, audio_tokens, text_tokens) if t is not None)
        batch, _, width = tokens.shape
        given = dict(zip(MODALITIES, (image_tokens, audio_tokens), strict=True))
        image, audio = (torch.zeros(batch, self.least[m], width) if t is None else t for m, t in given.items())
        present = there({m: t for m, t in given.items() if t is not None}, tokens)
        return image.clone(), audio.clone(), present.clone()


class Second(nn.Module):
    def __init__(self, model: ScenesReasoner) -> None:
        super().__init__()
        self.objects, self.level = model.level(0), model.level(1)

    def forward(
        self,
        words_1: Tensor,
        attention_mask: Tensor,
        image_keys: Tensor,
        audio_keys: Tensor,
        present: Tensor,
        gates: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> words_2 [B,T,D], slots_2 [B,S,D], exit_2 [B,A]."""
        keys = {"image": image_keys, "audio": audio_keys}
        slots = self.objects.gather(keys, present)
        return self.level.later(words_1, attention_mask, keys, gates, slots)


class Third(nn.Module):
    def __init__(self, model: ScenesReasoner) -> None:
        super().__init__()
        self.level = model.level(2)

    def forward(
        self,
        words_2: Tensor,
        attention_mask: Tensor,
        image_keys: Tensor,
        audio_keys: Tensor,
        gates: Tensor,
        slots_2: Tensor,
    ) -> Tensor:
        """-> logits [B,A]."""
        keys = {"image": image_keys, "audio": audio_keys}
        return self.level.later(words_2, attention_mask, keys, gates, slots_2)[2]


def levels(
    model: ScenesReasoner, encoded: dict[str, Spec], mask: Spec, port: Port, sizes: dict[str, int]
) -> list[Component]:
    """encoded  what the encoders make;  sizes  the most that each of its axes has"""
    config = model.config
    d, answers = config.width, len(config.answers)
    text, smallest = encoded["text"], {"frames": config.min_frames}
    words = {n: port(f"words_{n}", "tokens", d) for n in (1, 2)}
    gates, present, slots = (
        port("gates", len(MODALITIES)),
        port("present", len(MODALITIES)),
        port("slots_2", config.slots, d),
    )
    keys = tuple(Spec(f"{m}_keys", encoded[m].dtype, encoded[m].shape) for m in MODALITIES)

    def component(name: str, graph: nn.Module, takes: tuple[Spec, ...], makes: tuple[Spec, ...]) -> Component:
        axes = {axis for spec in (*takes, *makes) for axis in spec.shape}
        used = {axis: most for axis, most in sizes.items() if axis in axes}
        return Component(name, graph, takes, makes, used, min_sizes=smallest if "frames" in axes else {})

    made = [component(f"unasked_{m}", Unasked(model), (encoded[m],), (text, mask)) for m in MODALITIES]
    for subset in LOOKED_AT:
        takes = text, mask, *(encoded[m] for m in subset)
        makes = words[1], gates, port("exit_1", answers)
        made.append(component("_".join(["level_1_text", *subset]), First(model), takes, makes))
    for subset in LOOKED_AT:
        takes = tuple(encoded[m] for m in subset) or (text,)
        made.append(component("_".join(["given", *(subset or ["text"])]), Given(model), takes, (*keys, present)))
    second = words[2], slots, port("exit_2", answers)
    made.append(component("level_2", Second(model), (words[1], mask, *keys, present, gates), second))
    last = (port("logits", answers),)
    made.append(component("level_3", Third(model), (words[2], mask, *keys, gates, slots), last))
    return made
