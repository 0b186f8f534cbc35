"""Files to tensors by the bundle's own data: no model code, no transformers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tokenizers import Tokenizer

from edgemm.errors import InputError

MAX_PIXELS = 64_000_000


def image_to_pixels(image: Path | str | bytes, spec: dict[str, Any]) -> NDArray[np.float32]:
    """Decode, resize and normalise one image -> float32[1,3,H,W].

    spec   size [H,W] pixels, resample (a Pillow filter name), mean and std per channel of values in 0..1

    Raises InputError for a file that is missing, broken or over 64 million pixels.
    """
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise InputError(
                    f"{name} has {opened.width}x{opened.height} pixels", fix=f"give an image of at most {MAX_PIXELS}"
                )
            rgb = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read {name}: {e}", fix="give a whole PNG, JPEG, BMP or WebP file") from e
    height, width = spec["size"]
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling[spec["resample"].upper()])
    pixels = np.asarray(rgb, np.float32) / 255
    pixels = (pixels - np.asarray(spec["mean"], np.float32)) / np.asarray(spec["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def text_to_ids(text: str, spec: dict[str, Any], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Tokenize one text -> int64[1,T], no padding. InputError when it is empty or over `max_tokens`."""
    if not text.strip():
        raise InputError(f"the text is empty: {text!r}", fix="give a question of at least one word")
    ids = tokenizer.encode(text).ids
    if len(ids) > spec["max_tokens"]:
        raise InputError(
            f"the text has {len(ids)} tokens: {text!r}", fix=f"the model takes at most {spec['max_tokens']}: shorten it"
        )
    return np.asarray([ids], np.int64)
