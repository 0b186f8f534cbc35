"""One component that takes many rows at once, and what a batch of each size costs.

Compiled shapes are faster than dynamic ones on a CPU, so where a component's rows have known shapes it is compiled for
batches of 1, 2, 4 ... rows of each; a batch between two sizes is filled up to the larger one or cut to the smaller,
whichever the latency table says answers more rows a second. Elsewhere any number of rows goes through the component as
the bundle has it. The table is measured when the bundle is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgemm.errors import InputError
from edgemm.runtime.component import Compile, Shared
from edgemm.runtime.query import Array, Call, Tensors

Shape = tuple[tuple[int, ...], ...]  # of each input, without the batch axis
ROUNDS = 6  # timings of each batch size
TOLERANCE = 5e-3  # of the largest value: by how much a row in a batch may differ from the same row alone (INT8 rounds)


class Engine:
    """A component of one bundle, on `streams` streams.

    spec      its ComponentSpec; shapes of inputs are those to compile for
    compile_  spec -> its call, which gives another for each stream
    sizes     batch sizes, ascending from 1;  fixed  compile for each size and known shape, fill batches up
    """

    def __init__(
        self, spec: dict[str, Any], compile_: Compile, sizes: Sequence[int], streams: int, *, fixed: bool
    ) -> None:
        self.spec, self.name, self.streams, self.fixed = spec, spec["name"], streams, fixed
        self.inputs = [port["name"] for port in spec["inputs"]]
        self.outputs = {port["name"]: tuple(port["shape"]) for port in spec["outputs"]}
        self.sizes = tuple(sizes)
        self._compile = compile_
        self._calls: dict[tuple[int, int | None, Shape | None], Call] = {}
        self._seconds: dict[Shape, dict[int, float]] = {}  # the latency table: seconds of a batch by its size

    def learn(self, row: Tensors) -> dict[str, Array]:
        """Compile for rows of this shape, and measure each batch size -> the row's outputs.

        A graph that does not take batches, or answers rows of a batch otherwise than alone, gets them one by one.
        """
        shape = self.shape(row)
        if shape not in self._seconds:
            self._seconds[shape] = {}
            for size in self.sizes:
                if size > 1 and not self._batches(row, size):
                    self.sizes = self.sizes[: self.sizes.index(size)]
                    break
                self._seconds[shape][size] = self._time(row, size)
        return self.run(0, [row])[0][0]

    def _batches(self, row: Tensors, size: int) -> bool:
        """Whether rows of a batch get what they get alone."""
        rng = np.random.default_rng(size)
        other = {n: rng.permuted(v * v.dtype.type(0.5) if v.dtype.kind == "f" else v, axis=-1) for n, v in row.items()}
        alone = [self.run(0, [r])[0][0] for r in (row, other)]
        rows = [other, *[row] * (size - 1)]
        try:
            made = self.run(0, rows)[0]
        except (InputError, ValueError):
            return False
        return all(_close(m[n], alone[r is other][n]) for r, m in zip(rows, made, strict=True) for n in self.outputs)

    def _time(self, row: Tensors, size: int) -> float:
        """Seconds of one batch; every stream compiles and warms up."""
        times = []
        for stream in range(self.streams):
            for i in range(1 + ROUNDS // self.streams):
                begin = time.perf_counter()
                self.run(stream, [row] * size)
                if i:
                    times.append(time.perf_counter() - begin)
        return min(times)  # what disturbs a timing only adds to it

    @property
    def table(self) -> dict[Shape, dict[int, float]]:
        return self._seconds

    def shape(self, inputs: Tensors) -> Shape:
        return tuple(inputs[name].shape[1:] for name in self.inputs)

    def _cost(self, shape: Shape) -> dict[int, float]:
        """Of this shape, or of the slowest one known."""
        return self._seconds.get(shape) or max(self._seconds.values(), key=lambda cost: cost[1])

    @property
    def fastest_s(self) -> float:
        """One row alone."""
        return min(cost[1] for cost in self._seconds.values())

    def row_s(self, shape: Shape) -> float:
        """One row, in the batch that takes most rows a second."""
        return min(seconds / size for size, seconds in self._cost(shape).items())

    def batch_for(self, shape: Shape, waiting: int, slack_s: float) -> int:
        """How many of `waiting` rows to take: most rows a second, of the sizes that are done in `slack_s` if any is."""
        cost = {size: s for size, s in self._cost(shape).items() if size in self.sizes}
        in_time = {size: s for size, s in cost.items() if s <= slack_s} or cost
        return min(max(in_time, key=lambda size: min(size, waiting) / in_time[size]), waiting)

    def run(self, stream: int, rows: Sequence[Tensors]) -> tuple[list[dict[str, Array]], int, int]:
        """Outputs [1, ...] of each row; how many elements were read, and how many of them only filled the batch up."""
        shape = self.shape(rows[0])
        known = self.fixed and shape in self._seconds
        size = next(s for s in self.sizes if s >= len(rows)) if known and len(rows) > 1 else len(rows)
        filled = size - len(rows)
        rows = [*rows, *[rows[-1]] * filled]
        call = self._call(stream, size if known else None, shape if known else None)
        stacked = {name: np.concatenate([row[name] for row in rows]) for name in self.inputs}
        made = call(stacked)
        elements = sum(value.size for value in stacked.values())
        return [_row(made, self.outputs, i) for i in range(size - filled)], elements, elements * filled // size

    def _call(self, stream: int, size: int | None, shape: Shape | None) -> Call:
        if (stream, size, shape) in self._calls:
            return self._calls[stream, size, shape]
        first = next((call for (_, *of), call in self._calls.items() if of == [size, shape]), None)
        if isinstance(first, Shared):
            call = first.another()
        else:
            spec = self.spec
            if shape is not None:
                ports = zip(spec["inputs"], shape, strict=True)
                spec = {**spec, "inputs": [{**port, "shape": [size, *axes]} for port, axes in ports]}
            call = self._compile(spec)
        self._calls[stream, size, shape] = call
        return call


def _row(made: Mapping[str, Array], names: Mapping[str, Any], i: int) -> dict[str, Array]:
    """The row's own copy: a call's outputs are its buffers, and a view would keep the whole batch."""
    outputs = {name: np.array(made[name][i : i + 1]) for name in names}
    for value in outputs.values():
        value.setflags(write=False)
    return outputs


def _close(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= TOLERANCE * max(1e-6, np.abs(b).max()))
