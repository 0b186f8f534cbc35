"""The watcher: questions on clips of any length, by a resampler a chunk and a memory across chunks.

Axes: N clips, F frames of a chunk, S pixels a side, P cells of a frame's grid, D width, K cells that are kept of it,
C channels of the grid, L latents of a chunk, R rows of the memory's state, T words, A answers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.encoders import TextEncoder, grid_signal, line_signal
from edgemm.reasoner.memory import Look, RecurrentMemory, Resampler, known
from edgemm.reasoner.model import additive_mask

EVENTS = ("appears", "vanishes", "starts", "onto", "hits", "leaves", "stops", "is moved onto")
CELL = 4  # pixels a side: things that lie on each other are in two of them
SPELLED = 2  # words that are spelled of a thing: its colour and shape


@dataclass(frozen=True, slots=True)
class WatcherConfig:
    """Sizes in pixels, frames, tokens and channels.

    words   that what stands in a cell is spelled with;  word_ids  what they are for the text encoder
    cells   that go on of a frame's grid: those in which most likely something stands
    seeds   of those, the first ones, which become latents
    chunk   frames that are looked at together
    window  chunks whose latents the memory keeps;  slots  of it, for what was before
    readers layers in which words look at the memory
    """

    answers: tuple[str, ...]
    words: tuple[str, ...]
    word_ids: tuple[int, ...]
    vocab_size: int
    width: int = 96
    heads: int = 4
    ffn_ratio: int = 2
    text_layers: int = 2
    max_tokens: int = 32
    image_size: int = 64
    channels: int = 64
    cells: int = 8
    seeds: int = 4
    chunk: int = 4
    resampler_layers: int = 2
    window: int = 4
    slots: int = 16
    readers: int = 3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WatcherConfig:
        names = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        return cls(**kept)

    @property
    def side(self) -> int:
        """Cells of a frame's grid, a side."""
        return self.image_size // CELL

    @property
    def latents(self) -> int:
        """Of a chunk."""
        return self.chunk * self.seeds

    @property
    def rows(self) -> int:
        """Of the memory's state."""
        return self.window * self.latents + self.slots

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


class FrameEncoder(nn.Module):
    """Convolutions to a grid of one cell for CELL x CELL pixels.

    there  whether a thing's centre is in a cell;  what  which words it is spelled with
    """

    def __init__(self, config: WatcherConfig) -> None:
        super().__init__()
        c = config.channels
        steps: list[nn.Module] = [nn.PixelUnshuffle(CELL), nn.Conv2d(3 * CELL**2, c, 3, padding=1)]
        for _ in range(3):
            steps += [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1)]
        self.grid = nn.Sequential(*steps, nn.BatchNorm2d(c), nn.ReLU())
        self.there, self.what = nn.Linear(c, 1), nn.Linear(c, len(config.words))

    def forward(self, frames: Tensor) -> Tensor:
        """frames float [N,3,S,S], -1..1 -> tokens [N,P,C], row by row."""
        grid: Tensor = self.grid(frames)
        return grid.flatten(2).transpose(1, 2)


