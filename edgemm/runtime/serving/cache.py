"""What components made, kept for equal inputs until the space is needed: least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from edgemm.runtime.query import Array, Tensors

OVERHEAD = 500  # bytes that Python takes for a tensor and its place here


class Cache:
    """Tensors by key, of at most `size_bytes` together. Not thread-safe: the scheduler's lock holds it."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.used_bytes = size_bytes, 0
        self._kept: OrderedDict[bytes, Mapping[str, Array]] = OrderedDict()

    def get(self, key: bytes) -> Tensors | None:
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
        return kept

    def put(self, key: bytes, tensors: Mapping[str, Array]) -> None:
        """Keep `tensors`, unless they alone are too large; they must own their memory and never change."""
        size = _bytes(tensors)
        if size > self.size_bytes or key in self._kept:
            return
        self._kept[key] = tensors
        self.used_bytes += size
        while self.used_bytes > self.size_bytes:
            self.used_bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(tensors: Mapping[str, Array]) -> int:
    return sum(value.nbytes + OVERHEAD for value in tensors.values())
