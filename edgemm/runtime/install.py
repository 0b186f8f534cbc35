"""A device's bundle in two slots: a new one is proven in place before it becomes the current one, in one step.

    ROOT/current -> a                          what the device runs: ROOT/current/model.edgemm
    ROOT/a/  ROOT/b/                           each a slot: model.edgemm/ (unpacked) and model.edgemm.sig
    ROOT/state.json                            {"schema": 1, "version": N}: the highest version that was ever current

Whatever is written lies on the disk (fsync of file and directory) before a name is given to it that something
relies on: a power cut at any moment leaves the old bundle current or the new one, whole. The other slot is
overwritten only when the new bundle has passed, so there are three copies for a moment.

A version counts as had when it was current. It is recorded at the latest before the link moves away from it, so
`max(state.json, current)` forgets none, wherever the power went; a crash before the link moves costs no version.
Who can write to ROOT can undo all this: keep ROOT to one user.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgemm.artifact import canonical, locked, writing
from edgemm.errors import InputError, ToolchainError, VerdictError
from edgemm.plugins import validate
from edgemm.recipe import Version
from edgemm.runtime.archive import UNPACKED
from edgemm.runtime.bundle import Bundle, read_bundle
from edgemm.runtime.disk import read_regular, sync_directory, write_durable
from edgemm.runtime.golden import TOLERANCE, golden_error
from edgemm.runtime.session import Session
from edgemm.runtime.signature import MAX_SIGNATURE, signature_of
from edgemm.yaml_files import Strict

SLOTS = ("a", "b")
NAME = "model.edgemm"
STAGED, LINK, NEW_STATE = ".new", ".new-current", ".new-state.json"
MAX_STATE = 1 << 10
REWRITE = "edgemm install BUNDLE --root DIR --force writes it anew, and goes by what is current alone"


class State(Strict):
    """state.json."""

    schema_: Literal[1] = Field(1, alias="schema")
    version: Version


def install(bundle: Path, root: Path, require_signature: Path | None = None, *, force: bool = False) -> Path:
    """Check a bundle, unpack it beside the current one, test it there, make it current -> its path.

    require_signature  see signature.py
    force  take a version that is not higher than every one that was current, and a state.json that can't be read
    Installing what is current already changes nothing. Raises InputError for a bundle or root that is not to be
    used, ToolchainError when this machine can't run it, VerdictError when its golden outputs differ here.
    """
    checked = read_bundle(bundle, require_signature)
    with locked(root), writing(root):
        sync_directory(root.resolve().parent)
        slot, current = _slot(root), _current(root)
        highest = max(_recorded(root, force), current.version if current else 0)
        is_current = current is not None and current.sha256 == checked.sha256
        if is_current and _signature(bundle) == _signature(root / "current" / NAME) and not force:
            _record(root, highest)
            return root / "current" / NAME
        if checked.version <= highest and not force:
            raise InputError(
                f"{bundle} has version {checked.version}, and {root} had {highest}",
                fix="compress with a higher --set version=N; --force goes back",
            )
        other = _other(slot)
        try:
            _remove(root / STAGED)
            _unpack(checked, _signature(bundle), root / STAGED)
            self_test(read_bundle(root / STAGED / NAME, require_signature), bundle)
            _record(root, highest)
            _remove(root / other)
            (root / STAGED).rename(root / other)
            sync_directory(root)
        finally:
            _remove(root / STAGED)
        _switch(root, other)
        _record(root, max(highest, checked.version))
    return root / "current" / NAME


def rollback(root: Path, require_signature: Path | None = None) -> Path:
    """Make the other slot current, if what lies there is whole and works here; a second time goes forward again.

    The highest version stays recorded: an `install` of anything up to it is still refused.
    """
    if not root.is_dir():
        raise InputError(f"there is nothing installed in {root}", fix="edgemm install BUNDLE --root DIR")
    with locked(root), writing(root):
        slot, current = _slot(root), _current(root)
        if slot is None:
            raise InputError(f"there is nothing installed in {root}", fix="edgemm install BUNDLE --root DIR")
        other = root / _other(slot) / NAME
        if not other.is_dir():
            raise InputError(f"{root} holds no earlier bundle", fix="edgemm install BUNDLE --root DIR --force")
        self_test(read_bundle(other, require_signature), other)
        _record(root, max(_recorded(root, force=False), current.version if current else 0))
        _switch(root, other.parent.name)
    return root / "current" / NAME


def self_test(bundle: Bundle, where: Path) -> None:
    """Run the golden inputs; VerdictError when the answers are not those of the machine that packed the bundle."""
    if "device/spec.json" in bundle.files:
        raise ToolchainError(
            f"the engines of {where} are built on the device, so there is none to install", fix="run device_runner.py"
        )
    session = Session(bundle.files, bundle.manifest["program"], str(where), sha256=bundle.sha256)
    error = golden_error(session, bundle.files, str(where))
    if error > TOLERANCE:
        raise VerdictError(
            f"{where} answers otherwise here than where it was made: by {error:.3g} of the outputs, over {TOLERANCE}",
            fix="edgemm doctor; compress for a target like this machine",
        )


def _slot(root: Path) -> str | None:
    """The current slot; None where nothing was installed yet."""
    try:
        target = str((root / "current").readlink())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise InputError(f"{root}/current is no link: {e.strerror}", fix="choose another --root") from e
    if target not in SLOTS:
        raise InputError(f"{root}/current leads to {target!r}, which is no slot", fix="choose another --root")
    return target


def _other(slot: str | None) -> str:
    return "b" if slot == "a" else "a"


def _current(root: Path) -> Bundle | None:
    """What is current; None where there is nothing, or nothing whole: then there is all the more to install."""
    try:
        return read_bundle(root / "current" / NAME)
    except InputError:
        return None


def _recorded(root: Path, force: bool) -> int:
    """The version in state.json; 0 where there is none, and with `force` where it can't be read."""
    state = root / "state.json"
    try:
        if not state.exists():
            return 0
        text = read_regular(state, MAX_STATE, "file", REWRITE)
        return validate(State, json.loads(text), str(state)).version
    except (InputError, ValueError, RecursionError) as e:
        if force:
            return 0
        raise InputError(f"{state} does not tell which version {root} had", fix=REWRITE) from e


