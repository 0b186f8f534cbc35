"""A bundle that is not, to the byte, what edgemm writes is refused by an InputError before anything in it is used."""

from __future__ import annotations

import hashlib
import io
import json
import random
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgemm.artifact import canonical
from edgemm.errors import InputError
from edgemm.runtime import archive
from edgemm.runtime.archive import COMMENT, HEX_DIGITS, MAX_MEMBERS, write_archive
from edgemm.runtime.bundle import read_bundle, write_bundle

MANIFEST: dict[str, Any] = {
    "model": "reasoner",
    "target": "box",
    "program": {"backend": "openvino", "components": []},
    "certificate": {"verdict": "PASS", "accuracy": []},
    "provenance": {"seed": 0},
}
FILES = {"fusion.bin": bytes(range(256)), "fusion.xml": b"<net/>", "golden/0.png": b"\x89PNG", "tokenizer.json": b"{}"}
SMALL = write_bundle(MANIFEST, FILES)
PLAIN_FILE = 0o644 << 16
CENTRAL_SIGNATURE, END_SIGNATURE = b"PK\x01\x02", b"PK\x05\x06"
DEEP = 100_000

bounded = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def seal(body: bytes) -> bytes:
    """`body`, which ends with the comment's digits, whatever they are, with the right ones."""
    return body[:-HEX_DIGITS] + hashlib.sha256(body[:-HEX_DIGITS]).hexdigest().encode()


def listed(files: dict[str, bytes]) -> dict[str, Any]:
    return {n: {"sha256": hashlib.sha256(b).hexdigest(), "size_bytes": len(b)} for n, b in files.items()}


def head(content: dict[str, bytes] = FILES, /, **changes: Any) -> bytes:
    """manifest.json of `content`, with keys replaced, and without those whose new value is `...`."""
    values = {"schema": 1, **MANIFEST, "files": listed(content), **changes}
    return canonical({k: v for k, v in values.items() if v is not ...}).encode()


