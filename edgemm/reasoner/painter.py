"""Pictures from captions: a picture as discrete codes on a small grid, and a decoder that writes them one by one.

Axes: N pictures, S pixels a side, P codes (those of a cell together), C channels, T tokens, K words of the caption,
H heads, D width, V codes, places and marks.

A cell has a few codes. They are those of finite scalar quantization (Mentzer et al. 2023): each channel of a cell is
rounded to a few levels, and a code is the number that some of them make. There is no codebook to learn, so none that
collapses.

What the decoder writes after the mark BEGIN: where each thing stands, in the order in which the caption names them
(x, y in pixels, or NOWHERE for things that the caption has not), then the codes of each cell, row by row. A caption
leaves open where things stand exactly; once that is said, the codes follow, and every choice is one of few.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.captioner import CaptionLayer, CaptionWords, Pair, heads
from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.encoders import TextEncoder

HIDDEN = -1e4  # added to scores: exp of it is 0 in float32, and float16 holds it


@dataclass(frozen=True, slots=True)
class PainterConfig:
    """Sizes in pixels, tokens and channels.

    channels  of the picture's grids of image_size / 4 and image_size / 8 cells a side
    levels    of each channel of a code: there are as many codes as their product
    books     codes of a cell
    things    how many a caption names at most
    """

    vocab_size: int
    width: int = 128
    heads: int = 4
    ffn_ratio: int = 2
    text_layers: int = 3
    layers: int = 3
    max_tokens: int = 80
    image_size: int = 64
    channels: tuple[int, int] = (48, 96)
    levels: tuple[int, ...] = (5, 5, 5, 5)
    books: int = 2
    things: int = 3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PainterConfig:
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**kept)

    @property
    def cells(self) -> int:
        """Codes of a picture."""
        return self.books * (self.image_size // 8) ** 2

    @property
    def codes(self) -> int:
        return math.prod(self.levels)

    @property
    def places(self) -> int:
        """Tokens that say where things stand: x and y of each."""
        return 2 * self.things

    @property
    def nowhere(self) -> int:
        """The token of a thing that there isn't; those before it, from `codes` on, are pixels."""
        return self.codes + self.image_size

    @property
    def begin(self) -> int:
        return self.nowhere + 1

    @property
    def end(self) -> int:
        """Never written: a picture ends with its last cell."""
        return self.begin + 1

    @property
    def length(self) -> int:
        """Tokens of a picture."""
        return self.places + self.cells

    def part(self, vocabulary: int, positions: int) -> ScenesConfig:
        """The shape of a part that the scenes reasoner has as well."""
        return ScenesConfig(
            (),
            vocabulary,
            width=self.width,
            heads=self.heads,
            ffn_ratio=self.ffn_ratio,
            max_tokens=positions,
            text_layers=self.text_layers,
        )


