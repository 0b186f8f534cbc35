"""The watcher: questions on clips of any length, by a resampler a chunk and a memory across chunks.

Axes: N clips, F frames of a chunk, S pixels a side, P cells of a frame's grid, M slots of the memory, D width,
K cells that are kept of it, C channels of the grid, T words, A answers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.encoders import TextEncoder, grid_signal
from edgemm.reasoner.memory import Look, RecurrentMemory, Resampler
from edgemm.reasoner.model import additive_mask

STATUSES = ("there", "moves", "came", "went", "moved onto another", "moved onto by another")


@dataclass(frozen=True, slots=True)
class WatcherConfig:
    """Sizes in pixels, frames, tokens and channels.

    cells    that go on of a frame's grid: those in which most likely something stands
    chunk    frames that are looked at together
    latents  that are made of a chunk;  slots  of the memory;  readers  layers in which words look at the memory
    names    of things, of which the memory is taught to tell STATUSES;  words  that the grids of frames are taught
    """

    answers: tuple[str, ...]
    names: tuple[str, ...]
    words: tuple[str, ...]
    vocab_size: int
    width: int = 96
    heads: int = 4
    ffn_ratio: int = 2
    text_layers: int = 2
    max_tokens: int = 32
    image_size: int = 64
    channels: int = 64
    cells: int = 8
    chunk: int = 4
    latents: int = 16
    resampler_layers: int = 1
    slots: int = 16
    readers: int = 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WatcherConfig:
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**kept)

    @property
    def side(self) -> int:
        """Cells of a frame's grid, a side."""
        return self.image_size // 8

    @property
    def text(self) -> ScenesConfig:
        return ScenesConfig(
            self.answers,
            self.vocab_size,
            width=self.width,
            heads=self.heads,
            ffn_ratio=self.ffn_ratio,
            max_tokens=self.max_tokens,
            text_layers=self.text_layers,
        )


def time_signal(times: Tensor, width: int) -> Tensor:
    """Seconds float [...] -> sines and cosines [..., width] of periods from 0.1 s to 1,000 s.

    Vaswani et al. 2017, of seconds and not of positions: frames need not be evenly spaced.
    """
    periods = 0.1 * 10_000 ** torch.linspace(0, 1, width // 2, device=times.device)
    angles = 2 * math.pi * times[..., None] / periods
    return torch.cat([angles.sin(), angles.cos()], -1)


class FrameEncoder(nn.Module):
    """Convolutions to a grid of one cell for 8 x 8 pixels.

    there  whether something stands in a cell;  what  stands there, in training alone
    """

    def __init__(self, config: WatcherConfig) -> None:
        super().__init__()
        c = config.channels
        steps: list[nn.Module] = [nn.PixelUnshuffle(4), nn.Conv2d(48, c, 3, padding=1)]
        for kernel, stride in ((3, 1), (4, 2), (3, 1)):
            steps += [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, kernel, stride, 1)]
        self.grid = nn.Sequential(*steps, nn.BatchNorm2d(c), nn.ReLU())
        self.there, self.what = nn.Linear(c, 1), nn.Linear(c, len(config.words))

    def forward(self, frames: Tensor) -> Tensor:
        """frames float [N,3,S,S], -1..1 -> tokens [N,P,C], row by row."""
        grid: Tensor = self.grid(frames)
        return grid.flatten(2).transpose(1, 2)


