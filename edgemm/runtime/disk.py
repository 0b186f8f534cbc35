"""Reading what others wrote and writing what must outlive a power cut."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgemm.errors import InputError


def read_regular(path: Path, most: int, what: str, fix: str, *, follow: bool = True) -> bytes:
    """The bytes of a plain file of at most `most` bytes.

    what, fix  what an error calls it, and what to do about it
    follow     whether the last part of the path may be a link
    Raises InputError for what is absent, larger, or a directory, pipe or device, which has no end.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)  # a pipe is to be refused, not waited for
    try:
        handle = os.open(path, flags)
        with os.fdopen(handle, "rb") as file:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                raise InputError(f"cannot read {what} {path}: it is no plain file", fix=fix)
            if info.st_size > most:
                raise InputError(f"{what} {path} has {info.st_size} bytes, over {most}", fix=fix)
            return file.read(most)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        why = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"cannot read {what} {path}: {why}", fix=fix) from e


def write_durable(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, to the disk; `sync_directory` of its directory makes its name last."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