class Residual(nn.Module):
    """x + what convolutions make of it, the first of `kernel` cells a side."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(self.norm(x)))))


class PictureCodes(nn.Module):
    """The autoencoder: pictures to codes and back. A cell's codes hang on what is near: they are easier to foretell."""

    table: Tensor

    def __init__(self, config: PainterConfig) -> None:
        super().__init__()
        fine, coarse = config.channels
        self.levels, self.books = config.levels, config.books
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, fine, 1),
            Residual(fine),
            nn.Conv2d(fine, coarse, 4, 2, 1),
            Residual(coarse, 1),
            nn.Conv2d(coarse, config.books * len(config.levels), 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.books * len(config.levels), coarse, 3, padding=1),
            Residual(coarse),
            Residual(coarse),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            Residual(fine),
            Residual(fine),
        )
        self.cover, self.colour = nn.Conv2d(fine, 16, 1), nn.Conv2d(fine, 3, 1)
        self.ground = nn.Parameter(torch.zeros(1, 3, 1, 1))
        steps = [torch.linspace(-1, 1, n) for n in config.levels]
        self.register_buffer("table", torch.cartesian_prod(*steps), persistent=False)

    def rounded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float [N,3,S,S], -1..1 -> levels [N,C,H,W] with straight-through gradients, codes int64 [N,P]."""
        smooth = self.encoder(pixels).float().tanh()
        most = smooth.new_tensor(self.levels * self.books).view(1, -1, 1, 1) - 1
        digits = ((smooth.detach() + 1) / 2 * most).round()
        code = torch.zeros_like(digits[:, : self.books])
        for channel, levels in enumerate(self.levels):
            code = code * levels + digits[:, channel :: len(self.levels)]
        return smooth + (digits / most * 2 - 1 - smooth).detach(), code.long().flatten(2).transpose(1, 2).flatten(1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels float [N,3,S,S], -1..1 -> the same by way of codes."""
        return self.decode(self.rounded(pixels)[0])

    def decode(self, levels: Tensor) -> Tensor:
        """Levels [N,C,H,W] -> pixels float [N,3,S,S]: one colour in each 4 x 4 of them, over the ground where it is."""
        grid = self.decoder(levels)
        cover = F.pixel_shuffle(self.cover(grid), 4).sigmoid()
        colour = self.colour(grid).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return self.ground + cover * (colour - self.ground)

    def picture(self, codes: Tensor) -> Tensor:
        """Codes int64 [N,P]; tokens that are none count as the last -> pixels float [N,3,S,S], -1..1."""
        side = math.isqrt(codes.shape[1] // self.books)
        levels = self.table[codes.clamp(max=len(self.table) - 1)].unflatten(1, (-1, self.books)).flatten(2)
        return self.decode(levels.transpose(1, 2).unflatten(2, (side, side))).clamp(-1, 1)


class CodeWords(CaptionWords):
    """Tokens and their places; a code is also the levels that make it, so that what codes share is learned once."""

    levels: Tensor

    def __init__(self, config: PainterConfig) -> None:
        super().__init__(config.part(config.end + 1, config.length + 1))
        self.register_buffer("levels", levels_of(config), persistent=False)
        self.parts = nn.Parameter(torch.randn(self.levels.shape[1], config.width))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """int64 [N,T] each -> [N,T,D]."""
        return super().forward(ids, positions) + (self.levels @ self.parts)[ids]


class CodeHead(nn.Module):
    """How likely each token is: by itself and, of a code, by the levels that make it."""

    levels: Tensor

    def __init__(self, config: PainterConfig) -> None:
        super().__init__()
        self.register_buffer("levels", levels_of(config), persistent=False)
        self.norm = nn.LayerNorm(config.width)
        self.whole = nn.Linear(config.width, config.end + 1)
        self.parts = nn.Linear(config.width, self.levels.shape[1])

    def forward(self, states: Tensor) -> Tensor:
        """[...,D] -> [...,V]."""
        states = self.norm(states)
        logits: Tensor = self.whole(states) + self.parts(states) @ self.levels.T
        return logits


def levels_of(config: PainterConfig) -> Tensor:
    """1 where a token is a code with that level in that channel, float [V,sum of levels]."""
    every = torch.cartesian_prod(*(torch.arange(n) for n in config.levels))
    made = torch.cat([F.one_hot(every[:, i], n) for i, n in enumerate(config.levels)], 1).float()
    return F.pad(made, (0, 0, 0, config.end + 1 - len(made)))


class Painter(nn.Module):
    """A caption's encoder, the decoder of codes that looks at its words, and the autoencoder."""

    def __init__(self, config: PainterConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = TextEncoder(config.part(config.vocab_size, config.max_tokens))
        self.pictures = PictureCodes(config)
        shape = config.part(config.end + 1, config.length + 1)
        self.embed = CodeWords(config)
        self.layers = nn.ModuleList(CaptionLayer(shape) for _ in range(config.layers))
        self.head = CodeHead(config)
        self.mentioned = nn.Linear(config.width, config.things)  # which thing a word is of: training asks for it

    def cross(self, words: Tensor, mask: Tensor) -> tuple[list[Pair], Tensor]:
        """words [N,K,D], mask int64 [N,K] -> keys and values [N,H,K,d] of each layer, what is added to their scores."""
        found = []
        for layer in self.layers:
            assert isinstance(layer, CaptionLayer)
            other = layer.cross_attention
            found.append((heads(other.k_proj(words), other), heads(other.v_proj(words), other)))
        return found, (1 - mask[:, None, None].to(words.dtype)) * HIDDEN

    def forward(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """tokens int64 [N,T], BEGIN first; the caption's ids and mask int64 [N,K] -> logits [N,T,V] of what follows."""
        return self.follow(tokens, self.text_encoder(input_ids, attention_mask), attention_mask)

    def follow(self, tokens: Tensor, words: Tensor, attention_mask: Tensor) -> Tensor:
        """The same of encoded words [N,K,D]."""
        length = tokens.shape[1]
        states = self.embed(tokens, torch.arange(length, device=tokens.device).expand_as(tokens))
        mask = torch.full((length, length), -torch.inf).triu(1)
        pairs, bias = self.cross(words, attention_mask)
        for layer, pair in zip(self.layers, pairs, strict=True):
            states, _, _ = layer(states, mask.to(states.dtype), None, pair, bias.to(states.dtype))
        logits: Tensor = self.head(states)
        return logits

    @torch.inference_mode()
    def write(self, input_ids: Tensor, attention_mask: Tensor, length: int | None = None) -> Tensor:
        """Captions int64 [N,K] -> the likeliest token at each step, int64 [N,length]; None: places+cells."""
        pairs, bias = self.cross(self.text_encoder(input_ids, attention_mask), attention_mask)
        past: list[Pair | None] = [None] * len(pairs)
        token, written = torch.full((len(input_ids), 1), self.config.begin), []
        for place in range(length or self.config.length):
            states = self.embed(token, torch.full_like(token, place))
            for i, layer in enumerate(self.layers):
                states, key, value = layer(states, None, past[i], pairs[i], bias)
                past[i] = key, value
            token = self.head(states).argmax(-1)
            written.append(token)
        return torch.cat(written, 1)

    @torch.inference_mode()
    def paint(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Captions int64 [N,K] -> pictures uint8 [N,S,S,3]."""
        codes = self.write(input_ids, attention_mask)[:, self.config.places :]
        pixels = (self.pictures.picture(codes) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1)
