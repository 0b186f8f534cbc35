"""Arrays of a bundle: what numpy wrote comes back, and no file makes more of itself than it is."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemm.errors import InputError
from edgemm.runtime.arrays import MAX_ARRAYS, read_array, read_arrays
from edgemm.stages.package import array_bytes


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array("text"),
        np.array(["a", "bcd"]),
        np.zeros((0, 4)),
        np.float64(3),
        np.array([True, False]),
    ],
)
def test_what_numpy_wrote_comes_back(value: Any) -> None:
    read = read_array(array_bytes(np.save, value), "x")
    np.testing.assert_array_equal(read, value)
    assert read.dtype == np.asarray(value).dtype and read.flags.writeable
    stored = read_arrays(array_bytes(np.savez, a=value, **{"1.b": value}), "x")
    assert list(stored) == ["a", "1.b"]
    np.testing.assert_array_equal(stored["1.b"], value)


def refuse_array(content: bytes) -> None:
    with pytest.raises(InputError, match=r"there is no array[\s\S]*fix: "):
        read_array(content, "there")


def test_a_header_that_says_more_or_less_than_there_is_takes_no_memory() -> None:
    good = array_bytes(np.save, np.zeros(4, np.float32))
    for shape in (b"(9999999999,)", b"(3,)", b"(0,)", b"(4, 4, 4)", b"(-1,)", b"(4.0,)", b"None", b"(-2, -2)"):
        refuse_array(good.replace(b"(4,), }" + b" " * len(shape), shape + b", }" + b" " * 4))
    refuse_array(good[:-1])
    refuse_array(good + b"\0")
    refuse_array(array_bytes(np.save, np.array([{}], object)))
    refuse_array(good.replace(b"\x93NUMPY\x01", b"\x93NUMPY\x07"))


def test_compressed_encrypted_doubled_and_too_many_are_refused() -> None:
    zeros = np.zeros(1_000_000, np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=zeros)
    assert len(buffer.getvalue()) < 10_000
    for content, why in (
        (buffer.getvalue(), "not stored as it is"),
        (array_bytes(np.savez, **{f"a{i}": np.zeros(0) for i in range(MAX_ARRAYS + 1)}), "over 4096"),
        (b"", "zip"),
        (b"PK\5\6" + bytes(3), "zip"),
    ):
        with pytest.raises(InputError, match=why):
            read_arrays(content, "there")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(edits=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 255)), min_size=1, max_size=4))
def test_random_mutation_breaks_nothing(edits: list[tuple[int, int]]) -> None:
    changed = bytearray(array_bytes(np.savez, a=np.arange(9), b=np.array(["x", "yz"])))
    for at, flip in edits:
        changed[at % len(changed)] ^= flip
    try:
        found = read_arrays(bytes(changed), "there")
    except InputError as e:
        assert "\n  fix: " in str(e)
    else:
        assert sum(a.nbytes for a in found.values()) <= len(changed)
