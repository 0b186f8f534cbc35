"""Vision Transformers that tell the colours of easy-VQA's images, so that there are answers for INT8 to lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from PIL import Image
from torch.nn import functional as F

from edgemm.data.easy_vqa import samples

FITTED, BATCH = 1_000, 50
RIDGE = 1.0  # of the features' variance
SMALL = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "patch_size": 8,
    "initializer_range": 0.07,  # so that the class token tells images apart
}


def pictures(split: str) -> list[tuple[Path, str]]:
    """Image and colour, a row an image that "train" or "test" asks the colour of."""
    found: dict[str, tuple[Path, str]] = {}
    for sample in samples(split):
        if sample.kind.startswith("what") and "color" in sample.kind and isinstance(sample.image, Path):
            found.setdefault(sample.group, (sample.image, str(sample.label)))
    return list(found.values())


def manifest(path: Path, calibration: int) -> Path:
    """JSON Lines of so many training images, none of which a model here has seen, and of all test images."""
    parts = {"train": pictures("train")[FITTED : FITTED + calibration], "test": pictures("test")}
    lines = (
        {"image": str(image), "label": label, "split": split} for split, rows in parts.items() for image, label in rows
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def checkpoint(directory: Path, side: int, **config: Any) -> Path:
    """A ViTConfig's model for `side` pixels, weights random but its head's -> `directory`.

    The head is fitted to FITTED images by ridge regression.
    """
    torch.manual_seed(0)
    rows = pictures("train")[:FITTED]
    names = sorted({label for _, label in rows})
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = tf.ViTForImageClassification(tf.ViTConfig(image_size=side, **labels, **config)).eval()
    processor = tf.ViTImageProcessorPil(size={"height": side, "width": side})
    features = []
    with torch.inference_mode():
        for i in range(0, len(rows), BATCH):
            images = [Image.open(path).convert("RGB") for path, _ in rows[i : i + BATCH]]
            pixels = processor(images, return_tensors="pt").pixel_values
            features.append(model.vit(pixels).last_hidden_state[:, 0].double())
    x = torch.cat(features)
    y = F.one_hot(torch.tensor([names.index(label) for _, label in rows])).double()
    centred = x - x.mean(0)
    square = centred.T @ centred + RIDGE * centred.var() * len(x) * torch.eye(x.shape[1])
    weight = torch.linalg.solve(square, centred.T @ (y - y.mean(0)))
    with torch.no_grad():
        model.classifier.weight.copy_(weight.T)
        model.classifier.bias.copy_(y.mean(0) - x.mean(0) @ weight)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