class Watcher(nn.Module):
    """Frames to a memory, chunk by chunk; words that look at the memory."""

    def __init__(self, config: WatcherConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.width, config.heads, config.ffn_ratio
        self.frame_encoder = FrameEncoder(config)
        self.project = nn.Linear(config.channels, config.width)
        self.place = nn.Embedding.from_pretrained(grid_signal(config.side, config.width)[0], freeze=False)
        self.turn = nn.Parameter(torch.randn(config.chunk, 1, config.width) * 0.5)  # which frame of its chunk
        self.moment = nn.Linear(config.width, config.width)
        self.resampler = Resampler(*sizes, config.latents, config.resampler_layers)
        self.memory = RecurrentMemory(*sizes, config.slots)
        self.text_encoder = TextEncoder(config.text)
        self.readers, self.mixers = (nn.ModuleList(Look(*sizes) for _ in range(config.readers)) for _ in range(2))
        self.norm = nn.LayerNorm(config.width)
        self.answer = nn.Linear(config.width, len(config.answers))
        self.tell = nn.Linear(config.width, len(STATUSES) * len(config.names))
        self.recall = nn.Linear(config.width, len(STATUSES) + 1)

    def empty(self, clips: int) -> Tensor:
        """The state of a memory that has seen nothing, [N,M,D]."""
        return torch.zeros(clips, self.config.slots, self.config.width)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames float [N,F,3,S,S], -1..1 -> tokens [N,F,K,C] of the cells that are kept, int64 [N,F,K]."""
        grid = self.frame_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        cells = self.frame_encoder.there(grid)[..., 0].topk(self.config.cells).indices
        return grid.gather(2, cells[..., None].expand(-1, -1, -1, grid.shape[-1])), cells

    def remember(self, tokens: Tensor, cells: Tensor, times: Tensor, state: Tensor) -> Tensor:
        """A chunk of what `encode` gives, its times [N,F] in seconds, the state before -> the state after, [N,M,D].

        Cells that the frame encoder takes for empty are hardly looked at.
        """
        moments = self.moment(time_signal(times, self.config.width))[:, :, None] + self.turn
        there = F.logsigmoid(self.frame_encoder.there(tokens)[..., 0]).flatten(1).detach()
        latents = self.resampler((self.project(tokens) + self.place(cells) + moments).flatten(1, 2), there)
        after: Tensor = self.memory(state, latents)
        return after

    def watch(self, frames: Tensor, times: Tensor, state: Tensor) -> Tensor:
        """A chunk's frames [N,F,3,S,S] and times [N,F] in seconds, the state before -> the state after, [N,M,D]."""
        return self.remember(*self.encode(frames), times, state)

    def chunks(self, frames: int) -> list[Tensor]:
        """Which frames each chunk of a clip has, int64[chunk]; the last one is filled up with its last frame."""
        size = self.config.chunk
        return [torch.arange(start, start + size).clamp(max=frames - 1) for start in range(0, frames, size)]

    def see(self, frames: Tensor, times: Tensor) -> Tensor:
        """frames [N,F,3,S,S] of whole clips and their times [N,F], chunk by chunk -> the state, [N,M,D]."""
        state = self.empty(len(frames))
        for at in self.chunks(frames.shape[1]):
            state = self.watch(frames[:, at], times[:, at], state)
        return state

    def told(self, state: Tensor) -> Tensor:
        """Logits [N,STATUSES,names] of what any slot of the memory tells; in training alone."""
        logits: Tensor = self.tell(self.norm(self.memory.slots(state))).logsumexp(1)
        return logits.unflatten(1, (len(STATUSES), -1))

    def recalled(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Words that have looked [...,D] -> what a name's word tells of its thing in training: logits [...,STATUSES],
        and the logarithm [...] of one and the seconds since something last happened to it."""
        told: Tensor = self.recall(self.norm(words))
        return told[..., :-1], told[..., -1]

    def read(self, words: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        """words [N,T,D] of a question, their mask int64 [N,T], the state -> logits [N,A]; the first word answers."""
        logits: Tensor = self.answer(self.norm(self.look(words, mask, state)[:, 0]))
        return logits

    def look(self, words: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        """words [N,T,D] that look at the memory and at each other in turn -> [N,T,D]."""
        slots, hidden = self.memory.slots(state), additive_mask(mask, words.dtype)
        for reader, mixer in zip(self.readers, self.mixers, strict=True):
            words = reader(words, slots)
            words = mixer(words, words, hidden)
        return words

    def forward(self, frames: Tensor, times: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """frames [N,F,3,S,S] of whole clips, in chunks of their own; times [N,F]; a question each -> logits [N,A]."""
        return self.read(self.text_encoder(input_ids, attention_mask), attention_mask, self.see(frames, times))
