"""The .edgemm file: one zip, written the same way every time and checked whole before anything is used.

A bundle is a zip archive of members in this order: manifest.json, then the payload by name, with fixed
times. A member is stored as it is, or deflated where that pays: weights that are zero in many places.
Its archive comment is `edgemm-bundle sha256=` and the SHA-256, in hex, of every byte of the file before
those 64 digits. Members decide every other byte, so that a reader need not understand what zip allows
beyond this: a file of another layout (links, zip64, gaps) is refused.

manifest.json: schema (1), model, target, program (see program.py), certificate (verdict and accuracy),
provenance (digest of the engine, recipe, seed, versions), files (name -> sha256, size_bytes).
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgemm.artifact import File, canonical
from edgemm.errors import InputError

SCHEMA = 1
COMMENT = b"edgemm-bundle sha256="
HEX_DIGITS = 64
MEMBER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
MAX_MEMBERS = 256
MAX_BYTES = (1 << 32) - 1  # what a zip holds without zip64
# APPNOTE.TXT 4.3.7, 4.3.12, 4.3.16. A local header and a central one share the fields from FIELDS.
LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2\x14\3", b"PK\5\6"  # central: made by zip 2.0 on Unix
FIELDS = struct.Struct("<HHHHHIIIHH")  # version 2.0, flags, method, 00:00:00, 1980-01-01, CRC, sizes, name, extra
PLACE = struct.Struct("<HHHII")  # comment, disk, internal attributes, external attributes, offset
TAIL = struct.Struct("<HHHHIIH")  # disks, members here and in all, bytes and offset of the directory, comment
STORED, DEFLATED = 0, 8  # methods
WORTH, ZEROS, SMALLER = 1 << 16, 0.25, 0.9  # bytes of a file that is tried, share of zeros in it, and what must be left
MOST = 64  # times that a deflated file may grow: a small file must not fill the memory
PERMISSIONS = 0o644 << 16  # rw-r--r--
DAMAGED = "copy the bundle again from where it was made, or run edgemm compress again"
FOREIGN = "do not use this bundle: edgemm does not write such a file"


class Manifest(BaseModel):
    """manifest.json of a bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_: Literal[1] = Field(alias="schema")
    model: str
    target: str
    program: dict[str, Any]
    certificate: dict[str, Any]
    provenance: dict[str, Any]
    files: dict[str, File]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every byte was checked. `files`: name -> content."""

    manifest: dict[str, Any]
    files: Mapping[str, bytes]
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A member: its content, and its bytes in the archive by `method`."""

    name: str
    content: bytes
    method: int
    data: bytes


def write_bundle(manifest: dict[str, Any], files: Mapping[str, bytes]) -> bytes:
    """The bytes of a bundle; same arguments, same bytes."""
    listed = {n: {"sha256": hashlib.sha256(b).hexdigest(), "size_bytes": len(b)} for n, b in sorted(files.items())}
    head = canonical({"schema": SCHEMA, **manifest, "files": listed}).encode()
    return write_archive([("manifest.json", head), *sorted(files.items())])


