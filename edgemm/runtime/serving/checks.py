"""What a request brings, held to limits before anything is made of it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from edgemm.errors import InputError, ToolchainError
from edgemm.runtime.preprocess import FORMATS, MAX_COORDINATE
from edgemm.runtime.query import Array
from edgemm.runtime.serving.decoder import PROMPT
from edgemm.runtime.serving.model import Model

DATATYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
DTYPES = {datatype: np.dtype(name) for name, datatype in DATATYPES.items()}
MAX_PROMPT = 1024  # tokens


def check_image(content: bytes | str, most: int) -> int:
    """Pixels that an image's header promises; InputError over `most`, or where there is no such header."""
    assert isinstance(content, bytes)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read the image: {e}"[:300], fix="give a whole PNG, JPEG, BMP or WebP file") from e
    if width * height > most:
        raise InputError(f"the image has {width}x{height} pixels", fix=f"give one of at most {most}")
    return width * height


def check_audio(content: bytes | str, most_s: float) -> None:
    """InputError for a recording that says that it lasts over `most_s`; reading it says the rest."""
    assert isinstance(content, bytes)
    try:
        import soundfile
    except (ImportError, OSError) as e:
        raise ToolchainError(f"audio needs soundfile: {e}", fix="pip install 'edgemm[audio]' on the server") from e
    try:
        seconds = soundfile.info(io.BytesIO(content)).duration
    except soundfile.LibsndfileError:
        return
    if seconds > most_s:
        raise InputError(f"the audio lasts {seconds:.1f} s", fix=f"give at most {most_s:g} s")


def check_tensors(model: Model, inputs: Mapping[str, Array]) -> None:
    """InputError for an input of another type or shape than the model takes, or with values that it can't take.

    An id beyond the vocabulary would be read from outside of a table.
    """
    text = model.text or {}
    given = {t["tensor"]: t for t in model.program["tensors"]}
    vocabulary = model.tokenizer.get_vocab_size() if model.tokenizer else 0
    highs = {
        text.get("ids"): vocabulary,
        text.get("mask"): 2,
        text.get("types"): 2,
        text.get("boxes"): MAX_COORDINATE + 1,
    }
    highs |= {name: t["high"] for name, t in given.items() if t["high"]} | {PROMPT: vocabulary}
    for name, value in inputs.items():
        port = model.ports.get(name, {"dtype": "int64", "shape": [1, "prompt"]})
        if value.dtype != port["dtype"]:
            raise InputError(f"{name} is {value.dtype}", fix=f"give {DATATYPES[port['dtype']]}")
        wanted = [_axis(model, name, i, a) for i, a in enumerate(port["shape"][1:], 1)]
        if value.ndim != 1 + len(wanted) or not all(
            size == most or (free and (0 < size < most or name == PROMPT))
            for size, (most, free) in zip(value.shape[1:], wanted, strict=True)
        ):
            shape = ", ".join(["batch", *(f"1 to {most}" if free else str(most) for most, free in wanted)])
            raise InputError(f"{name} has shape {list(value.shape)}", fix=f"give [{shape}]")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"{name} holds values that are not finite", fix="give numbers")
        if (high := highs.get(name)) and value.size and not (value.min() >= 0 and value.max() < high):
            raise InputError(f"{name} holds {value.min()} to {value.max()}", fix=f"give 0 to {high - 1}")


def _axis(model: Model, name: str, index: int, size: Any) -> tuple[int, bool]:
    """(largest size, whether smaller ones are taken) of an input's axis."""
    if name in model.sources.get("text", ()) and index == 1 and (model.buckets or name == PROMPT):
        return (MAX_PROMPT if name == PROMPT else model.buckets[-1]), True
    if isinstance(size, str):
        return max(c["max_sizes"].get(size, 1) for c in model.program["components"]), True
    return size, False
