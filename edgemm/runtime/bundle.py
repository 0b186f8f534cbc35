"""The .edgemm file: one zip, written the same way every time and checked whole before anything is used.

A bundle is a zip archive of stored (uncompressed) members in this order: manifest.json, then the
payload by name, with fixed times. Its archive comment is `edgemm-bundle sha256=` and the SHA-256, in
hex, of every byte of the file before those 64 digits.

manifest.json: schema (1), model, target, program (see session.py), certificate (verdict and accuracy),
provenance (digest of the engine, recipe, seed, versions), files (name -> sha256, size_bytes).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemm.artifact import canonical
from edgemm.errors import InputError

SCHEMA = 1
COMMENT = b"edgemm-bundle sha256="
HEX_DIGITS = 64
EPOCH = (1980, 1, 1, 0, 0, 0)
MEMBER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
MAX_MEMBERS = 256
DAMAGED = "copy the bundle again from where it was made, or run edgemm compress again"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every byte was checked. `files`: name -> content."""

    manifest: dict[str, Any]
    files: Mapping[str, bytes]
    sha256: str


def write_bundle(manifest: dict[str, Any], files: Mapping[str, bytes]) -> bytes:
    """The bytes of a bundle; same arguments, same bytes."""
    listed = {n: {"sha256": hashlib.sha256(b).hexdigest(), "size_bytes": len(b)} for n, b in sorted(files.items())}
    head = canonical({"schema": SCHEMA, **manifest, "files": listed}).encode()
    return write_archive([("manifest.json", head), *sorted(files.items())])


def write_archive(members: list[tuple[str, bytes]]) -> bytes:
    """A zip of stored members in the given order, sealed by its comment."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, content)
        archive.comment = COMMENT + b"0" * HEX_DIGITS
    body = buffer.getvalue()[:-HEX_DIGITS]
    return body + hashlib.sha256(body).hexdigest().encode()


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
    members = dict(_members(path, content))
    manifest = _manifest(path, members.pop("manifest.json", b""))
    listed = manifest["files"]
    if members.keys() != listed.keys():
        raise InputError(
            f"{path}: files differ from the manifest: {sorted(members.keys() ^ listed.keys())}", fix=DAMAGED
        )
    for name, data in members.items():
        if hashlib.sha256(data).hexdigest() != listed[name].get("sha256"):
            raise InputError(f"{path}: {name} is not the file that the manifest names", fix=DAMAGED)
    return Bundle(manifest, members, hashlib.sha256(content).hexdigest())


def _members(path: Path, content: bytes) -> Iterator[tuple[str, bytes]]:
    seen: set[str] = set()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_MEMBERS:
                raise InputError(f"{path} holds {len(infos)} files", fix=f"a bundle has at most {MAX_MEMBERS}")
            for info in infos:
                if not MEMBER.fullmatch(info.filename) or info.filename in seen:
                    raise InputError(f"{path} holds a file named {info.filename!r}", fix="do not use this bundle")
                if info.compress_type != zipfile.ZIP_STORED or max(info.file_size, info.compress_size) > len(content):
                    raise InputError(
                        f"{path}: {info.filename} declares {info.file_size} bytes in a file of {len(content)}",
                        fix="do not use this bundle",
                    )
                seen.add(info.filename)
                yield info.filename, archive.read(info)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as e:
        raise InputError(f"{path} is no readable zip: {e}", fix=DAMAGED) from e


def _manifest(path: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} has no readable manifest.json", fix=DAMAGED) from e
    if schema != SCHEMA:
        raise InputError(
            f"{path} has bundle schema {schema!r}; this edgemm reads {SCHEMA}", fix="pip install --upgrade edgemm"
        )
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("program"), dict):
        raise InputError(f"{path}: manifest.json lacks files or program", fix=DAMAGED)
    return dict(manifest)
