"""Pictures from captions: a plan of the picture, token by token, and then the picture, by way of discrete codes.

Axes: N pictures, S pixels a side, P cells, C channels of a code, L levels of a channel, T tokens of a plan, K words of
the caption, G things, H heads, D width, V pixels, kinds and marks.

A cell's code is one of finite scalar quantization (Mentzer et al. 2023): each of its channels is rounded to a few
levels. There is no codebook to learn, so none that collapses.

What the decoder writes after the mark BEGIN: of each thing, in the order in which the caption names them, its size,
colour and shape, and where it stands (x, y in pixels); NOWHERE five times for things that the caption has not. A
caption leaves open where things stand exactly; once that is said, each cell's code is given, and all are filled in at
once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.captioner import CaptionLayer, CaptionWords, Pair, heads
from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.encoders import TextEncoder

HIDDEN = -1e4  # added to scores: exp of it is 0 in float32, and float16 holds it


FIELDS = ("size", "colour", "shape", "x", "y")  # what a plan says of a thing
CELL = 8  # pixels a side


@dataclass(frozen=True, slots=True)
class PainterConfig:
    """Sizes in pixels, tokens and channels.

    kinds     words for sizes, colours and shapes
    things    how many a caption names at most
    channels  of the picture's grids of image_size / 4 and image_size / 8 cells a side
    code      channels of a cell's code;  levels  of each of them
    hidden    width of what fills in the codes
    """

    vocab_size: int
    kinds: tuple[str, ...]
    things: int
    width: int = 128
    heads: int = 4
    ffn_ratio: int = 2
    text_layers: int = 3
    layers: int = 3
    max_tokens: int = 80
    image_size: int = 64
    channels: tuple[int, int] = (48, 96)
    code: int = 8
    levels: int = 5
    hidden: int = 256

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PainterConfig:
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**kept)

    @property
    def side(self) -> int:
        """Cells, a row and a column."""
        return self.image_size // CELL

    @property
    def nowhere(self) -> int:
        """The token of a thing that there isn't; those before it are pixels."""
        return self.image_size

    @property
    def begin(self) -> int:
        return self.nowhere + 1 + len(self.kinds)

    @property
    def end(self) -> int:
        """Never written: a plan ends with its last thing."""
        return self.begin + 1

    @property
    def length(self) -> int:
        """Tokens of a plan."""
        return len(FIELDS) * self.things

    def plan(self, things: Sequence[Any]) -> list[int]:
        """The tokens of things that have `FIELDS`, in this order."""
        kind = {word: self.nowhere + 1 + i for i, word in enumerate(self.kinds)}
        said = [i for t in things for i in (kind[t.size], kind[t.colour], kind[t.shape], t.x, t.y)]
        return said + [self.nowhere] * (self.length - len(said))

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
    """The autoencoder: pictures to codes and back. A cell's code hangs on what is near: it is easier to foretell."""

    def __init__(self, config: PainterConfig) -> None:
        super().__init__()
        fine, coarse = config.channels
        self.levels = config.levels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, fine, 1),
            Residual(fine),
            nn.Conv2d(fine, coarse, 4, 2, 1),
            Residual(coarse, 1),
            nn.Conv2d(coarse, config.code, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code, coarse, 3, padding=1),
            Residual(coarse),
            Residual(coarse),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            Residual(fine),
            Residual(fine),
        )
        self.cover, self.colour = nn.Conv2d(fine, 16, 1), nn.Conv2d(fine, 3, 1)
        self.ground = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def rounded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float [N,3,S,S], -1..1 -> values [N,C,H,W] with straight-through gradients, codes int64 [N,P,C]."""
        smooth = self.encoder(pixels).float().tanh()
        most = self.levels - 1
        code = ((smooth.detach() + 1) / 2 * most).round()
        return smooth + (code / most * 2 - 1 - smooth).detach(), code.long().flatten(2).transpose(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels float [N,3,S,S], -1..1 -> the same by way of codes."""
        return self.decode(self.rounded(pixels)[0])

    def decode(self, values: Tensor) -> Tensor:
        """Values [N,C,H,W] -> pixels float [N,3,S,S]: one colour in each 4 x 4 of them, over the ground where it is."""
        grid = self.decoder(values)
        cover = F.pixel_shuffle(self.cover(grid), 4).sigmoid()
        colour = self.colour(grid).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return self.ground + cover * (colour - self.ground)

    def picture(self, codes: Tensor) -> Tensor:
        """Codes int64 [N,P,C] -> pixels float [N,3,S,S], -1..1."""
        side = math.isqrt(codes.shape[1])
        values = codes.to(self.ground.dtype) / (self.levels - 1) * 2 - 1
        return self.decode(values.transpose(1, 2).unflatten(2, (side, side))).clamp(-1, 1)