def patched(content: bytes, at: int, layout: str, *values: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(layout, changed, at, *values)
    return seal(bytes(changed))


def central(content: bytes, member: int) -> int:
    """Offset of the central header of the n-th member."""
    at = content.index(CENTRAL_SIGNATURE)
    for _ in range(member):
        at = content.index(CENTRAL_SIGNATURE, at + 4)
    return at


def hand_made(*members: tuple[zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A sealed archive with the manifest of FILES and members as zipfile writes them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        for info, content in members:
            made.writestr(info, content)
        made.comment = COMMENT + b"0" * HEX_DIGITS
    return seal(buffer.getvalue())


def info(name: str, attributes: int = PLAIN_FILE) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    made.create_system, made.external_attr = 3, attributes
    return made


def stored() -> list[tuple[zipfile.ZipInfo, bytes]]:
    return [(info("manifest.json"), head()), *((info(n), b) for n, b in sorted(FILES.items()))]


def refuse(content: bytes, folder: Path) -> str:
    """Read `content` as a bundle, which must fail as a user's error and leave the disk alone -> the message."""
    path = folder / "m.edgemm"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_bundle(path)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert str(path) in message
    assert "\n  fix: " in message
    assert len(message) < 2000, "an error is read by a person, however large the bundle"
    assert [p.name for p in folder.iterdir()] == ["m.edgemm"]
    assert path.read_bytes() == content
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the many cases of a test that can't take a fresh one for each."""
    return tmp_path_factory.mktemp("bundle")


def test_round_trip_gives_manifest_files_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "m.edgemm"
    path.write_bytes(SMALL)
    read = read_bundle(path)
    assert read.files == FILES
    assert read.manifest == {"schema": 1, **MANIFEST, "files": listed(FILES)}
    assert read.sha256 == hashlib.sha256(SMALL).hexdigest()


def test_bundle_without_payload_and_with_the_most_members_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "m.edgemm"
    for files in ({}, {f"f{i:03}": bytes([i]) for i in range(MAX_MEMBERS - 1)}, {"empty": b""}):
        path.write_bytes(write_bundle(MANIFEST, files))
        assert read_bundle(path).files == files


def test_same_arguments_give_the_same_bytes_in_any_order() -> None:
    backwards = dict(reversed(FILES.items())), dict(reversed(MANIFEST.items()))
    assert write_bundle(backwards[1], backwards[0]) == write_bundle(MANIFEST, FILES) == SMALL
    assert hashlib.sha256(SMALL[:-HEX_DIGITS]).hexdigest().encode() == SMALL[-HEX_DIGITS:]


def test_bytes_are_those_that_python_zipfile_writes() -> None:
    assert hand_made(*stored()) == SMALL


def test_bundle_too_large_for_a_plain_zip_is_refused_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 600)
    with pytest.raises(InputError, match=r"over 600 bytes[\s\S]*fix: "):
        write_bundle(MANIFEST, FILES)


def test_any_other_zip_tool_reads_a_bundle(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(SMALL)) as opened:
        assert opened.testzip() is None
        assert opened.namelist() == ["manifest.json", *sorted(FILES)]
        assert {i.compress_type for i in opened.infolist()} == {zipfile.ZIP_STORED}
        assert {i.date_time for i in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_every_flipped_byte_is_found(folder: Path) -> None:
    rng = random.Random(0)
    for position in sorted(rng.sample(range(len(SMALL)), 300)):
        changed = bytearray(SMALL)
        changed[position] ^= rng.randrange(1, 256)
        refuse(bytes(changed), folder)


@pytest.mark.parametrize(
    "size",
    [0, 1, 21, 22, HEX_DIGITS - 1, HEX_DIGITS, HEX_DIGITS + len(COMMENT), len(SMALL) // 2]
    + [len(SMALL) - n for n in (HEX_DIGITS + len(COMMENT), HEX_DIGITS + 1, HEX_DIGITS, 2, 1)],
)
def test_truncation_is_found(size: int, tmp_path: Path) -> None:
    assert f"{size} bytes" in refuse(SMALL[:size], tmp_path)


@pytest.mark.parametrize("more", [b"\0", b"\n", b"0" * HEX_DIGITS, SMALL, b"x" * 100_000])
def test_bytes_behind_or_before_are_found(more: bytes, tmp_path: Path) -> None:
    refuse(SMALL + more, tmp_path)
    refuse(more + SMALL, tmp_path)


def test_sealed_again_around_foreign_bytes_is_refused(tmp_path: Path) -> None:
    refuse(seal(b"#!/bin/sh\n" + SMALL), tmp_path)
    body, comment = SMALL[: -HEX_DIGITS - len(COMMENT)], COMMENT + b"0" * HEX_DIGITS
    refuse(seal(body + b"junk" + comment), tmp_path)


@pytest.mark.parametrize("body", [b"", b"PK", b"\0" * 22, END_SIGNATURE, CENTRAL_SIGNATURE * 9, b"x" * 5000])
def test_sealed_garbage_is_no_zip(body: bytes, tmp_path: Path) -> None:
    assert "zip" in refuse(seal(body + COMMENT + b"0" * HEX_DIGITS), tmp_path)


def test_absent_file_directory_and_empty_file_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.edgemm", tmp_path, tmp_path / "none" / "m.edgemm"):
        with pytest.raises(InputError, match="fix: ") as caught:
            read_bundle(path)
        assert str(path) in str(caught.value)
    refuse(b"", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/etc/x", "a/../../b", "a/..", "..", ".", "./x", "a/./b", "a//b", "a/", "/", ""),
        *(
            "C:\\x",
            "..\\x",
            "a\\b",
            "C:x",
            ".hidden",
            "a/.hidden",
            "~x",
            "-rf",
            "a b",
            "a\nb",
            "a*",
            "\u00e9",
            "\u202ex",
        ),
    ],
)
def test_name_that_is_not_plain_is_refused(name: str, tmp_path: Path) -> None:
    files = {name: b"payload"}
    message = refuse(write_archive([("manifest.json", head(files)), (name, b"payload")]), tmp_path)
    assert repr(name) in message or not name.isascii()


def test_name_is_not_cut_at_a_nul(tmp_path: Path) -> None:
    """Some readers, zipfile among them, see `fusion.bin` in `fusion.bin\\0.exe`."""
    content = write_archive([("manifest.json", head({"fusion.bin": b"payload"})), ("fusion.bin_.exe", b"payload")])
    content = seal(content.replace(b"fusion.bin_.exe", b"fusion.bin\0.exe"))
    assert "\\x00" in refuse(content, tmp_path)


@pytest.mark.parametrize("name", ["fusion.bin", "manifest.json"])
def test_name_that_occurs_twice_is_refused(name: str, tmp_path: Path) -> None:
    for members in (
        [("manifest.json", head()), *sorted(FILES.items()), (name, b"other")],
        [(name, b"other"), ("manifest.json", head()), *sorted(FILES.items())],
    ):
        assert repr(name) in refuse(write_archive(members), tmp_path)


@pytest.mark.parametrize("size", [len(SMALL) + 1, 1 << 30, 0xFFFFFFFE])
@pytest.mark.parametrize("fields", ["size", "compressed", "both"])
def test_size_beyond_the_file_is_refused_before_memory_is_taken(size: int, fields: str, tmp_path: Path) -> None:
    at = central(SMALL, 1)
    packed = {"size": (at + 24, "<I"), "compressed": (at + 20, "<I"), "both": (at + 20, "<II")}
    where, layout = packed[fields]
    values = [size] * (len(layout) - 1)
    refuse(patched(SMALL, where, layout, *values), tmp_path)


def test_size_that_reaches_into_the_next_member_is_refused(tmp_path: Path) -> None:
    at = central(SMALL, 1)
    longer = len(FILES["fusion.bin"]) + 40
    refuse(patched(SMALL, at + 20, "<II", longer, longer), tmp_path)


def test_compressed_member_and_zip_bomb_are_refused(tmp_path: Path) -> None:
    bomb = bytes(20_000_000)
    files = {**FILES, "zeros.bin": bomb}
    members = [(info("manifest.json"), head(files)), *((info(n), b) for n, b in sorted(files.items()))]
    for i, _ in members[1:]:
        i.compress_type = zipfile.ZIP_DEFLATED
    content = hand_made(*members)
    assert len(content) < len(bomb) // 100
    refuse(content, tmp_path)


DRAWN = random.Random(0)
SPARSE = bytes(DRAWN.randrange(256) if DRAWN.random() < 0.3 else 0 for _ in range(1 << 16))
DEFLATED = write_bundle(MANIFEST, {"fusion.bin": SPARSE})


def deflated(data: bytes, size: int, crc: int) -> bytes:
    """DEFLATED with other bytes for its member, headers and all."""
    files = {"fusion.bin": SPARSE}
    made = archive.layout(
        [
            archive.Entry("manifest.json", head(files), 0, head(files)),
            archive.Entry("fusion.bin", SPARSE, 8, data),
        ]
    )
    body = b"".join(made)
    old, new = (struct.pack("<III", c, len(data), n) for c, n in ((zlib.crc32(SPARSE), len(SPARSE)), (crc, size)))
    assert body.count(old) == 2
    return seal(body.replace(old, new) + b"0" * HEX_DIGITS)


def raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def test_a_deflated_member_is_read_and_other_readers_agree(tmp_path: Path) -> None:
    assert len(DEFLATED) < 0.6 * len(SPARSE)
    good = deflated(raw_deflate(SPARSE), len(SPARSE), zlib.crc32(SPARSE))
    assert good == DEFLATED
    (tmp_path / "m.edgemm").write_bytes(good)
    assert read_bundle(tmp_path / "m.edgemm").files == {"fusion.bin": SPARSE}
    assert zipfile.ZipFile(tmp_path / "m.edgemm").read("fusion.bin") == SPARSE


@pytest.mark.parametrize(("begin", "packed"), [(b"<?xml", True), (b"<net>", False)])
def test_xml_is_deflated(begin: bytes, packed: bool, tmp_path: Path) -> None:
    text = begin + "".join(f'<layer id="{i}" name="{DRAWN.random()}"/>' for i in range(3000)).encode()
    (tmp_path / "m.edgemm").write_bytes(write_bundle(MANIFEST, {"fusion.xml": text}))
    assert (len((tmp_path / "m.edgemm").read_bytes()) < len(text)) is packed
    assert read_bundle(tmp_path / "m.edgemm").files == {"fusion.xml": text}


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (raw_deflate(SPARSE)[:-1], len(SPARSE)),  # cut
        (raw_deflate(SPARSE) + b"x", len(SPARSE)),  # something hidden behind it
        (raw_deflate(SPARSE), len(SPARSE) - 1),  # longer than it says
        (raw_deflate(SPARSE), len(SPARSE) + 1),
        (raw_deflate(SPARSE), 0xFFFFFFFE),  # memory
        (b"\xff" * 20_000, len(SPARSE)),  # no such stream
        (raw_deflate(bytes(1 << 26)), 1 << 26),  # a bomb
        (raw_deflate(b"x"), 1),  # what edgemm stores as it is
        (b"", 0),
    ],
)
def test_a_deflated_member_that_is_not_what_it_says_is_refused(data: bytes, size: int, tmp_path: Path) -> None:
    refuse(deflated(data, size, zlib.crc32(SPARSE)), tmp_path)


@pytest.mark.parametrize("method", [8, 9, 12, 14, 93, 99, 0xFFFF])
def test_member_of_another_compression_method_is_refused(method: int, tmp_path: Path) -> None:
    refuse(patched(SMALL, central(SMALL, 1) + 10, "<H", method), tmp_path)


@pytest.mark.parametrize("flags", [0x1, 0x41, 0x20, 0x8, 0x800, 0x2000, 0xFFFF])
def test_encrypted_and_otherwise_flagged_member_is_refused(flags: int, tmp_path: Path) -> None:
    content = patched(SMALL, central(SMALL, 1) + 8, "<H", flags)
    refuse(content, tmp_path)
    first_local = SMALL.index(b"PK\x03\x04", 4)
    refuse(patched(content, first_local + 6, "<H", flags), tmp_path)


@pytest.mark.parametrize(
    "mode", [stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755, stat.S_IFIFO | 0o644, stat.S_IFCHR, 0o4755]
)
def test_entry_that_is_no_plain_file_is_refused(mode: int, tmp_path: Path) -> None:
    members = stored()
    members[1] = (info("fusion.bin", mode << 16), FILES["fusion.bin"])
    refuse(hand_made(*members), tmp_path)


def test_symlink_whose_target_is_its_listed_content_is_refused(tmp_path: Path) -> None:
    files = {"link": b"/etc/passwd"}
    link = info("link", (stat.S_IFLNK | 0o777) << 16)
    refuse(hand_made((info("manifest.json"), head(files)), (link, files["link"])), tmp_path)


@pytest.mark.parametrize("count", [MAX_MEMBERS + 1, 5000, 65_000])
def test_too_many_members_are_refused(count: int, tmp_path: Path) -> None:
    files = {f"f{i:05}": b"" for i in range(count - 1)}
    assert f"over {MAX_MEMBERS} files" in refuse(write_bundle(MANIFEST, files), tmp_path)


def zip64_extra(*values: int) -> bytes:
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)


