"""Shape of the scenes reasoner: what its modules are built from, and what its config.json holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

MODALITIES = ("image", "audio")  # what text looks at, in the order of every tensor that has an axis of them


@dataclass(frozen=True, slots=True)
class ScenesConfig:
    """Sizes in pixels, tokens, samples of a 16 kHz waveform and channels; layers are counted by level.

    max_tokens, question_tokens   of a text, and of one that is a question
    image_layer   basic or bottleneck, as transformers' ResNetConfig has it; every stage but the first halves the grid
    audio_*       Wav2Vec2Config's conv_dim, conv_kernel, conv_stride and layers
    audio_least   samples that shorter recordings are filled up to with silence: the longest that was learned from
    levels        layers of each level of reasoning: objects, relations, implications
    slots         learned queries that gather the objects of a scene
    top_k         keys that a word looks at, 0 for all
    alignment     how words meet the other modalities: attention, a graph of typed edges (see graph.py), both, or
                  neither: by the slots alone;  graph_threshold  cosine above which two nodes share an edge
    fusion        dynamic: how much a modality counts is computed from the input; static: learned once
    task          what the graphs are for: answers to questions, finding pictures or recordings by captions, or
                  writing captions
    exits         confidences from which the answers of all levels but the last are given at once; over 1: never
    caption_layers  of the decoder that writes captions
    embedding     width of the space in which captions, images and recordings are compared
    """

    answers: tuple[str, ...]
    vocab_size: int
    width: int = 192
    heads: int = 6
    ffn_ratio: int = 2
    drop_head: float = 0.1
    max_tokens: int = 64
    question_tokens: int = 20
    text_layers: int = 2
    image_size: int = 64
    image_embedding: int = 64
    image_layer: Literal["basic", "bottleneck"] = "basic"
    image_channels: tuple[int, ...] = (64, 128)
    image_depths: tuple[int, ...] = (2, 2)
    audio_seconds: int = 4
    audio_channels: tuple[int, ...] = (32, 64, 96, 96)
    audio_kernels: tuple[int, ...] = (10, 8, 8, 8)
    audio_strides: tuple[int, ...] = (5, 4, 4, 4)
    audio_layers: int = 2
    audio_least: int = 0
    levels: tuple[int, int, int] = (2, 2, 2)
    slots: int = 8
    top_k: int = 0
    alignment: tuple[Literal["attention", "graph"], ...] = ("attention",)
    graph_threshold: float = 0.2
    fusion: Literal["dynamic", "static"] = "dynamic"
    caption_layers: int = 2
    embedding: int = 128
    exits: tuple[float, float] = (2.0, 2.0)
    task: Literal["answer", "find_image", "find_audio", "caption"] = "answer"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScenesConfig:
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**kept)

    @property
    def side(self) -> int:
        """Rows, and columns, of the image's grid: its first stage has a cell for four pixels."""
        return self.image_size // (4 * 2 ** (len(self.image_channels) - 1))

    @property
    def patches(self) -> int:
        """Cells of the image's grid."""
        return self.side**2

    def frames(self, samples: int) -> int:
        """Audio tokens of a waveform."""
        for kernel, stride in zip(self.audio_kernels, self.audio_strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    @property
    def min_frames(self) -> int:
        """The fewest audio tokens that the levels take; an absent recording has so many.

        Not 1: OpenVINO's INT8 graphs whose dynamic axis had 1 at first give other lengths wrong afterwards (2026.4.1).
        """
        return max(2, self.top_k)

    @property
    def min_samples(self) -> int:
        """The shortest waveform, 0.1 s or what gives `min_frames` or `audio_least`: silence makes others as long."""
        samples = self.min_frames
        for kernel, stride in zip(self.audio_kernels[::-1], self.audio_strides[::-1], strict=True):
            samples = (samples - 1) * stride + kernel
        return max(1_600, samples, self.audio_least)

    @property
    def max_samples(self) -> int:
        return 16_000 * self.audio_seconds
