"""easy-VQA 1.0 (PyPI package `easy-vqa`): 64x64 images of one coloured shape, questions, 13 answers."""

from __future__ import annotations

import re
from pathlib import Path

from edgemm.data import Sample
from edgemm.errors import InputError, ToolchainError


def samples(split: str) -> list[Sample]:
    """38,575 questions about 4,000 images ("train") or 9,673 about 1,000 ("test"), in file order."""
    try:
        import easy_vqa
    except ImportError as e:
        raise ToolchainError("the easy-vqa package is not installed", fix="pip install easy-vqa==1.0") from e
    if split == "train":
        questions, images = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    elif split == "test":
        questions, images = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    else:
        raise InputError(f"easy_vqa has no split {split!r}", fix="use train or test")
    return [
        Sample(f"{split}-{i}", str(image), Path(images[image]), text, answer, template(text))
        for i, (text, answer, image) in enumerate(zip(*questions, strict=True))
    ]


def template(question: str) -> str:
    """The question with its colours and shapes left out: "is there a COLOR shape?"."""
    question = re.sub(r"\b(black|blue|brown|gray|green|red|teal|yellow)\b", "COLOR", question)
    return re.sub(r"\b(circle|rectangle|triangle)\b", "SHAPE", question)