def with_central_extra(content: bytes, member: int, extra: bytes, size: int | None = None) -> bytes:
    """`extra` put into one central header, the end record told of it, and the size fields set."""
    at = central(content, member)
    (name_length,) = struct.unpack_from("<H", content, at + 28)
    changed = bytearray(content)
    if size is not None:
        struct.pack_into("<II", changed, at + 20, size, size)
    struct.pack_into("<H", changed, at + 30, len(extra))
    changed[at + 46 + name_length : at + 46 + name_length] = extra
    end = changed.rindex(END_SIGNATURE)
    (directory,) = struct.unpack_from("<I", changed, end + 12)
    struct.pack_into("<I", changed, end + 12, directory + len(extra))
    return seal(bytes(changed))


@pytest.mark.parametrize("size", [len(FILES["fusion.bin"]), 1 << 40, (1 << 64) - 1])
def test_zip64_size_true_or_false_is_refused(size: int, tmp_path: Path) -> None:
    refuse(with_central_extra(SMALL, 1, zip64_extra(size, size), 0xFFFFFFFF), tmp_path)


@pytest.mark.parametrize(
    "extra",
    [b"\1\0\xff\xff", b"\1\0", b"\1\0\0\0", b"\x75\x70\5\0\1abcd", b"\x75\x70\1\0\1", b"UT\5\0\1abcd", b"\0" * 64],
)
def test_extra_fields_broken_or_whole_are_refused(extra: bytes, tmp_path: Path) -> None:
    for size in (None, 0xFFFFFFFF):
        refuse(with_central_extra(SMALL, 1, extra, size), tmp_path)


