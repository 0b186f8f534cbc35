"""numpy's .npy and .npz out of a bundle, read with limits: an array takes no more memory than its bytes in the file."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError

MAX_ARRAYS = 4096
MADE = "run edgemm compress again"


def read_array(content: bytes, where: str) -> NDArray[Any]:
    """The array of a .npy file whose header says what the bytes behind it are; InputError for any other."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"it is of version {version}")
        shape, fortran, dtype = read[version](stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        size = dtype.itemsize
        for side in shape:  # in Python's own whole numbers, which don't overflow
            size *= side
        if size != len(content) - stream.tell() or min(shape, default=0) < 0:
            raise ValueError(f"{len(content) - stream.tell()} bytes are no {dtype}{list(shape)}"[:200])
        data = np.frombuffer(content, dtype, offset=stream.tell())
    except (ValueError, TypeError, EOFError, RecursionError) as e:
        raise InputError(f"{where} is no array: {e}", fix=MADE) from e
    return data.reshape(shape, order="F" if fortran else "C").copy()


def read_arrays(content: bytes, where: str) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file by name; InputError when it is compressed, damaged or of over 4,096 arrays."""
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS:
                raise ValueError(f"it has {len(members)} arrays, over {MAX_ARRAYS}")
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(content):
                    raise ValueError(f"{member.filename[:80]!r} is not stored as it is")
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"{name[:80]!r} is there twice")
                arrays[name] = read_array(archive.read(member), f"{where}: {name[:80]}")
    except (ValueError, RuntimeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        raise InputError(f"{where} holds no arrays: {e}", fix=MADE) from e
    return arrays