def write_archive(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A zip of members in the given order, sealed by its comment."""
    body = b"".join(_layout(_entry(name, content) for name, content in members))
    return body + hashlib.sha256(body).hexdigest().encode()


def _entry(name: str, content: bytes) -> Entry:
    if len(content) >= WORTH and content.count(0) >= ZEROS * len(content):
        deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        data = deflate.compress(content) + deflate.flush()
        if _pays(len(content), len(data)):
            return Entry(name, content, DEFLATED, data)
    return Entry(name, content, STORED, content)


def _pays(whole: int, deflated: int) -> bool:
    return whole >= WORTH and whole / MOST <= deflated <= SMALLER * whole


def _layout(members: Iterable[Entry]) -> Iterator[bytes]:
    """Every byte of an archive before its seal, in pieces."""
    directory: list[bytes] = []
    offset = 0
    for member in members:
        raw, size = member.name.encode(), len(member.data)
        if max(offset + size, len(member.content)) > MAX_BYTES:
            raise InputError(f"the bundle has over {MAX_BYTES} bytes at {member.name}", fix="prune and quantize more")
        crc, whole = zlib.crc32(member.content), len(member.content)
        fields = FIELDS.pack(20, 0, member.method, 0, 0x21, crc, size, whole, len(raw), 0)
        yield LOCAL + fields + raw
        yield member.data
        directory.append(CENTRAL + fields + PLACE.pack(0, 0, 0, PERMISSIONS, offset) + raw)
        offset += len(LOCAL) + FIELDS.size + len(raw) + size
    yield from directory
    count, size = len(directory), sum(map(len, directory))
    yield END + TAIL.pack(0, 0, count, count, size, offset, len(COMMENT) + HEX_DIGITS) + COMMENT


def read_bundle(path: Path) -> Bundle:
    """Read and check a bundle: seal, names, sizes, schema, digest of each file. InputError on the first fault."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InputError(f"cannot read bundle {path}: {e.strerror}", fix="give the path of an .edgemm file") from e
    body, seal = content[:-HEX_DIGITS], content[-HEX_DIGITS:]
    if not body.endswith(COMMENT):
        raise InputError(f"{path} is no edgemm bundle, or is cut short ({len(content)} bytes)", fix=DAMAGED)
    if hashlib.sha256(body).hexdigest().encode() != seal:
        raise InputError(f"{path} is damaged: its SHA-256 is not the one it ends with", fix=DAMAGED)
    members = _members(path, content)
    manifest, listed = _manifest(path, members.pop("manifest.json", b""))
    if differing := sorted(members.keys() ^ listed.keys()):
        raise InputError(f"{path}: files differ from the manifest, first {differing[0][:80]!r}", fix=DAMAGED)
    for name, data in members.items():
        if File(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) != listed[name]:
            raise InputError(f"{path}: {name} is not the file that the manifest names", fix=DAMAGED)
    return Bundle(manifest, members, hashlib.sha256(content).hexdigest())


def _members(path: Path, content: bytes) -> dict[str, bytes]:
    """Content of each member by name, of an archive that is to the byte what `write_archive` makes of them."""
    members: dict[str, Entry] = {}
    offset = 0
    while content.startswith(LOCAL, offset):  # then the seal follows, longer than a header
        _, _, method, *_, size, whole, name_length, _ = FIELDS.unpack_from(content, offset + len(LOCAL))
        begin = offset + len(LOCAL) + FIELDS.size
        name = content[begin : begin + name_length].decode("ascii", "backslashreplace")
        if not MEMBER.fullmatch(name) or name in members:
            raise InputError(f"{path} holds a file named {name[:80]!r}", fix=FOREIGN)
        if len(members) == MAX_MEMBERS:
            raise InputError(f"{path} holds over {MAX_MEMBERS} files", fix=FOREIGN)
        data = content[begin + name_length : begin + name_length + size]
        if method == DEFLATED:
            members[name] = Entry(name, _inflate(path, name, data, whole), DEFLATED, data)
        else:
            members[name] = Entry(name, data, STORED, data)
        offset = begin + name_length + size
    offset = 0
    for piece in _layout(members.values()):
        if not content.startswith(piece, offset):
            raise InputError(f"{path} is not laid out as a bundle, from byte {offset} on", fix=FOREIGN)
        offset += len(piece)
    if offset != len(content) - HEX_DIGITS:
        raise InputError(f"{path} has {len(content)} bytes, its members make {offset + HEX_DIGITS}", fix=FOREIGN)
    return {name: entry.content for name, entry in members.items()}


def _inflate(path: Path, name: str, data: bytes, size: int) -> bytes:
    """A deflated member of `size` bytes; InputError unless it is that, and one that edgemm would deflate."""
    if not _pays(size, len(data)):
        raise InputError(f"{path}: {name} is deflated from {size} to {len(data)} bytes", fix=FOREIGN)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflate.decompress(data, size + 1)
    except zlib.error as e:
        raise InputError(f"{path}: {name} can't be inflated: {e}", fix=FOREIGN) from e
    if len(content) != size or not inflate.eof or inflate.unused_data:
        raise InputError(f"{path}: {name} is not deflated as it says", fix=FOREIGN)
    return content


def _manifest(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, File]]:
    """manifest.json as it is, and its `files`."""
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
        return manifest, Manifest.model_validate(manifest).files
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: manifest.json: {where[:80]!r}: {first['msg']}", fix=DAMAGED) from e