def test_zip64_end_record_is_refused_though_it_tells_the_truth(tmp_path: Path) -> None:
    end = SMALL.rindex(END_SIGNATURE)
    _, _, count, _, size, offset = struct.unpack_from("<HHHHII", SMALL, end + 4)
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    for tell in ((count, count, size, offset), (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)):
        changed = bytearray(SMALL[:end] + record + locator + SMALL[end:])
        struct.pack_into("<HHII", changed, end + len(record + locator) + 8, *tell)
        refuse(seal(bytes(changed)), tmp_path)


@pytest.mark.parametrize("offset", [1, len(SMALL) - 10, len(SMALL) + 5, 0x7FFFFFFF, 0xFFFFFFFE])
def test_member_that_lies_elsewhere_is_refused(offset: int, tmp_path: Path) -> None:
    for member in (0, 1, 4):
        refuse(patched(SMALL, central(SMALL, member) + 42, "<I", offset), tmp_path)


def test_two_names_for_the_same_bytes_are_refused(tmp_path: Path) -> None:
    (first,) = struct.unpack_from("<I", SMALL, central(SMALL, 1) + 42)
    refuse(patched(SMALL, central(SMALL, 2) + 42, "<I", first), tmp_path)


@pytest.mark.parametrize("field", [(8, 0), (10, 0), (10, 60000), (12, 1), (12, 0xFFFFFFFF), (16, 0), (16, 0xFFFFFFF0)])
def test_end_record_that_is_wrong_is_refused(field: tuple[int, int], tmp_path: Path) -> None:
    at, value = field
    refuse(patched(SMALL, SMALL.rindex(END_SIGNATURE) + at, "<H" if at < 12 else "<I", value), tmp_path)


