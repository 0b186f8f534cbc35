"""A component with a state: what is long goes in chunk by chunk, at a cost linear in its length, in constant memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgemm.errors import InputError
from edgemm.runtime.component import Component
from edgemm.runtime.query import Array, Tensors


def read_chunks(
    component: Component, known: Tensors, observe: Callable[[str, Tensors], None] | None = None
) -> dict[str, Array]:
    """Run a component whose spec has a `state` over its inputs, a chunk at a time -> the outputs of the last chunk.

    known    the inputs [B,N,...], N as long as one likes; the state before them, or it begins as zeros
    observe  is told what each chunk's run is given

    The last chunk is filled up with its last entry. Raises InputError for inputs of different lengths, or of none.
    """
    spec = component.spec
    before, after = spec["state"]
    ports = {port["name"]: port for port in spec["inputs"]}
    begin = ports.pop(before)
    first, lengths = next(iter(ports)), {name: known[name].shape[1] for name in ports}
    length, chunk = lengths[first], ports[first]["shape"][1]
    if set(lengths.values()) != {length} or not length:
        told = ", ".join(f"{n} of {name}" for name, n in lengths.items())
        raise InputError(f"there are {told}", fix="give as many of each, at least 1")
    zeros = np.zeros((len(known[first]), *begin["shape"][1:]), begin["dtype"])
    made = {after: known.get(before, zeros)}
    for start in range(0, length, chunk):
        at = np.minimum(np.arange(start, start + chunk), length - 1)
        given = {name: known[name][:, at] for name in ports} | {before: made[after]}
        if observe:
            observe(spec["name"], given)
        made = component(given)
    return made
