"""The .edgemm file: one zip, written the same way every time and checked whole before anything is used.

A bundle is a zip archive of members in this order: manifest.json, then the payload by name, with fixed
times. A member is stored as it is, or deflated where that pays: weights that are zero in many places.
Its archive comment is `edgemm-bundle sha256=` and the SHA-256, in hex, of every byte of the file before
those 64 digits. Members decide every other byte, so that a reader need not understand what zip allows
beyond this: a file of another layout (links, zip64, gaps) is refused.

Unpacked, a bundle is a directory NAME.edgemm of its members. They decide the archive's bytes, and so its
digest and signature: an unpacked bundle is checked as the file is, and goes wherever that goes.

manifest.json, canonical JSON: schema (1), version (a device refuses lower ones, see install.py), model, target,
program (see program.py), certificate (verdict and accuracy), provenance (digests of engine, source and data;
recipe, target, seed, tool versions), files (name -> sha256, size_bytes).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgemm.artifact import File, canonical
from edgemm.errors import InputError
from edgemm.recipe import Version
from edgemm.runtime.disk import read_regular
from edgemm.runtime.signature import check_signature

SCHEMA = 1
COMMENT = b"edgemm-bundle sha256="
HEX_DIGITS = 64
MEMBER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
MAX_NAME = 200
MAX_MEMBERS = 256
MAX_MANIFEST = 8 << 20
MAX_BYTES = (1 << 32) - 1  # what a zip holds without zip64
MAX_FILE = MAX_BYTES + (1 << 20)  # with a directory behind it
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
    """A bundle whose every byte was checked. `files`: name -> content."""

    manifest: dict[str, Any]
    files: Mapping[str, bytes]
    sha256: str

    @property
    def version(self) -> int:
        return int(self.manifest.get("version", 1))  # the first bundles had none


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


def read_bundle(path: Path, require_signature: Path | None = None) -> Bundle:
    """Read and check a bundle, packed or unpacked: signature, seal, names, sizes, schema, digest of each file.

    require_signature  PEM file of the public key or of the certificates that BUNDLE.sig must go back to
    Raises InputError on the first fault, ToolchainError when a signature is asked for and can't be checked here.
    """
    if _is_directory(path):
        members, sha256 = _unpacked(path)
        check_signature(path, sha256, require_signature)
    else:
        content, sha256 = _sealed(path)
        check_signature(path, sha256, require_signature)
        members = _members(path, content)
    _check_names(path, members)
    manifest, listed = _manifest(path, members.pop("manifest.json", b""))
    if differing := sorted(members.keys() ^ listed.keys()):
        raise InputError(f"{path}: files differ from the manifest, first {differing[0][:80]!r}", fix=DAMAGED)
    for name, data in members.items():
        if File(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) != listed[name]:
            raise InputError(f"{path}: {name} is not the file that the manifest names", fix=DAMAGED)
    return Bundle(manifest, Files(path, members), sha256)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # whoever may not look is told so when the file is opened
        return False


def _sealed(path: Path) -> tuple[bytes, str]:
    """A file that ends with the SHA-256 of what is before it, and the SHA-256 of it all."""
    content = read_regular(path, MAX_FILE, "bundle", "give the path of an .edgemm file")
    body, seal = memoryview(content)[:-HEX_DIGITS], content[-HEX_DIGITS:]
    if body[-len(COMMENT) :] != COMMENT:
        raise InputError(f"{path} is no edgemm bundle, or is cut short ({len(content)} bytes)", fix=DAMAGED)
    digest = hashlib.sha256(body)
    if digest.hexdigest().encode() != seal:
        raise InputError(f"{path} is damaged: its SHA-256 is not the one it ends with", fix=DAMAGED)
    digest.update(seal)
    return content, digest.hexdigest()


def _unpacked(path: Path) -> tuple[dict[str, bytes], str]:
    """Content of each file in a directory by name, and the SHA-256 of the bundle that they make."""
    read_regular(path / "manifest.json", MAX_MANIFEST, "bundle", "give the path of an .edgemm file", follow=False)
    found = itertools.islice((p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()), MAX_MEMBERS + 1)
    members: dict[str, bytes] = {}
    left = MAX_BYTES
    for file in sorted(found, key=lambda p: (p != path / "manifest.json", p.relative_to(path).as_posix())):
        content = read_regular(file, left, "file", DAMAGED, follow=False)
        members[file.relative_to(path).as_posix()] = content
        left -= len(content)
    _check_names(path, members)
    digest = hashlib.sha256()
    for piece in _layout(_entry(n, c) for n, c in members.items()):
        digest.update(piece)
    digest.update(digest.hexdigest().encode())
    return members, digest.hexdigest()


def _members(path: Path, content: bytes) -> dict[str, bytes]:
    """Content of each member by name, of an archive that is to the byte what `write_archive` makes of them."""
    members: dict[str, Entry] = {}
    offset = 0
    while content.startswith(LOCAL, offset):  # then the seal follows, longer than a header
        _, _, method, *_, size, whole, name_length, _ = FIELDS.unpack_from(content, offset + len(LOCAL))
        begin = offset + len(LOCAL) + FIELDS.size
        name = content[begin : begin + min(name_length, MAX_NAME + 1)].decode("ascii", "backslashreplace")
        if name in members:
            raise InputError(f"{path} holds two files named {name[:80]!r}", fix=FOREIGN)
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


def _check_names(path: Path, members: Mapping[str, bytes]) -> None:
    """Names that every file system keeps apart and that lead nowhere else, in the order that a bundle has them."""
    if len(members) > MAX_MEMBERS:
        raise InputError(f"{path} holds over {MAX_MEMBERS} files", fix=FOREIGN)
    taken: set[str] = set()
    for name in members:
        if not MEMBER.fullmatch(name) or len(name) > MAX_NAME:
            raise InputError(f"{path} holds a file named {name[:80]!r}", fix=FOREIGN)
        if name.lower() in taken:
            raise InputError(f"{path} holds two files named {name[:80]!r}, but for upper and lower case", fix=FOREIGN)
        taken.add(name.lower())
    for name in taken:
        if folder := next((parent for parent in PurePosixPath(name).parents if str(parent) in taken), None):
            raise InputError(f"{path} holds {name[:80]!r} and a file {str(folder)[:80]!r}", fix=FOREIGN)
    if list(members) != sorted(members, key=lambda name: (name != "manifest.json", name)):
        raise InputError(f"{path} holds its files in another order than a bundle", fix=FOREIGN)


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