def test_checksum_of_a_member_is_held(tmp_path: Path) -> None:
    wrong = zlib.crc32(FILES["fusion.bin"]) ^ 1
    refuse(patched(SMALL, central(SMALL, 1) + 16, "<I", wrong), tmp_path)


def test_newer_schema_says_to_upgrade(tmp_path: Path) -> None:
    for schema in (2, 99):
        message = refuse(write_bundle({**MANIFEST, "schema": schema}, FILES), tmp_path)
        assert f"schema {schema}" in message
        assert "pip install --upgrade edgemm" in message


@pytest.mark.parametrize("schema", [0, -1, "1", None, [], {}, 1.5, float("nan"), True, 1.0, "x" * 10_000, ...])
def test_schema_that_never_was_is_refused_without_such_advice(schema: Any, tmp_path: Path) -> None:
    content = write_archive([("manifest.json", head(schema=schema)), *sorted(FILES.items())])
    assert "upgrade" not in refuse(content, tmp_path)


def test_newer_schema_is_said_before_keys_are_judged(tmp_path: Path) -> None:
    content = write_archive([("manifest.json", b'{"schema": 2, "parts": []}'), *sorted(FILES.items())])
    assert "upgrade" in refuse(content, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"{",
            b"not JSON",
            b"\xff\xfe\x00",
            b"null",
            b"[]",
            b"1",
            b'"schema"',
            b"{}",
            b'{"schema"}',
            b"\0" * 100,
        ),
        *(b'{"schema":1}' * 2, b'{"schema":' + b"1" * 5000 + b"}", b'{"schema":1}'),
    ],
)
def test_manifest_that_is_not_what_it_must_be_is_refused(text: bytes, tmp_path: Path) -> None:
    assert "manifest.json" in refuse(write_archive([("manifest.json", text), *sorted(FILES.items())]), tmp_path)


