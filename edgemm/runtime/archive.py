"""The zip of a bundle: which bytes its members make, and members out of bytes that are exactly those.

See bundle.py for what a bundle is. APPNOTE.TXT: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgemm.errors import InputError
from edgemm.runtime.disk import read_regular

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
XML = b"<?xml"  # what begins so is tried, too: OpenVINO's graphs shrink to a twentieth
MOST = 64  # times that a deflated file may grow: a small file must not fill the memory
UNPACKED = "~"  # behind the name of a deflated file; no member's name has it
PERMISSIONS = 0o644 << 16  # rw-r--r--
DAMAGED = "copy the bundle again from where it was made, or run edgemm compress again"
FOREIGN = "do not use this bundle: edgemm does not write such a file"


@dataclass(frozen=True, slots=True)
class Entry:
    """A member: its content, and its bytes in the archive by `method`."""

    name: str
    content: bytes
    method: int
    data: bytes


def write_archive(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A zip of members in the given order, sealed by its comment."""
    body = b"".join(layout(pack(name, content) for name, content in members))
    return body + hashlib.sha256(body).hexdigest().encode()


def pack(name: str, content: bytes) -> Entry:
    """A member, deflated where that pays."""
    if deflatable(content):
        deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        data = deflate.compress(content) + deflate.flush()
        if _pays(content, len(data)):
            return Entry(name, content, DEFLATED, data)
    return Entry(name, content, STORED, content)


def deflatable(content: bytes) -> bool:
    """Whether a file is deflated where that pays: then the archive's bytes are those of this zlib."""
    return len(content) >= WORTH and (content.startswith(XML) or content.count(0) >= ZEROS * len(content))


def _pays(content: bytes, deflated: int) -> bool:
    return deflatable(content) and len(content) / MOST <= deflated <= SMALLER * len(content)


def layout(members: Iterable[Entry]) -> Iterator[bytes]:
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


def read_sealed(path: Path) -> tuple[bytes, str]:
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


def read_unpacked(path: Path) -> tuple[dict[str, Entry], str]:
    """Each file of a directory by name, and the SHA-256 of the bundle that they make."""
    read_regular(path / "manifest.json", MAX_MANIFEST, "bundle", "give the path of an .edgemm file", follow=False)
    found = itertools.islice((p for p in path.rglob("*") if p.is_symlink() or not p.is_dir()), MAX_MEMBERS + 1)
    names = [file.relative_to(path).as_posix() for file in found]
    entries: dict[str, Entry] = {}
    left = MAX_BYTES
    for name in sorted(names, key=lambda n: (n != "manifest.json", n.removesuffix(UNPACKED))):
        data = read_regular(path / name, left, "file", DAMAGED, follow=False)
        plain = name.removesuffix(UNPACKED)
        if plain in entries:
            raise InputError(f"{path} holds two files named {plain[:80]!r}", fix=FOREIGN)
        entries[plain] = _deflated(path, plain, data, left) if name != plain else Entry(plain, data, STORED, data)
        left -= len(entries[plain].content)
    check_names(path, entries)
    digest = hashlib.sha256()
    for piece in layout(entries.values()):
        digest.update(piece)
    digest.update(digest.hexdigest().encode())
    return entries, digest.hexdigest()


def read_members(path: Path, content: bytes) -> dict[str, Entry]:
    """Each member by name, of an archive that is to the byte what `write_archive` makes of them."""
    members: dict[str, Entry] = {}
    offset, left = 0, MAX_BYTES
    while content.startswith(LOCAL, offset):  # then the seal follows, longer than a header
        _, _, method, *_, size, _, name_length, _ = FIELDS.unpack_from(content, offset + len(LOCAL))
        begin = offset + len(LOCAL) + FIELDS.size
        name = content[begin : begin + min(name_length, MAX_NAME + 1)].decode("ascii", "backslashreplace")
        if name in members:
            raise InputError(f"{path} holds two files named {name[:80]!r}", fix=FOREIGN)
        if len(members) == MAX_MEMBERS:
            raise InputError(f"{path} holds over {MAX_MEMBERS} files", fix=FOREIGN)
        data = content[begin + name_length : begin + name_length + size]
        members[name] = _deflated(path, name, data, left) if method == DEFLATED else Entry(name, data, STORED, data)
        left -= len(members[name].content)
        offset = begin + name_length + size
    offset = 0
    for piece in layout(members.values()):
        if not content.startswith(piece, offset):
            raise InputError(f"{path} is not laid out as a bundle, from byte {offset} on", fix=FOREIGN)
        offset += len(piece)
    if offset != len(content) - HEX_DIGITS:
        raise InputError(f"{path} has {len(content)} bytes, its members make {offset + HEX_DIGITS}", fix=FOREIGN)
    return members


def _deflated(path: Path, name: str, data: bytes, most: int) -> Entry:
    """A deflated member of at most `most` bytes; InputError unless it is one that edgemm would deflate."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflate.decompress(data, min(MOST * len(data), most) + 1)
    except zlib.error as e:
        raise InputError(f"{path}: {name} can't be inflated: {e}", fix=FOREIGN) from e
    if not inflate.eof or inflate.unused_data or not _pays(content, len(data)):
        raise InputError(f"{path}: {name} is not deflated as edgemm does it", fix=FOREIGN)
    return Entry(name, content, DEFLATED, data)


def check_names(path: Path, members: Iterable[str]) -> None:
    """Names that every file system keeps apart and that lead nowhere else, in the order that a bundle has them."""
    names = list(members)
    if len(names) > MAX_MEMBERS:
        raise InputError(f"{path} holds over {MAX_MEMBERS} files", fix=FOREIGN)
    taken: set[str] = set()
    for name in names:
        if not MEMBER.fullmatch(name) or len(name) > MAX_NAME:
            raise InputError(f"{path} holds a file named {name[:80]!r}", fix=FOREIGN)
        if name.lower() in taken:
            raise InputError(f"{path} holds two files named {name[:80]!r}, but for upper and lower case", fix=FOREIGN)
        taken.add(name.lower())
    for name in taken:
        if folder := next((parent for parent in PurePosixPath(name).parents if str(parent) in taken), None):
            raise InputError(f"{path} holds {name[:80]!r} and a file {str(folder)[:80]!r}", fix=FOREIGN)
    if names != sorted(names, key=lambda name: (name != "manifest.json", name)):
        raise InputError(f"{path} holds its files in another order than a bundle", fix=FOREIGN)