class Watcher(nn.Module):
    """Frames to a memory, chunk by chunk; words that look at the memory.

    age  of a frame, for each of the chunk and the window, oldest first: time is counted in frames back from the last
    """

    word_ids: Tensor

    def __init__(self, config: WatcherConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.width, config.heads, config.ffn_ratio
        self.frame_encoder = FrameEncoder(config)
        self.project = nn.Linear(config.channels, config.width)
        self.place = nn.Embedding.from_pretrained(grid_signal(config.side, config.width)[0] / 2, freeze=False)
        ages = (config.window + 1) * config.chunk
        self.age = nn.Parameter(line_signal(ages, config.width).flip(0) / 2)
        self.resampler = Resampler(*sizes, config.resampler_layers)
        self.memory = RecurrentMemory(*sizes, config.slots)
        self.text_encoder = TextEncoder(config.text)
        self.readers = nn.ModuleList(Look(*sizes, alike=True) for _ in range(config.readers))
        self.mixers = nn.ModuleList(Look(*sizes) for _ in range(config.readers))
        self.norm = nn.LayerNorm(config.width)
        self.weigh = nn.Linear(config.width, 1)
        self.answer = nn.Linear(config.width, len(config.answers))
        self.facts, self.recall = (nn.Linear(config.width, 1 + 2 * len(EVENTS)) for _ in range(2))
        self.register_buffer("word_ids", torch.tensor(config.word_ids), persistent=False)

    def empty(self, clips: int, window: int | None = None) -> Tensor:
        """The state of a memory that has seen nothing, [N,R,D]; of another window than the config's in training."""
        config = self.config
        rows = config.rows if window is None else window * config.latents + config.slots
        return torch.zeros(clips, rows, config.width)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames float [N,F,3,S,S], -1..1 -> tokens [N,F,K,C] of the cells that are kept, int64 [N,F,K], best first."""
        grid = self.frame_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        cells = self.frame_encoder.there(grid)[..., 0].topk(self.config.cells).indices
        return grid.gather(2, cells[..., None].expand(-1, -1, -1, grid.shape[-1])), cells

    def spell(self, tokens: Tensor) -> Tensor:
        """tokens [...,C] of cells -> [...,D]: words for what stands there as the text encoder has them, as loud as its
        own; nothing for an empty cell."""
        bert, encoder = self.text_encoder.bert, self.frame_encoder
        probable = encoder.what(tokens).sigmoid() * encoder.there(tokens).sigmoid()
        loud = 1 / (bert.config.initializer_range * SPELLED**0.5)
        return loud * (probable @ bert.embeddings.word_embeddings.weight[self.word_ids])

    def remember(self, tokens: Tensor, cells: Tensor, state: Tensor) -> Tensor:
        """A chunk of what `encode` gives, the state before -> the state after, [N,R,D].

        Cells that the frame encoder takes for empty are hardly looked at.
        """
        chunk, seeds = self.config.chunk, self.config.seeds
        spelled = self.spell(tokens)
        seen = spelled + self.project(tokens) + self.place(cells) + self.age[-chunk:, None]
        there = F.logsigmoid(self.frame_encoder.there(tokens)[..., 0]).flatten(1).detach()
        before, _ = self.memory.parts(state)
        keys = torch.cat([self.aged(before, chunk), seen.flatten(1, 2)], 1)
        first, names = (x[:, :, :seeds].flatten(1, 2) for x in (seen, spelled))
        latents = self.resampler(first, names, keys, torch.cat([known(before), there], 1))
        after: Tensor = self.memory(state, latents)
        return after

    def aged(self, window: Tensor, since: int) -> Tensor:
        """The latents [N,W,D] of a window with the ages of their frames, `since` frames after the last of them."""
        frames, end = window.shape[1] // self.config.seeds, len(self.age) - since
        return window + self.age[end - frames : end].repeat_interleave(self.config.seeds, 0)

    def watch(self, frames: Tensor, state: Tensor) -> Tensor:
        """A chunk's frames [N,F,3,S,S], the state before -> the state after, [N,R,D]."""
        return self.remember(*self.encode(frames), state)

    def chunks(self, frames: int) -> list[Tensor]:
        """Which frames each chunk of a clip has, int64[chunk]; the last one is filled up with its last frame."""
        size = self.config.chunk
        return [torch.arange(start, start + size).clamp(max=frames - 1) for start in range(0, frames, size)]

    def see(self, frames: Tensor) -> Tensor:
        """frames [N,F,3,S,S] of whole clips, chunk by chunk -> the state, [N,R,D]."""
        state = self.empty(len(frames))
        for at in self.chunks(frames.shape[1]):
            state = self.watch(frames[:, at], state)
        return state

    def read(self, words: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        """words [N,T,D] of a question, their mask int64 [N,T], the state -> logits [N,A]."""
        return self.answered(self.look(words, mask, state), mask)

    def answered(self, words: Tensor, mask: Tensor) -> Tensor:
        """words [N,T,D] that have looked, their mask int64 [N,T] -> logits [N,A] of all of them, each by its weight."""
        words = self.norm(words)
        weights = (self.weigh(words)[..., 0] + additive_mask(mask, words.dtype)[:, 0, 0]).softmax(1)
        logits: Tensor = self.answer((weights[..., None] * words).sum(1))
        return logits

    def look(self, words: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        """words [B,T,D] that look at the memory, state [N,R,D], and at each other in turn -> [B,T,D].

        B is a multiple of N: the questions on a memory stand together, and look at it as one.
        """
        window, slots = self.memory.parts(state)
        keys = torch.cat([self.aged(window, 0), slots], 1)
        there = F.pad(known(window), (0, slots.shape[1]))[:, None, None]
        hidden = additive_mask(mask, words.dtype)
        words = words + F.pad(words[:, :-1], (0, 0, 1, 0))  # a shape with its colour is like what `spell` makes of both
        for reader, mixer in zip(self.readers, self.mixers, strict=True):
            shape = words.shape
            if shape[0] != keys.shape[0]:
                words = words.reshape(keys.shape[0], -1, shape[2])
            words = reader(words, keys, there).reshape(shape)
            words = mixer(words, words, hidden)
        return words

    def recalled(self, words: Tensor) -> Tensor:
        """Words that have looked [...,D] -> what a name's word tells of its thing in training: see `Reel.facts`."""
        told: Tensor = self.recall(self.norm(words))
        return told

    def forward(self, frames: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """frames [N,F,3,S,S] of whole clips, in chunks of their own; a question each -> logits [N,A]."""
        return self.read(self.text_encoder(input_ids, attention_mask), attention_mask, self.see(frames))