@pytest.mark.parametrize("opening", [b"[", b'{"schema":', b'{"schema":1,"program":', b'{"schema":1,"files":{"a":'])
def test_manifest_nested_beyond_the_stack_is_refused(opening: bytes, tmp_path: Path) -> None:
    closing = b"]" * DEEP + (b"}" * opening.count(b"{") if b"{" in opening else b"")
    text = opening + b"[" * DEEP + closing
    assert "manifest.json" in refuse(write_archive([("manifest.json", text), *sorted(FILES.items())]), tmp_path)


def test_missing_manifest_is_refused(tmp_path: Path) -> None:
    assert "manifest.json" in refuse(write_archive(sorted(FILES.items())), tmp_path)
    assert "manifest.json" in refuse(write_archive([]), tmp_path)
    assert "manifest.json" in refuse(write_archive([("Manifest.json", head()), *sorted(FILES.items())]), tmp_path)


@pytest.mark.parametrize("key", ["model", "target", "program", "certificate", "provenance", "files"])
@pytest.mark.parametrize("value", [..., None, 5, [], "text"])
def test_manifest_key_absent_or_of_another_type_is_named(key: str, value: Any, tmp_path: Path) -> None:
    if value == "text" and key in ("model", "target"):
        value = {}
    assert key in refuse(write_archive([("manifest.json", head(**{key: value})), *sorted(FILES.items())]), tmp_path)


def test_manifest_key_that_nobody_knows_is_named(tmp_path: Path) -> None:
    assert "run_as_root" in refuse(write_bundle({**MANIFEST, "run_as_root": True}, FILES), tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "text",
        7,
        {},
        {"sha256": "0" * 64},
        {"sha256": None, "size_bytes": 256},
        {"sha256": [], "size_bytes": []},
    ]
    + [{**listed(FILES)["fusion.bin"], "size_bytes": n} for n in (0, 255, -256, 1 << 70)]
    + [{**listed(FILES)["fusion.bin"], "run": "sh"}],
)
def test_manifest_entry_that_is_not_the_file_is_refused(entry: Any, tmp_path: Path) -> None:
    changed = {**listed(FILES), "fusion.bin": entry}
    message = refuse(write_archive([("manifest.json", head(files=changed)), *sorted(FILES.items())]), tmp_path)
    assert "fusion.bin" in message


def head_of(files: dict[str, bytes]) -> tuple[str, bytes]:
    return "manifest.json", head(files)


def test_listed_file_that_is_absent_is_named(tmp_path: Path) -> None:
    present = {n: b for n, b in FILES.items() if n != "tokenizer.json"}
    assert "'tokenizer.json'" in refuse(write_archive([head_of(FILES), *sorted(present.items())]), tmp_path)


def test_file_that_is_not_listed_is_named(tmp_path: Path) -> None:
    assert "'payload.so'" in refuse(
        write_archive([head_of(FILES), *sorted([*FILES.items(), ("payload.so", b"x")])]), tmp_path
    )


def test_a_hundred_thousand_listed_files_make_no_endless_error(tmp_path: Path) -> None:
    many = dict.fromkeys((f"f{i:06}" for i in range(100_000)), b"")
    refuse(write_archive([head_of(many), *sorted(FILES.items())]), tmp_path)


def test_swapped_contents_are_found(tmp_path: Path) -> None:
    swapped = {**FILES, "fusion.xml": FILES["tokenizer.json"], "tokenizer.json": FILES["fusion.xml"]}
    assert "fusion.xml" in refuse(write_archive([head_of(FILES), *sorted(swapped.items())]), tmp_path)


