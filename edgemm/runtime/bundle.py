"""The .edgemm file: one zip, written the same way every time and checked whole before anything is used.

A bundle is a zip archive of members in this order: manifest.json, then the payload by name, with fixed
times. A member is stored as it is, or deflated where that pays: XML, and weights that are zero in many places.
Its archive comment is `edgemm-bundle sha256=` and the SHA-256, in hex, of every byte of the file before
those 64 digits. Members decide every other byte, so that a reader need not understand what zip allows
beyond this: a file of another layout (links, zip64, gaps) is refused.

Unpacked, a bundle is a directory NAME.edgemm of its members, of deflated ones as they are in the archive, with `~`
behind the name: another zlib would make other bytes of them. They decide the archive's bytes, and so its digest and
signature: an unpacked bundle is checked as the file is, and goes wherever that goes.

manifest.json, canonical JSON: schema (1), version (a device refuses lower ones, see install.py), model, target,
program (see program.py), certificate (verdict and accuracy), provenance (digests of engine, source and data;
recipe, target, seed, tool versions), files (name -> sha256, size_bytes).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgemm.artifact import File, canonical
from edgemm.errors import InputError
from edgemm.recipe import Version
from edgemm.runtime.archive import (
    DAMAGED,
    DEFLATED,
    FOREIGN,
    MAX_MANIFEST,
    check_names,
    read_members,
    read_sealed,
    read_unpacked,
    write_archive,
)
from edgemm.runtime.signature import check_signature

SCHEMA = 1


class Manifest(BaseModel):
    """manifest.json of a bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Literal[1] = Field(alias="schema")
    version: Annotated[Version, Field(strict=True)] = 1
    model: str
    target: str
    program: dict[str, Any]
    certificate: dict[str, Any]
    provenance: dict[str, Any]
    files: dict[str, File]


class Files(dict[str, bytes]):
    """Name -> content; one that is not there is the bundle's fault."""

    def __init__(self, path: Path, files: Mapping[str, bytes]) -> None:
        super().__init__(files)
        self.path = path

    def __missing__(self, name: str) -> bytes:
        raise InputError(f"{self.path} has no file {name[:80]!r}", fix=DAMAGED)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every byte was checked. `files`: name -> content; `deflated`: name -> its bytes in the archive."""

    manifest: dict[str, Any]
    files: Mapping[str, bytes]
    deflated: Mapping[str, bytes]
    sha256: str

    @property
    def version(self) -> int:
        return int(self.manifest.get("version", 1))  # the first bundles had none


def write_bundle(manifest: dict[str, Any], files: Mapping[str, bytes]) -> bytes:
    """The bytes of a bundle; same arguments, same bytes."""
    listed = {n: {"sha256": hashlib.sha256(b).hexdigest(), "size_bytes": len(b)} for n, b in sorted(files.items())}
    head = canonical({"schema": SCHEMA, **manifest, "files": listed}).encode()
    return write_archive([("manifest.json", head), *sorted(files.items())])


def read_bundle(path: Path, require_signature: Path | None = None) -> Bundle:
    """Read and check a bundle, packed or unpacked: signature, seal, names, sizes, schema, digest of each file.

    require_signature  PEM file of the public key or of the certificates that BUNDLE.sig must go back to
    Raises InputError on the first fault, ToolchainError when a signature is asked for and can't be checked here.
    """
    if _is_directory(path):
        entries, sha256 = read_unpacked(path)
        check_signature(path, sha256, require_signature)
    else:
        content, sha256 = read_sealed(path)
        check_signature(path, sha256, require_signature)
        entries = read_members(path, content)
    check_names(path, entries)
    members = {name: entry.content for name, entry in entries.items()}
    deflated = {name: entry.data for name, entry in entries.items() if entry.method == DEFLATED}
    manifest, listed = _manifest(path, members.pop("manifest.json", b""))
    if differing := sorted(members.keys() ^ listed.keys()):
        raise InputError(f"{path}: files differ from the manifest, first {differing[0][:80]!r}", fix=DAMAGED)
    for name, data in members.items():
        if File(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) != listed[name]:
            raise InputError(f"{path}: {name} is not the file that the manifest names", fix=DAMAGED)
    return Bundle(manifest, Files(path, members), deflated, sha256)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # whoever may not look is told so when the file is opened
        return False


def _manifest(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, File]]:
    """manifest.json as it is, and its `files`."""
    if len(data) > MAX_MANIFEST:
        raise InputError(f"{path} has a manifest.json of {len(data)} bytes, over {MAX_MANIFEST}", fix=FOREIGN)
    try:
        manifest = json.loads(data)
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{path} has no readable manifest.json", fix=DAMAGED) from e
    if type(schema) is not int or schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise InputError(
            f"{path} has bundle schema {repr(schema)[:80]}; this edgemm reads {SCHEMA}",
            fix="pip install --upgrade edgemm" if newer else "run edgemm compress again",
        )
    try:
        listed = Manifest.model_validate(manifest).files
        if canonical(manifest).encode() != data:
            raise InputError(f"{path}: manifest.json is not canonical JSON", fix=FOREIGN)
        return manifest, listed
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: manifest.json: {where[:80]!r}: {first['msg']}", fix=DAMAGED) from e
    except UnicodeEncodeError as e:  # half of a surrogate pair, in JSON's \\u notation
        raise InputError(f"{path}: manifest.json holds no Unicode: {e.reason}", fix=FOREIGN) from e
