"""The training questions of the reference model as tensors, and the tokenizer made of their words."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from edgemm.data import Sample
from edgemm.errors import InputError

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NEGATIONS = {"no", "not"}
UNKNOWN = -1.0


@dataclass(slots=True)
class Corpus:
    """Training questions grouped by image, as tensors.

    images     uint8[N,3,S,S]        distinct images
    questions  int64[Q,T]            distinct questions, token ids padded with 0
    asked      N lists of (question index, answer index)
    weights    N lists of 1 / how often that question has that answer
    concepts   answers that questions name: what an image can hold
    mentions   C lists of (question index, position) where the concept's word stands
    holds      float32[N,C]          1 present, 0 absent, UNKNOWN where no training answer tells
    validation the last images of a seeded shuffle, never trained on
    """

    images: Tensor
    questions: Tensor
    asked: list[list[tuple[int, int]]]
    weights: list[list[float]]
    answers: tuple[str, ...]
    concepts: tuple[str, ...]
    mentions: list[list[tuple[int, int]]]
    holds: Tensor
    tokenizer: Tokenizer
    training: list[int]
    validation: list[int]

    @classmethod
    def build(cls, samples: list[Sample], validation_images: int, seed: int) -> Corpus:
        told_of = [(s, s.text, s.label) for s in samples if s.text and s.label and isinstance(s.image, Path)]
        if not told_of:
            raise InputError(
                f"none of {len(samples)} samples has an image in a file, a question and an answer",
                fix="train on data that has: easy_vqa; on drawn scenes by --recipe reasoner-scenes",
            )
        answers = tuple(sorted({label for _, _, label in told_of}))
        texts = sorted({text for _, text, _ in told_of})
        tokenizer = build_tokenizer(texts, answers)
        encoded = [e.ids for e in tokenizer.encode_batch(texts)]
        questions = torch.zeros(len(texts), max(map(len, encoded)), dtype=torch.int64)
        for row, ids in zip(questions, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        tokens = {a: tokenizer.token_to_id(a) for a in answers}
        places = {a: [] if t is None else (questions == t).nonzero().tolist() for a, t in tokens.items()}
        concepts = tuple(a for a in answers if places[a])  # "yes" and "no" stand in no question
        if not concepts:
            raise InputError(
                "no question names an answer: stage 1 has nothing to learn",
                fix="add questions that name what images hold",
            )

        by_image: dict[str, list[tuple[str, str]]] = defaultdict(list)
        files = {s.group: s.image for s, _, _ in told_of}
        for sample, text, label in told_of:
            by_image[sample.group].append((text, label))
        text_index, answer_index = {t: i for i, t in enumerate(texts)}, {a: i for i, a in enumerate(answers)}
        images = torch.stack(
            [torch.from_numpy(np.array(Image.open(files[g]).convert("RGB"))) for g in by_image]  # type: ignore[arg-type]
        ).permute(0, 3, 1, 2)
        holds = torch.full((len(by_image), len(concepts)), UNKNOWN)
        for row, group in zip(holds, by_image.values(), strict=True):
            for text, label in group:
                for concept, present in told(text, label, concepts):
                    row[concepts.index(concept)] = float(present)
        asked = [[(text_index[t], answer_index[a]) for t, a in group] for group in by_image.values()]
        often = Counter(pair for group in asked for pair in group)
        if validation_images >= len(by_image):
            raise InputError(
                f"validation_images = {validation_images}: none of {len(by_image)} images is left to train on",
                fix="hold back fewer",
            )
        order = list(range(len(by_image)))
        random.Random(seed).shuffle(order)
        return cls(
            images=images.contiguous(),
            questions=questions,
            asked=asked,
            weights=[[1 / often[pair] for pair in group] for group in asked],
            answers=answers,
            concepts=concepts,
            mentions=[places[c] for c in concepts],
            holds=holds,
            tokenizer=tokenizer,
            training=order[:-validation_images],
            validation=order[-validation_images:],
        )

    def pixels(self, index: list[int]) -> Tensor:
        """Normalised pixels float32[N,3,S,S]."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (self.images[index].float() / 255 - mean) / std


def told(question: str, answer: str, concepts: tuple[str, ...]) -> list[tuple[str, bool]]:
    """What a question with its answer says of the image: (concept, present).

    "what color is the circle?" "red" says circle and red are there; "is there not a red shape?" "no" too.
    """
    words = question.rstrip("?").split()
    named = [w for w in words if w in concepts]
    if answer in ("yes", "no"):
        present = (answer == "yes") != bool(NEGATIONS & set(words))
        return [(w, present) for w in named]
    return [(w, True) for w in [*named, answer] if w in concepts]


def build_tokenizer(texts: list[str], answers: tuple[str, ...]) -> Tokenizer:
    """A word-level tokenizer over the words of `texts` and `answers`, with BERT's special tokens."""
    split = pre_tokenizers.Whitespace()
    words = sorted({w for t in [*texts, *answers] for w, _ in split.pre_tokenize_str(t.lower())})
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return tokenizer
