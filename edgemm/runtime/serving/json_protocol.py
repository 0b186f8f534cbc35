"""The Open Inference Protocol's JSON, with Triton's binary tensors behind it, to arrays and back.

https://github.com/kserve/open-inference-protocol, and Triton's docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgemm.errors import InputError
from edgemm.runtime.query import Array
from edgemm.runtime.serving.checks import DATATYPES, DTYPES
from edgemm.runtime.serving.model import Model
from edgemm.runtime.serving.service import Inference

MAX_NAMES = 64
Parameters = dict[str, bool | int | float | str]


class Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Input(Lenient):
    name: str
    shape: list[int] = Field(max_length=8)
    datatype: str
    data: list[Any] | None = None
    parameters: Parameters = {}


class Wanted(Lenient):
    name: str
    parameters: Parameters = {}


class Request(Lenient):
    id: str = Field("", max_length=256)
    parameters: Parameters = {}
    inputs: list[Input] = Field(max_length=MAX_NAMES)
    outputs: list[Wanted] = Field([], max_length=MAX_NAMES)


def parse(body: bytes, json_size: int | None) -> tuple[Request, Inference]:
    """A request's body, the first `json_size` bytes of which are JSON; InputError where it breaks the protocol."""
    if json_size is not None and json_size > len(body):
        raise InputError(
            f"Inference-Header-Content-Length is {json_size}, and the body has {len(body)} bytes",
            fix="give the size of the JSON that comes before binary tensors",
        )
    head = body[:json_size] if json_size is not None else body
    try:
        request = Request.model_validate_json(head)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise InputError(
            f"the request is not valid: {where or 'JSON'}: {first['msg']}"[:400], fix="see the protocol"
        ) from e
    offset, inputs = len(head), {}
    for tensor in request.inputs:
        if tensor.name in inputs:
            raise InputError(f"input {tensor.name[:80]!r} is there twice", fix="give it once")
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            inputs[tensor.name] = _from_json(tensor)
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(body) - offset:
            raise InputError(
                f"input {tensor.name[:80]!r}: binary_data_size = {str(size)[:80]}",
                fix=f"{len(body) - offset} bytes follow",
            )
        inputs[tensor.name] = from_bytes(tensor.name, tensor.datatype, tensor.shape, body[offset : offset + size])
        offset += size
    if offset != len(body):
        raise InputError(f"{len(body) - offset} bytes follow the last tensor", fix="leave them out")
    return request, Inference(inputs, [output.name for output in request.outputs], request.parameters)


def from_bytes(name: str, datatype: str, shape: list[int], content: bytes) -> Array:
    """A tensor from its little-endian bytes; InputError when they are not of that type and shape."""
    dtype = _dtype(name, datatype, shape)
    if len(content) != (wanted := math.prod(shape) * dtype.itemsize):
        raise InputError(
            f"input {name[:80]!r} has {len(content)} bytes", fix=f"{datatype} {shape} has {wanted}: give all of them"
        )
    if dtype.kind == "b":  # any other byte than 0 and 1 would be a bool that is neither
        return (np.frombuffer(content, np.uint8) != 0).reshape(shape)
    return np.frombuffer(content, dtype).reshape(shape)


def _from_json(tensor: Input) -> Array:
    dtype = _dtype(tensor.name, tensor.datatype, tensor.shape)
    flat: list[Any] = []
    pending = [iter(tensor.data or [])]
    while pending:
        for value in pending[-1]:
            if isinstance(value, list):
                pending.append(iter(value))
                break
            flat.append(value)
        else:
            pending.pop()
    able = {"f": (int, float), "i": (int,), "b": (bool,)}[dtype.kind]
    if any(not isinstance(v, able) or (isinstance(v, bool) and dtype.kind != "b") for v in flat):
        raise InputError(f"input {tensor.name[:80]!r} holds something else than {tensor.datatype}", fix="give numbers")
    if len(flat) != math.prod(tensor.shape):
        raise InputError(f"input {tensor.name[:80]!r} has {len(flat)} values", fix=f"its shape says {tensor.shape}")
    try:
        return np.array(flat, dtype).reshape(tensor.shape)
    except OverflowError as e:
        raise InputError(
            f"input {tensor.name[:80]!r} has a number that {tensor.datatype} can't hold", fix=str(e)
        ) from e


def _dtype(name: str, datatype: str, shape: list[int]) -> np.dtype[Any]:
    if datatype not in DTYPES:
        raise InputError(f"input {name[:80]!r} has datatype {datatype[:80]!r}", fix=f"use {', '.join(DTYPES)}")
    if any(not 0 <= size < 1 << 32 for size in shape):
        raise InputError(f"input {name[:80]!r} has shape {str(shape)[:200]}", fix="give sizes of 0 or more")
    return DTYPES[datatype]


def render(model: Model, request: Request, found: Mapping[str, Array]) -> tuple[bytes, int | None]:
    """The response's body, and how much of it is JSON where binary tensors follow."""
    default = request.parameters.get("binary_data_output", False)
    asked = {output.name: output.parameters.get("binary_data", default) for output in request.outputs}
    outputs, tail = [], []
    for name, value in found.items():
        told: dict[str, Any] = {"name": name, "datatype": DATATYPES[value.dtype.name], "shape": list(value.shape)}
        if asked.get(name, default):
            tail.append(np.ascontiguousarray(value).tobytes())
            told["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            told["data"] = value.ravel().tolist()
        outputs.append(told)
    head: dict[str, Any] = {"model_name": model.name, "model_version": model.version, "outputs": outputs}
    if request.id:
        head["id"] = request.id
    text = json.dumps(head).encode()
    return text + b"".join(tail), len(text) if tail else None
