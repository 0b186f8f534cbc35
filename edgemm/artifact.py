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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgemm.errors import InputError

Kind = Literal["source", "pruned", "graph", "quantized", "engine", "verified", "bundle"]
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG}


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
    """The artifact of these inputs: from `runs` when it is there whole, else made now by `make(directory)`."""
    versions = tool_versions(tools)
    digests = tuple(p.digest for p in parents)
    key = sha256_text(canonical({"kind": kind, "parents": digests, "config": config, "versions": versions}))
    final = runs / f"{kind}-{key[:16]}"
    if (found := _read(final, key)) is not None:
        return found
    with writing(runs):
        shutil.rmtree(final, ignore_errors=True)
        temporary = runs / f".tmp-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            make(temporary)
            files = {
                p.relative_to(temporary).as_posix(): File(sha256=sha256_file(p), size_bytes=p.stat().st_size)
                for p in sorted(temporary.rglob("*"))
                if p.is_file()
            }
            payload = {name: f.model_dump() for name, f in files.items()}
            manifest = Manifest(
                kind=kind,
                key=key,
                digest=sha256_text(key + canonical(payload)),
                parents=digests,
                config=dict(config),
                versions=versions,
                files=files,
            )
            write_atomic(temporary / "manifest.json", canonical(manifest.model_dump(by_alias=True)).encode())
            for path in [*temporary.rglob("*"), temporary]:
                _fsync(path)
            temporary.rename(final)
            _fsync(runs)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Artifact(final, manifest)


def _read(path: Path, key: str) -> Artifact | None:
    """A cached artifact, or None when it is absent, of other inputs, or not what its manifest says."""
    try:
        manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
        whole = manifest.key == key and all(sha256_file(path / n) == f.sha256 for n, f in manifest.files.items())
    except (OSError, ValidationError):
        return None
    return Artifact(path, manifest) if whole else None


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn a full disk or a place that can't be written, however a library words it, into an InputError."""
    try:
        yield
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        raise InputError(
            f"cannot write {e.filename or where}: {e.strerror}", fix="free some space or choose another -o directory"
        ) from e
    except RuntimeError as e:
        if _free_bytes(where) > 1 << 20:
            raise
        raise InputError(
            f"no space left on the disk of {where}", fix="free some space or choose another -o directory"
        ) from e


def _free_bytes(where: Path) -> int:
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(where).free


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
            raise InputError(f"another edgemm is working in {runs}", fix="wait for it, or choose another -o") from e
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
