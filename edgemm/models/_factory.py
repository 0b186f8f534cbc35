"""Python factories: package.module:function that returns a torch module and example inputs by name."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgemm.artifact import canonical
from edgemm.errors import InputError
from edgemm.models import Component, Dtype, Tensor

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


def call_factory(name: str) -> Component:
    """Import package.module, call factory() and run the module once -> one graph, in FP32 and eval mode.

    Axis 0 of every input and output is the batch, all other sizes are those of the examples. The current directory
    is looked in first, as `python -m` does. This runs the user's own code.
    Raises InputError for what is missing, raises, holds NaN, or is no module with inputs that it takes.
    """
    where, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with _users_code(f"importing {where}"):
            factory = getattr(importlib.import_module(where), attribute, None)
    finally:
        sys.path.pop(0)
    if not callable(factory):
        raise InputError(f"{where} has no function {attribute!r}", fix="give package.module:function")
    with _users_code(f"{name}()"):
        made = factory()
    match made:
        case (nn.Module() as module, dict() as examples) if examples:
            module.float().eval()
        case _:
            raise InputError(f"{name} gave {type(made).__name__}", fix="return (module, {input name: example tensor})")
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{name}: {key} holds NaN or infinity", fix="train or convert the model again")
    batch = len(first) if torch.is_tensor(first := next(iter(examples.values()))) and first.dim() else 1
    inputs = tuple(_port(f"{name}: input {key!r}", key, value, batch) for key, value in examples.items())
    with torch.inference_mode(), _users_code(f"{name}: the module, called with its example inputs,"):
        given = module(**examples)
    parts = given if isinstance(given, tuple) else (given,)
    names = ["output"] if len(parts) == 1 else [f"output_{i}" for i in range(len(parts))]
    outputs = tuple(_port(f"{name}: {key}", key, value, batch) for key, value in zip(names, parts, strict=True))
    high = {n: int(v.max()) + 1 for n, v in examples.items() if v.dtype in (torch.int64, torch.int32)}
    return Component("model", module, inputs, outputs, {"batch": 64}, high)


def digest(component: Component) -> str:
    """SHA-256 of what the factory made: its code as torch prints it and as it is written, weights, and shapes."""
    module = component.module
    assert isinstance(module, nn.Module)
    found = hashlib.sha256((repr(module) + canonical([component.spec(), component.high])).encode())
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    source = Path(sys.modules[type(module).__module__].__file__ or "")
    if source.is_file():
        found.update(source.read_bytes())
    return found.hexdigest()


@contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Whatever the user's own code raises becomes an InputError that says where."""
    try:
        yield
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        raise InputError(
            f"{what} raised {type(e).__name__}: {e} ({at.filename}:{at.lineno})",
            fix="give package.module:function, importable from here, that returns a module and inputs that it takes",
        ) from e


def _port(what: str, name: str, value: Any, batch: int) -> Tensor:
    """A named input or output; InputError unless it is a tensor that ONNX takes, with the batch on axis 0."""
    if not isinstance(value, torch.Tensor) or value.dtype not in DTYPES or value.shape[:1] != (batch,):
        given = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(
            f"{what} is {given}",
            fix=f"give tensors of {', '.join(DTYPES.values())} with the batch ({batch} in the examples) on axis 0",
        )
    return Tensor(name, DTYPES[value.dtype], ("batch", *value.shape[1:]))
