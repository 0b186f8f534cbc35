"""Merge what a fixed length of audio pads: one position stays for many that hold nothing but silence."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from pydantic import Field

from edgemm.errors import InputError
from edgemm.yaml_files import Strict


class Options(Strict):
    """`stride`: padded positions that become one;  `tail`: s of silence after the recording that stay as they are."""

    stride: int = Field(16, ge=2)
    tail: float = Field(0.5, ge=0.1)


def prune(family: ModuleType, model: Any, run: Callable[[], object], options: Options) -> dict[str, Any]:
    """Merge in place, for families with `merge_padding`; no head leaves. InputError for other families."""
    if not hasattr(family, "merge_padding"):
        raise InputError(
            f"padding: {family.__name__.rpartition('.')[2]} does not pad its input to a fixed length",
            fix="remove this pass; it is for whisper",
        )
    family.merge_padding(model, options.stride, options.tail)
    return {}
