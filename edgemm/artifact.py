"""A finished, read-only directory with a manifest: what stages hand to each other.

An artifact is made in a temporary directory beside its destination and renamed when done, so a
`kill -9` leaves the whole artifact or none. Its key (parents, config, tool versions) names it in the
cache; its digest adds the payload.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgemm.console import log
from edgemm.errors import EdgemmError, InputError
from edgemm.host import release_memory

Kind = Literal[
    "imported",
    "source",
    "latencies",
    "pruned",
    "graph",
    "int8",
    "trial",
    "tuned",
    "quantized",
    "engine",
    "profile",
    "verified",
    "bundle",
]
ROOM = 1 << 20  # bytes; with less than this free, a failing writer failed for want of space
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_PLACE = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
DISK_ERRORS = FULL | REFUSED | NO_PLACE


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    size_bytes: int


class Manifest(BaseModel):
    """manifest.json of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_: Literal[1] = Field(1, alias="schema")
    kind: Kind
    key: str
    digest: str
    parents: tuple[str, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, File]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished directory. `path / name` is the payload file `name`."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def build(
    kind: Kind,
    runs: Path,
    *,
    parents: Sequence[Artifact] = (),
    config: Mapping[str, Any],
    tools: Sequence[str] = (),
    make: Callable[[Path], None],
) -> Artifact:
    """The artifact of these inputs: from `runs` when it is there whole, else made now by `make(directory)`.

    What takes a second and more is logged with its seconds, those of artifacts made on the way included.
    """
    versions = tool_versions(tools)
    digests = tuple(p.digest for p in parents)
    key = sha256_text(canonical({"kind": kind, "parents": digests, "config": config, "versions": versions}))
    final = runs / f"{kind}-{key[:16]}"
    if (found := _read(final, key)) is not None:
        return found
    begin = time.monotonic()
    shutil.rmtree(final, ignore_errors=True)
    with new_directory(final) as temporary:
        make(temporary)
        files = {
            p.relative_to(temporary).as_posix(): File(sha256=sha256_file(p), size_bytes=p.stat().st_size)
            for p in sorted(temporary.rglob("*"))
            if p.is_file()
        }
        manifest = Manifest(
            kind=kind,
            key=key,
            digest=_digest(key, files),
            parents=digests,
            config=dict(config),
            versions=versions,
            files=files,
        )
        write_atomic(temporary / "manifest.json", canonical(manifest.model_dump(by_alias=True)).encode())
    if (seconds := time.monotonic() - begin) >= 1:
        log(f"{final.name} took {seconds:.0f} s")
        release_memory()
    return Artifact(final, manifest)


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A directory beside `final` to write into; it gets that name, which is free, once all is done and on the disk."""
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        with writing(final.parent):  # inside the try: a disk is full only until the half-made files are gone
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                _fsync(path)
            temporary.rename(final)
            _fsync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(key: str, files: Mapping[str, File]) -> str:
    return sha256_text(key + canonical({name: f.model_dump() for name, f in files.items()}))


def _read(path: Path, key: str) -> Artifact | None:
    """A cached artifact, or None when it is absent, of other inputs, or not what its manifest says."""
    try:
        manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
        whole = (manifest.key, manifest.digest) == (key, _digest(key, manifest.files)) and all(
            sha256_file(path / n) == f.sha256 for n, f in manifest.files.items()
        )
    except (OSError, ValueError):
        return None
    return Artifact(path, manifest) if whole else None


class writing:  # in lower case as contextlib's: `with writing(path):`
    """Turn a full disk or a place that can't be written, however a library words it, into an InputError."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            what = f"cannot write {error.filename or self.where}: {error.strerror}"
        elif isinstance(error, Exception) and not isinstance(error, EdgemmError) and _is_full(self.where, error):
            what = f"no space left on the disk of {self.where}"
        else:
            return
        raise InputError(what, fix="free some space or choose another directory") from error


def _is_full(where: Path, error: Exception) -> bool:
    """Some libraries (safetensors) name the want of space and give it back; others (OpenVINO) do neither."""
    while not where.exists():
        where = where.parent
    return os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(where).free < ROOM


@contextmanager
def locked(runs: Path) -> Iterator[None]:
    """Hold `runs` for this process, so that two runs never write one artifact."""
    with writing(runs):
        runs.mkdir(parents=True, exist_ok=True)
        handle = (runs / ".lock").open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(
                f"another edgemm is working in {runs}", fix="wait for it, or choose another directory"
            ) from e
        yield


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that its name holds the old content or all of the new, never a part."""
    temporary = path.with_name(f".tmp-{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@cache
def source_digest() -> str:
    """SHA-256 over edgemm's own source: a cache must not outlive the code that filled it."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def tool_versions(tools: Sequence[str]) -> dict[str, str]:
    """Versions of the named distributions that are installed, and edgemm's own."""
    versions = {"edgemm": source_digest()[:16]}
    for tool in tools:
        try:
            versions[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            versions[tool] = "absent"
    return versions
