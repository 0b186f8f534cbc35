"""Images and texts to tensors by the bundle's own data: no model code, no transformers.

What transformers' processors (5.23, Pillow backend) make of the same spec, with one exception: 16-bit grey.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Encoding, Tokenizer

from edgemm.errors import InputError

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # Pillow knows forty more, and one of them (EPS) starts a program
MAX_COORDINATE = 1000
Box = tuple[int, int, int, int]


def image_to_pixels(image: Path | str | bytes, spec: dict[str, Any]) -> NDArray[np.float32]:
    """Decode, resize, crop and normalise one image -> float32[1,3,H,W].

    spec   an ImageSpec (see inputs.py) as a dict

    Pixels are taken as they are stored: an EXIF orientation turns nothing. 16-bit grey keeps its high bytes.
    Raises InputError for a file that is missing, broken, of another format than FORMATS, over 64 million
    pixels, or so narrow that it would be that large, or nothing, after resizing.
    """
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise InputError(
                    f"{name} has {opened.width}x{opened.height} pixels", fix=f"give an image of at most {MAX_PIXELS}"
                )
            rgb = _to_rgb(opened, spec["transparency"])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read {name}: {e}", fix="give a whole PNG, JPEG, BMP or WebP file") from e
    if spec["size"]:
        width, height = _resized(rgb.width, rgb.height, spec)
        if not 0 < width * height <= MAX_PIXELS:
            raise InputError(
                f"{name} has {rgb.width}x{rgb.height} pixels, and becomes {width}x{height} for the model",
                fix="give an image that is less narrow",
            )
        rgb = rgb.resize((width, height), Image.Resampling[spec["resample"].upper()])
    if spec["crop"]:
        height, width = spec["crop"]
        left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
        rgb = rgb.crop((left, top, left + width, top + height))  # what lies outside becomes zeros
    pixels = (np.asarray(rgb, np.float64) * spec["scale"]).astype(np.float32)
    pixels = (pixels - np.asarray(spec["mean"], np.float32)) / np.asarray(spec["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def _to_rgb(image: Image.Image, transparency: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _high_bytes(image)
    if transparency == "white" and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _high_bytes(grey: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: what libpng does to 16-bit colour; Pillow itself would clip it to white."""
    return Image.fromarray((np.asarray(grey) >> 8).astype(np.uint8))


def _resized(width: int, height: int, spec: dict[str, Any]) -> tuple[int, int]:
    """(width, height) after resizing, rounded as transformers does it for processors of that kind."""
    if spec["fit"] == "exact":
        return spec["size"][1], spec["size"][0]
    shortest, longest = spec["size"]
    short, long = min(width, height), max(width, height)
    if spec["rounding"] == "nearest":  # image_processing_pil_vilt.get_resize_output_image_size
        sides = float(shortest), shortest / short * long
        if sides[1] > longest:
            shrink = longest / sides[1]
            sides = shrink * sides[0], shrink * sides[1]
        new_short, new_long = (int(side + 0.5) for side in sides)
    else:  # image_transforms.get_size_with_aspect_ratio
        edge = longest * short / long if long / short * shortest > longest else shortest
        new_short = round(edge)
        new_long = long if new_short == short else int(edge * long / short)
    new_short, new_long = (side // spec["multiple"] * spec["multiple"] for side in (new_short, new_long))
    return (new_short, new_long) if width < height else (new_long, new_short)


def read_tokenizer(content: bytes, name: str) -> Tokenizer:
    """A tokenizer.json, its padding and truncation switched off; InputError naming it when it is none."""
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as e:  # tokenizers raises no narrower class
        raise InputError(f"{name} is no tokenizer: {e}", fix="save it again with the tokenizers library") from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def text_to_tensors(
    text: str, boxes: Sequence[Box] | None, spec: dict[str, Any], tokenizer: Tokenizer, pad_to: int
) -> dict[str, NDArray[np.int64]]:
    """Tokenize one text -> ids, mask and segments int64[1,T], boxes int64[1,T,4], by the names that `spec` gives them.

    boxes   [x0,y0,x1,y1] in 0..1000 of each word, words being what white space separates; for models that take
            them. Each token has its word's box, special tokens and padding have zeros
    spec    a TextSpec (see inputs.py) as a dict
    pad_to  T is at least this and at least the spec's own `pad_to`

    Raises InputError when the text is empty or over `max_tokens`, or the boxes don't fit it.
    """
    if not text.strip():
        raise InputError(f"the text is empty: {text!r}", fix="give a text of at least one word")
    encoding = _encode(text, boxes, spec, tokenizer)
    if len(encoding.ids) > spec["max_tokens"]:
        raise InputError(
            f"the text has {len(encoding.ids)} tokens: {text[:80]!r}",
            fix=f"the model takes at most {spec['max_tokens']}: shorten it",
        )
    padding = max(0, spec["pad_to"] - len(encoding.ids), pad_to - len(encoding.ids))
    columns: dict[str | None, tuple[list[Any], Any]] = {
        spec["ids"]: (encoding.ids, spec["pad_id"]),
        spec["mask"]: (encoding.attention_mask, 0),
        spec["types"]: (encoding.type_ids, 0),
    }
    if boxes is not None:
        of_tokens = [(0, 0, 0, 0) if word is None else boxes[word] for word in encoding.word_ids]
        columns[spec["boxes"]] = (of_tokens, (0, 0, 0, 0))
    return {
        name: np.asarray([[*values, *[filler] * padding]], np.int64)
        for name, (values, filler) in columns.items()
        if name is not None
    }


def _encode(text: str, boxes: Sequence[Box] | None, spec: dict[str, Any], tokenizer: Tokenizer) -> Encoding:
    try:
        if boxes is None and spec["boxes"] is None:
            return tokenizer.encode(text)
        _check_boxes(text.split(), boxes, spec)
        return tokenizer.encode(text.split(), is_pretokenized=True)
    except TypeError as e:  # what tokenizers says of a str that has no UTF-8, from bytes of another encoding
        raise InputError(f"the text is not Unicode: {text[:80]!r}", fix="give it in UTF-8") from e


def read_boxes(text: str) -> tuple[Box, ...]:
    """Boxes from JSON: [[x0, y0, x1, y1], ...] of whole numbers; InputError when it is none."""
    try:
        boxes = json.loads(text)
        if not all(len(box) == 4 and all(type(n) is int for n in box) for box in boxes):
            raise ValueError("not four whole numbers each")
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"boxes {text[:80]!r}: {e}", fix="give [[x0, y0, x1, y1], ...] in 0..1000") from e
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes)


def _check_boxes(words: list[str], boxes: Sequence[Box] | None, spec: dict[str, Any]) -> None:
    if spec["boxes"] is None:
        raise InputError("the model takes no boxes", fix="give the text alone")
    if boxes is None:
        raise InputError("the text has no boxes", fix="give a box [x0,y0,x1,y1] in 0..1000 for each of its words")
    if len(boxes) != len(words):
        raise InputError(
            f"the text has {len(words)} words and {len(boxes)} boxes", fix="give one box for each word, in order"
        )
    for word, box in zip(words, boxes, strict=True):
        if len(box) != 4 or not all(isinstance(c, int) and 0 <= c <= MAX_COORDINATE for c in box):
            raise InputError(
                f"the box of {word[:80]!r} is {list(box)!r}"[:300],
                fix="give [x0,y0,x1,y1] as whole numbers: thousandths of the page's width and height",
            )
