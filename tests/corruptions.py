"""Bundles that no device may take: every way in which two signed ones can be broken, mixed, forged or replayed.

`Forger.make(i)` is the i-th, the same each time. A bundle that is broken behind its signature is signed anew with the
trusted key, as a careless or bribed signer would: what the reader refuses then, it refuses by itself.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemm.artifact import canonical
from edgemm.errors import EdgemmError
from edgemm.runtime.archive import COMMENT, HEX_DIGITS, write_archive
from edgemm.runtime.bundle import Bundle, read_bundle, write_bundle
from edgemm.runtime.install import NAME, install
from edgemm.runtime.signature import signature_of
from edgemm.stages.package import array_bytes
from tests.bundles import key_pair, signed, tiny_bundle

NAMES = (
    *("../x", "/etc/x", "a/../../x", "a//x", "./x", ".x", "a\\x", "C:x", "a/", "-x", "a b", "a\0b", "\u202ex", "~x"),
    *("x" * 201, "a/" * 100 + "x", "HEAD.onnx", "head.onnx/x", "golden", "con\nx", "manifest.json/x", "Manifest.json"),
)
Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Forgery:
    """`kind` says how it was made; a signature of None is left out."""

    kind: str
    bundle: bytes
    signature: bytes | None


def seal(body: bytes) -> bytes:
    """A file with the right digest at its end."""
    return body + hashlib.sha256(body).hexdigest().encode()


def members_of(bundle: Bundle) -> Members:
    return [("manifest.json", canonical(bundle.manifest).encode()), *sorted(bundle.files.items())]


class Forger:
    """`root` has version 2; version 3 would be taken; version 1 is signed and too old."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private, self.key = key_pair(folder)
        self.stranger, _ = key_pair(folder, "stranger")
        self.paths = {
            v: signed(folder / f"v{v}.edgemm", tiny_bundle(v, gain=1 + v / 10), self.private) for v in (1, 2, 3)
        }
        self.content = {v: path.read_bytes() for v, path in self.paths.items()}
        self.signature = {v: signature_of(path).read_bytes() for v, path in self.paths.items()}
        self.read = {v: read_bundle(path) for v, path in self.paths.items()}
        self.root = folder / "root"
        install(self.paths[2], self.root, self.key)
        self.forged = folder / "forged.edgemm"
        self.bombs = [make() for make in self._bombs()]
        self.kinds: list[Callable[[random.Random], Forgery]] = [
            self.flipped, self.flipped, self.flipped, self.cut, self.spliced, self.other_signature,
            self.flipped_signature, self.reordered, self.swapped, self.replayed, self.renamed, self.bomb,
            self.wrong_key, self.broken_manifest, self.broken_inside, self.lying_header,
        ]  # fmt: skip

    def make(self, i: int) -> Forgery:
        rng = random.Random(i)
        return self.kinds[i % len(self.kinds)](rng)

    def outcome(self, forgery: Forgery) -> str:
        """'refused', 'accepted', or the crash."""
        self.forged.write_bytes(forgery.bundle)
        signature = signature_of(self.forged)
        signature.unlink(missing_ok=True)
        if forgery.signature is not None:
            signature.write_bytes(forgery.signature)
        try:
            install(self.forged, self.root, self.key)
        except EdgemmError:
            return "refused"
        except Exception as e:  # noqa: BLE001  a crash is what is looked for
            return f"crash: {e!r}"
        return "accepted"

    def unharmed(self) -> bool:
        """Whether the root still holds version 2, and nothing lies beside it."""
        beside = {p.name for p in self.root.iterdir()} <= {"a", "current", "state.json", ".lock"}
        return beside and read_bundle(self.root / "current" / NAME, self.key).sha256 == self.read[2].sha256

    def by_the_key(self, kind: str, content: bytes) -> Forgery:
        """Signed with the trusted key."""
        return Forgery(kind, content, signature_of(signed(self.forged, content, self.private)).read_bytes())

    def maybe_signed(self, rng: random.Random, kind: str, content: bytes) -> Forgery:
        """Signed with the trusted key, or with the signature of the bundle that it was made of."""
        if rng.random() < 0.5:
            return self.by_the_key(f"{kind}, signed", content)
        return Forgery(kind, content, self.signature[rng.choice((2, 3))])

    def flipped(self, rng: random.Random) -> Forgery:
        changed = bytearray(self.content[3])
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.5:
            changed = bytearray(seal(bytes(changed[:-HEX_DIGITS])))
        if changed == self.content[3]:
            changed[0] ^= 1
        return Forgery("flipped bits", bytes(changed), self.signature[3])

    def cut(self, rng: random.Random) -> Forgery:
        content = self.content[3][: rng.randrange(len(self.content[3]))]
        if rng.random() < 0.3:
            content = seal(content)
        return self.maybe_signed(rng, "truncated", content)

    def spliced(self, rng: random.Random) -> Forgery:
        content, at = self.content[3], rng.randrange(len(self.content[3]))
        piece = rng.choice((rng.randbytes(rng.randrange(1, 64)), content[at : at + 100], bytes(64), content))
        made = content[:at] + piece + content[at + rng.choice((0, len(piece))) :]
        if made == content:
            made += b"\0"
        if rng.random() < 0.5:
            body = made[: -HEX_DIGITS - len(COMMENT)] + COMMENT
            made = seal(body) if seal(body) != content else made
        if made == content:
            made += b"\0"
        return self.maybe_signed(rng, "spliced", made)

    def other_signature(self, rng: random.Random) -> Forgery:
        old, size = self.signature[3], rng.randrange(len(self.signature[3]))
        signature = rng.choice(
            (None, b"", self.signature[2], self.signature[1], old[:size], rng.randbytes(200), b"[" * 5000, b"{}",
             b"null", old.replace(b"dsseEnvelope", b"messageSignature"), old.replace(b"publicKey", b"certificate"))
        )  # fmt: skip
        return Forgery("other signature", self.content[3], signature)

    def flipped_signature(self, rng: random.Random) -> Forgery:
        changed = bytearray(self.signature[3])
        while meaning(bytes(changed)) == meaning(self.signature[3]):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return Forgery("flipped signature", self.content[3], bytes(changed))

    def reordered(self, rng: random.Random) -> Forgery:
        members = members_of(self.read[3])
        while members == members_of(self.read[3]):
            rng.shuffle(members)
        return self.maybe_signed(rng, "reordered", write_archive(members))

    def swapped(self, rng: random.Random) -> Forgery:
        """Members of version 2 in version 3, the manifest left or made to fit."""
        ours, theirs = dict(members_of(self.read[3])), dict(members_of(self.read[2]))
        different = [name for name in ours if ours[name] != theirs[name]]
        chosen = rng.sample(different, rng.randrange(1, len(different)))
        mixed = ours | {name: theirs[name] for name in chosen}
        if "manifest.json" not in chosen and rng.random() < 0.5:
            content = write_bundle(self.read[3].manifest, {n: c for n, c in mixed.items() if n != "manifest.json"})
            return Forgery("swapped members, listed", content, self.signature[rng.choice((2, 3))])
        return self.maybe_signed(rng, "swapped members", write_archive(mixed.items()))

    def replayed(self, rng: random.Random) -> Forgery:
        """An old version as it was signed; or its number raised, under the signature that it had."""
        if rng.random() < 0.3:
            return Forgery("older version", self.content[1], self.signature[1])
        manifest = {**self.read[1].manifest, "version": rng.randrange(3, 100)}
        return Forgery("older version, renumbered", write_bundle(manifest, self.read[1].files), self.signature[1])

    def renamed(self, rng: random.Random) -> Forgery:
        """A listed file with a name that leads elsewhere, or that some file system takes for another."""
        name = rng.choice(NAMES)
        files = {**self.read[3].files, name: rng.randbytes(20)}
        manifest = {k: v for k, v in self.read[3].manifest.items() if k not in ("schema", "files")}
        return self.maybe_signed(rng, "path trick", write_bundle(manifest, files))

    def bomb(self, rng: random.Random) -> Forgery:
        return self.maybe_signed(rng, "bomb", rng.choice(self.bombs))

    def _bombs(self) -> list[Callable[[], bytes]]:
        def deflated() -> bytes:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in members_of(self.read[3]):
                    archive.writestr(name, content)
                archive.writestr("zeros.bin", bytes(1_000_000))
                archive.comment = COMMENT + b"0" * HEX_DIGITS
            return seal(buffer.getvalue()[:-HEX_DIGITS])

        def inside(name: str, content: bytes) -> Callable[[], bytes]:
            return lambda: self._with({name: content})

        compressed = io.BytesIO()
        np.savez_compressed(compressed, **{"0.logits": np.zeros(1_000_000, np.float32)})
        header = array_bytes(np.save, np.zeros(4, np.float32)).replace(b"(4,)", b"(4" + b"0" * 11 + b",)")
        listed = {f"f{i:05}": b"" for i in range(1000)}
        deep = write_archive(
            [("manifest.json", b'{"schema":1,"program":' + b"[" * 50_000), *self.read[3].files.items()]
        )
        return [
            deflated,
            inside("golden/expected.npz", compressed.getvalue()),
            inside("golden/expected.npz", array_bytes(np.savez, **{f"a{i}": np.zeros(0) for i in range(5000)})),
            inside("golden/0.x.npy", header),
            inside("golden/inputs.json", b"[" * 100_000),
            lambda: write_bundle({k: v for k, v in self.read[3].manifest.items() if k != "files"}, listed),
            lambda: deep,
        ]

    def _with(self, files: dict[str, bytes], **manifest: Any) -> bytes:
        kept = {k: v for k, v in self.read[3].manifest.items() if k not in ("schema", "files")}
        return write_bundle({**kept, **manifest}, {**self.read[3].files, **files})

    def wrong_key(self, rng: random.Random) -> Forgery:
        """Signed by a stranger, who perhaps says that he is not one."""
        signature = signature_of(signed(self.forged, self.content[3], self.stranger)).read_bytes()
        if rng.random() < 0.5:
            theirs, ours = json.loads(signature), json.loads(self.signature[3])
            theirs["verificationMaterial"] = ours["verificationMaterial"]
            signature = json.dumps(theirs).encode()
        return Forgery("wrong key", self.content[3], signature)

    def broken_manifest(self, rng: random.Random) -> Forgery:
        """A manifest that is none, signed."""
        manifest = dict(self.read[3].manifest)
        key = rng.choice(list(manifest))
        if rng.random() < 0.5 and key != "version":
            del manifest[key]
        else:
            typed = (None, -1, [], "\ud800", 1.5, "1", True) if key not in ("model", "target") else (None, 1, {"a": {}})
            manifest[key] = rng.choice(typed)
        head = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
        members: Members = [("manifest.json", head), *sorted(self.read[3].files.items())]
        return self.by_the_key("broken manifest, signed", write_archive(members))

    def broken_inside(self, rng: random.Random) -> Forgery:
        """A whole bundle of files that are not what they should be, signed."""
        names = [name for name in self.read[3].files if name not in ("bom.cdx.json", "check.npz")]  # unread here
        name = rng.choice(names)
        good = self.read[3].files[name]
        bad = rng.choice((b"", good[: len(good) // 2], rng.randbytes(len(good)), b"\0" * len(good)))
        if rng.random() < 0.3:
            program = json.loads(json.dumps(self.read[3].manifest["program"]))
            part = rng.choice(list(program))
            program[part] = rng.choice((None, [], {"a": 1}, "x", 7))
            return self.by_the_key(f"broken program, signed: {part}", self._with({}, program=program))
        return self.by_the_key(f"broken {name}, signed", self._with({name: bad}))

    def lying_header(self, rng: random.Random) -> Forgery:
        """Fields of the zip's own records changed, sealed again and signed."""
        changed = bytearray(self.content[3])
        places = [m for s in (b"PK\3\4", b"PK\1\2", b"PK\5\6") for m in found(self.content[3], s)]
        at = rng.choice(places) + rng.randrange(4, 22)
        changed[at] = (changed[at] + rng.randrange(1, 256)) % 256
        return self.by_the_key("lying header, signed", seal(bytes(changed[:-HEX_DIGITS])))


def found(content: bytes, piece: bytes) -> list[int]:
    places, at = [], content.find(piece)
    while at >= 0:
        places.append(at)
        at = content.find(piece, at + 1)
    return places


def meaning(signature: bytes) -> Any:
    """What a signature file says, however it is spelled: the last digit of base64 has bits that say nothing."""
    try:
        values = json.loads(signature)
        envelope = values["dsseEnvelope"]
        envelope["payload"] = base64.b64decode(envelope["payload"])
        for row in envelope["signatures"]:
            row["sig"] = base64.b64decode(row["sig"])
    except (ValueError, KeyError, TypeError):
        return None
    return values