def _record(root: Path, version: int) -> None:
    """Write state.json, unless it says so already or there is nothing to say."""
    if version in (0, _recorded(root, force=True)):
        return
    (root / NEW_STATE).unlink(missing_ok=True)
    write_durable(root / NEW_STATE, canonical({"schema": 1, "version": version}).encode())
    (root / NEW_STATE).replace(root / "state.json")
    sync_directory(root)


def _signature(bundle: Path) -> bytes | None:
    path = signature_of(bundle)
    return read_regular(path, MAX_SIGNATURE, "signature", "edgemm sign BUNDLE --key KEY") if path.exists() else None


def _unpack(bundle: Bundle, signature: bytes | None, slot: Path) -> None:
    """The files of a checked bundle and its signature, each down to the disk, and then every directory."""
    place = slot / NAME
    stored = {name: content for name, content in bundle.files.items() if name not in bundle.deflated}
    packed = {name + UNPACKED: data for name, data in bundle.deflated.items()}
    files = {"manifest.json": canonical(bundle.manifest).encode(), **stored, **packed}
    folders = sorted({folder for name in files for folder in (place / name).relative_to(slot).parents})
    for folder in folders:
        (slot / folder).mkdir()
    for name, content in files.items():
        write_durable(place / name, content)
    if signature is not None:
        write_durable(signature_of(place), signature)
    for folder in reversed(folders):
        sync_directory(slot / folder)


def _switch(root: Path, slot: str) -> None:
    """`current` leads to `slot` from one moment to the next."""
    (root / LINK).unlink(missing_ok=True)
    (root / LINK).symlink_to(slot)
    (root / LINK).replace(root / "current")
    sync_directory(root)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
        sync_directory(path.parent)
