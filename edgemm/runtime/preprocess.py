"""Files to tensors by the bundle's own data: no model code, no transformers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from edgemm.errors import InputError

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # Pillow knows forty more, and one of them (EPS) starts a program


def image_to_pixels(image: Path | str | bytes, spec: dict[str, Any]) -> NDArray[np.float32]:
    """Decode, resize and normalise one image -> float32[1,3,H,W].

    spec   size [H,W] pixels, resample (a Pillow filter name), mean and std per channel of values in 0..1

    16-bit grey keeps its high bytes. Raises InputError for a file that is missing, broken, of another
    format than FORMATS or over 64 million pixels.
    """
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise InputError(
                    f"{name} has {opened.width}x{opened.height} pixels", fix=f"give an image of at most {MAX_PIXELS}"
                )
            rgb = (_high_bytes(opened) if opened.mode.startswith("I") else opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read {name}: {e}", fix="give a whole PNG, JPEG, BMP or WebP file") from e
    height, width = spec["size"]
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling[spec["resample"].upper()])
    pixels = np.asarray(rgb, np.float32) / 255
    pixels = (pixels - np.asarray(spec["mean"], np.float32)) / np.asarray(spec["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def _high_bytes(grey: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: what libpng does to 16-bit colour; Pillow itself would clip it to white."""
    return Image.fromarray((np.asarray(grey) >> 8).astype(np.uint8))


def read_tokenizer(content: bytes, name: str) -> Tokenizer:
    """A tokenizer.json; InputError naming it when it is none."""
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as e:  # tokenizers raises no narrower class
        raise InputError(f"{name} is no tokenizer: {e}", fix="save it again with the tokenizers library") from e


def text_to_ids(text: str, spec: dict[str, Any], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Tokenize one text -> int64[1,T], no padding. InputError when it is empty or over `max_tokens`."""
    if not text.strip():
        raise InputError(f"the text is empty: {text!r}", fix="give a question of at least one word")
    try:
        ids = tokenizer.encode(text).ids
    except TypeError as e:  # what tokenizers says of a str that has no UTF-8, from bytes of another encoding
        raise InputError(f"the text is not Unicode: {text[:80]!r}", fix="give it in UTF-8") from e
    if len(ids) > spec["max_tokens"]:
        raise InputError(
            f"the text has {len(ids)} tokens: {text[:80]!r}",
            fix=f"the model takes at most {spec['max_tokens']}: shorten it",
        )
    return np.asarray([ids], np.int64)
