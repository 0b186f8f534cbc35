"""Colours and sizes that all figures share."""

from __future__ import annotations

INK, MUTED, FP32, COMPRESSED, BEYOND = "#1f2933", "#52606d", "#b8c2cc", "#0072b2", "#d55e00"
LABEL = {"textcoords": "offset points", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.0}}
WIDTH_IN = 10.4
LABEL_CHARS = 46


def shorten(name: str) -> str:
    """The start and the end of a long name: a layer's kind and number stand at its end."""
    return name if len(name) <= LABEL_CHARS else f"{name[: LABEL_CHARS // 3]}…{name[-(2 * LABEL_CHARS // 3) :]}"
