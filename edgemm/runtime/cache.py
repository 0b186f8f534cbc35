"""Compiled graphs on this machine's disk, so that only the first process ever waits for the compiler.

    DIRECTORY/<key>    SHA-256 of what follows, 32 bytes, then the compiled graph

DIRECTORY is $EDGEMM_CACHE, or else edgemm in $XDG_CACHE_HOME or ~/.cache; `EDGEMM_CACHE=` keeps nothing. The key is the
SHA-256 of all that a compiled graph depends on: the graph, the options, the library, the device and its driver. So a
newer one of any of them finds nothing, and nothing is ever wrong for where it is found.

A native library trusts what it is given here, so whoever can write an entry could run code: the directory must be
this user's own, with no right to write for others, and is used through one handle, so that it can't be exchanged in
between; an entry that is not what its digest says is thrown away unread. Where there is no such directory, nothing is
kept and nothing fails. Who is this user can do anything anyway.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from edgemm.artifact import canonical

MOST = 1 << 30  # bytes in all; the entries used longest ago go first
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
DIGEST = hashlib.sha256().digest_size
T = TypeVar("T")


def key_of(*parts: object) -> str:
    """A name for what these make; bytes count by their digest."""
    return hashlib.sha256(
        canonical([hashlib.sha256(p).hexdigest() if isinstance(p, bytes) else str(p) for p in parts]).encode()
    ).hexdigest()


def kept(key: str, load: Callable[[bytes], T], refused: type[Exception]) -> T | None:
    """What `load` makes of the entry; None where there is none that is whole, or it raises `refused`."""
    with _directory() as folder:
        if folder is None:
            return None
        try:
            handle = os.open(key, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
            with os.fdopen(handle, "rb") as file:
                digest, content = file.read(DIGEST), file.read()
            if hashlib.sha256(content).digest() == digest:
                os.utime(key, dir_fd=folder)
                return load(content)
        except (OSError, refused):
            pass
    return None


def keep(key: str, content: bytes) -> None:
    """Write an entry, all or nothing, and make room for it; a full or read-only disk keeps none."""
    with _directory() as folder:
        if folder is None or len(content) > MOST:
            return
        temporary = f".tmp-{os.getpid()}-{key}"
        try:
            _make_room(folder, MOST - len(content))
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, key, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            _remove(temporary, folder)


@contextmanager
def _directory() -> Iterator[int | None]:
    """A handle of the directory; None where there is none that is this user's alone."""
    if os.environ.get("EDGEMM_CACHE") == "":
        yield None
        return
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgemm"
        path = Path(os.environ.get("EDGEMM_CACHE", default))
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home
        yield None
        return
    try:
        info = os.fstat(handle)
        yield handle if info.st_uid == os.geteuid() and not info.st_mode & OTHERS_WRITE else None
    finally:
        os.close(handle)


def _make_room(folder: int, left: int) -> None:
    """Remove the entries that were used longest ago until the others have `left` bytes at most."""
    entries = []
    for name in os.listdir(folder):
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        entries.append((info.st_mtime_ns, name, info.st_size))
    for _, name, size in sorted(entries, reverse=True):
        left -= size
        if left < 0:
            _remove(name, folder)


def _remove(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