def test_file_of_another_bundle_is_found(tmp_path: Path) -> None:
    other = {**FILES, "fusion.bin": bytes(256)}
    assert "fusion.bin" in refuse(write_archive([head_of(FILES), *sorted(other.items())]), tmp_path)


AUDIT = """
import os, sys
from pathlib import Path
from edgemm.errors import InputError
from edgemm.runtime.bundle import read_bundle

def hook(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.truncate", "subprocess.Popen"):
        print(event, args)

sys.addaudithook(hook)
for name in sys.argv[1:]:
    try:
        print("read", len(read_bundle(Path(name)).files))
    except InputError:
        print("refused")
"""


def test_reading_writes_nothing_anywhere(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.edgemm", tmp_path / "bad.edgemm"
    good.write_bytes(SMALL)
    bad.write_bytes(write_archive([head_of({"../x": b"x"}), ("../x", b"x")]))
    command = [sys.executable, "-B", "-c", AUDIT, str(good), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"read {len(FILES)}\nrefused\n"


def survive(content: bytes, folder: Path) -> None:
    """Read `content`: either it is refused properly, or it is whole by its own seal and manifest."""
    path = folder / "m.edgemm"
    path.write_bytes(content)
    try:
        read = read_bundle(path)
    except InputError as e:
        assert e.exit_code == 2
        assert str(path) in str(e)
        assert "\n  fix: " in str(e)
    else:
        assert listed(dict(read.files)) == read.manifest["files"]
        assert all(archive.MEMBER.fullmatch(name) for name in read.files)
    assert [p.name for p in folder.iterdir()] == ["m.edgemm"]


@bounded
@given(edits=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.binary(max_size=12)), min_size=1, max_size=4))
def test_random_mutation_is_refused(edits: list[tuple[int, bytes]], folder: Path) -> None:
    changed = SMALL
    for at, piece in edits:
        changed = changed[:at] + piece + changed[at + len(piece) :]
    if changed != SMALL:
        refuse(changed, folder)


@settings(bounded, max_examples=1000)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SMALL) - 1), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=4
    )
)
@example(edits=[(central(SMALL, 1) + 8, b"\1\0", 2)])
@example(edits=[(central(SMALL, 2) + 42, b"\xff\xff\xff\x7f", 4)])
def test_random_mutation_sealed_again_breaks_nothing(edits: list[tuple[int, bytes, int]], folder: Path) -> None:
    changed = SMALL
    for at, piece, removed in edits:
        changed = changed[:at] + piece + changed[at + removed :]
    survive(seal(changed[: -HEX_DIGITS - len(COMMENT)] + COMMENT + b"0" * HEX_DIGITS), folder)


@settings(bounded, max_examples=600)
@given(
    position=st.integers(0, len(SMALL) - SMALL.index(CENTRAL_SIGNATURE) - HEX_DIGITS - len(COMMENT) - 1),
    piece=st.binary(min_size=1, max_size=8),
)
def test_random_mutation_of_the_directory_sealed_again_breaks_nothing(
    position: int, piece: bytes, folder: Path
) -> None:
    at = SMALL.index(CENTRAL_SIGNATURE) + position
    changed = SMALL[:at] + piece + SMALL[at + len(piece) :]
    survive(seal(changed[: len(SMALL)]), folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@bounded
@given(changes=st.dictionaries(st.sampled_from(["schema", *MANIFEST, "files", "extra"]), json_values, max_size=3))
def test_random_manifest_sealed_breaks_nothing(changes: dict[str, Any], folder: Path) -> None:
    values = {"schema": 1, **MANIFEST, "files": listed(FILES), **changes}
    survive(write_archive([("manifest.json", json.dumps(values).encode()), *sorted(FILES.items())]), folder)


@bounded
@given(members=st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=8)), max_size=5))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_random_members_sealed_break_nothing(members: list[tuple[str, bytes]], folder: Path) -> None:
    encodable = [(n.encode("utf-8", "replace").decode(), b) for n, b in members]
    survive(write_archive([head_of(dict(encodable)), *encodable]), folder)
