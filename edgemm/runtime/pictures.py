"""Pictures that a model made: from the ids of its decoder to a PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

URI = "data:image/png;base64,"


def whole(ids: Sequence[int], count: int) -> NDArray[np.int64]:
    """The ids of a picture -> int64[1,count], the last one again for those that a decoder left out."""
    made = np.array([*ids[:count]] or [0], np.int64)
    return np.pad(made, (0, count - len(made)), mode="edge")[None]


def pixels(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32[3,H,W], RGB, -1..1 -> uint8[H,W,3]; what is outside counts as the nearest inside."""
    return ((picture.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)


def png(picture: NDArray[np.float32]) -> bytes:
    """float32[3,H,W], RGB, -1..1, as a PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels(picture)).save(out, "PNG")
    return out.getvalue()


def uri(picture: NDArray[np.float32]) -> str:
    """The PNG as text: a data URI, which browsers show and JSON carries."""
    return URI + base64.b64encode(png(picture)).decode()