class Filling(nn.Module):
    """The code of each cell from a plan: what each thing is, and how far away, made of all things together."""

    middles: Tensor

    def __init__(self, config: PainterConfig) -> None:
        super().__init__()
        d, self.config = config.hidden, config
        self.kind = nn.Embedding(config.end + 1, d)
        self.across, self.along = (nn.Embedding(2 * config.image_size, d) for _ in range(2))
        self.each, self.all = nn.Linear(d, d), nn.Linear(d, d)
        self.code = nn.Linear(d, config.code * config.levels)
        middle = torch.arange(config.side) * CELL + CELL // 2
        self.register_buffer("middles", torch.cartesian_prod(middle, middle).flip(1).T, persistent=False)

    def forward(self, plan: Tensor) -> Tensor:
        """plan int64 [N,T] -> logits [N,P,C,L]."""
        size = self.config.image_size
        things = plan.unflatten(1, (-1, len(FIELDS)))
        what, where = self.kind(things[..., :3]).sum(2), things[..., 3:]
        away = where.clamp(max=size - 1)[..., None] - self.middles + size  # [N,G,2,P], 0..2S
        near = self.across(away[:, :, 0]) + self.along(away[:, :, 1]) + what[:, :, None]
        there = (where[..., 0] < self.config.nowhere).to(near.dtype)
        seen = (self.each(F.gelu(near)) * there[..., None, None]).sum(1)
        logits = self.code(F.gelu(self.all(F.gelu(seen))))
        return logits.unflatten(2, (self.config.code, self.config.levels))


class Painter(nn.Module):
    """A caption's encoder, the decoder of plans that looks at its words, what fills in codes, and the autoencoder."""

    def __init__(self, config: PainterConfig) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = TextEncoder(config.part(config.vocab_size, config.max_tokens))
        self.filling, self.pictures = Filling(config), PictureCodes(config)
        shape = config.part(config.end + 1, config.length + 1)
        self.embed = CaptionWords(shape)
        self.layers = nn.ModuleList(CaptionLayer(shape) for _ in range(config.layers))
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.end + 1))
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
    def write(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Captions int64 [N,K] -> plans: the likeliest token at each step, int64 [N,T]."""
        pairs, bias = self.cross(self.text_encoder(input_ids, attention_mask), attention_mask)
        past: list[Pair | None] = [None] * len(pairs)
        token, written = torch.full((len(input_ids), 1), self.config.begin), []
        for place in range(self.config.length):
            states = self.embed(token, torch.full_like(token, place))
            for i, layer in enumerate(self.layers):
                states, key, value = layer(states, None, past[i], pairs[i], bias)
                past[i] = key, value
            token = self.head(states).argmax(-1)
            written.append(token)
        return torch.cat(written, 1)

    def picture(self, plan: Tensor) -> Tensor:
        """Plans int64 [N,T] -> pixels float [N,3,S,S], -1..1."""
        return self.pictures.picture(self.filling(plan).argmax(-1))

    @torch.inference_mode()
    def paint(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Captions int64 [N,K] -> pictures uint8 [N,S,S,3]."""
        pixels = (self.picture(self.write(input_ids, attention_mask)) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1)
