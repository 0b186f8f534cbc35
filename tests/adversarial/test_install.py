"""What `install` and `rollback` refuse, and that a device boots whatever is done to it in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgemm.artifact import locked
from edgemm.cli import build_app
from edgemm.errors import InputError, ToolchainError, VerdictError
from edgemm.runtime import archive
from edgemm.runtime import install as module
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.install import NAME, install, rollback
from edgemm.runtime.session import load_bundle
from edgemm.runtime.signature import signature_of
from tests import devices
from tests.bundles import key_pair, signed, tiny_bundle

MEMORY = Path("/dev/shm")
Bundles = dict[int, Path]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def bundles(keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Versions 1, 2 and 3, signed."""
    folder = tmp_path_factory.mktemp("bundles")
    return {v: signed(folder / f"v{v}.edgemm", tiny_bundle(v, gain=v), keys[0]) for v in (1, 2, 3)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def current(root: Path) -> int:
    return read_bundle(root / "current" / NAME).version


def refuse(bundle: Path, root: Path, key: Path | None = None) -> str:
    """The message of an install that is refused and leaves the root as it was."""
    before = tree(root)
    with pytest.raises(InputError) as caught:
        install(bundle, root, key)
    assert tree(root) == before
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def test_what_is_installed_answers_as_the_file_does_and_has_its_digest(
    bundles: Bundles, keys: tuple[Path, Path], root: Path
) -> None:
    place = install(bundles[1], root, keys[1])
    assert place == root / "current" / NAME
    assert read_bundle(place, keys[1]) == read_bundle(bundles[1])
    assert (place / "check.npz~").stat().st_size < read_bundle(place).manifest["files"]["check.npz"]["size_bytes"]
    sessions = load_bundle(place, require_signature=keys[1]), load_bundle(bundles[1])
    unpacked, packed = (s.run(tensors={"x": np.ones(16, np.float32)}) for s in sessions)
    assert (unpacked.answer, unpacked.probability) == (packed.answer, packed.probability)
    assert json.loads((root / "state.json").read_text()) == {"schema": 1, "version": 1}


def test_a_second_install_goes_to_the_other_slot_and_rollback_comes_back_and_goes_forward(
    bundles: Bundles, root: Path
) -> None:
    for version in (1, 2, 3):
        install(bundles[version], root)
        assert current(root) == version
    assert {p.name for p in root.iterdir()} == {"a", "b", "current", "state.json", ".lock"}
    for version in (2, 3, 2):
        rollback(root)
        assert current(root) == version


@pytest.mark.parametrize("version", [1, 2])
def test_downgrade_and_replay_are_refused_unless_forced(version: int, bundles: Bundles, root: Path) -> None:
    for v in (1, 2, 3):
        install(bundles[v], root)
    assert f"has version {version}, and {root} had 3" in refuse(bundles[version], root)
    install(bundles[version], root, force=True)
    assert current(root) == version
    assert "had 3" in refuse(bundles[3], root), "the highest version is remembered"


def test_after_a_rollback_what_was_rolled_back_from_is_refused_as_well(bundles: Bundles, root: Path) -> None:
    install(bundles[1], root)
    install(bundles[2], root)
    rollback(root)
    assert "had 2" in refuse(bundles[2], root)
    install(bundles[3], root)
    assert current(root) == 3


def test_another_bundle_of_the_same_version_is_refused(bundles: Bundles, root: Path, tmp_path: Path) -> None:
    install(bundles[2], root)
    other = tmp_path / "other.edgemm"
    other.write_bytes(tiny_bundle(2, gain=7))
    assert "has version 2" in refuse(other, root)


def test_the_current_bundle_again_changes_nothing(bundles: Bundles, root: Path) -> None:
    install(bundles[1], root)
    install(bundles[2], root)
    before = tree(root)
    assert install(bundles[2], root) == root / "current" / NAME
    assert tree(root) == before


def test_without_a_right_signature_nothing_is_installed(
    bundles: Bundles, keys: tuple[Path, Path], root: Path, tmp_path: Path
) -> None:
    _, stranger = key_pair(tmp_path, "stranger")
    with pytest.raises(InputError, match="Key mismatch"):
        install(bundles[1], root, stranger)
    unsigned = tmp_path / "unsigned.edgemm"
    shutil.copyfile(bundles[1], unsigned)
    with pytest.raises(InputError, match="cannot read signature"):
        install(unsigned, root, keys[1])
    assert not root.exists()
    install(unsigned, root)
    with pytest.raises(InputError, match="cannot read signature"):
        load_bundle(root / "current" / NAME, require_signature=keys[1])


def test_a_bundle_that_answers_otherwise_here_is_not_switched_to(bundles: Bundles, root: Path, tmp_path: Path) -> None:
    install(bundles[1], root)
    labels = np.array(["circle", "square", "star"])
    for expected in (np.full((1, 3), 9, np.float32), np.full((1, 3), np.nan, np.float32), np.zeros((2, 3))):
        bad = tmp_path / "bad.edgemm"
        rows = {f"{i}.logits": expected for i in range(2)} | {f"{i}.labels": labels for i in range(2)}
        bad.write_bytes(tiny_bundle(2, expected=rows))
        before = tree(root)
        with pytest.raises(VerdictError, match="answers otherwise here"):
            install(bad, root)
        assert tree(root) == before
    lacking = tmp_path / "lacking.edgemm"
    lacking.write_bytes(tiny_bundle(2, expected={"0.logits": np.zeros((1, 3), np.float32)}))
    refuse(lacking, root)


def test_a_bundle_whose_engines_are_built_on_the_device_is_not_for_install(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"built on the device[\s\S]*device_runner.py"):
        install(devices.bundle(tmp_path), root)
    assert not (root / "current").exists()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["encoder.onnx", "manifest.json", "golden/expected.npz"])
def test_a_slot_that_was_changed_is_found_when_it_is_read(name: str, bundles: Bundles, root: Path) -> None:
    install(bundles[1], root)
    install(bundles[2], root)
    damage(root / "a" / NAME / name)
    with pytest.raises(InputError):
        rollback(root)
    assert current(root) == 2
    damage(root / "b" / NAME / name)
    with pytest.raises(InputError):
        load_bundle(root / "current" / NAME)
    with pytest.raises(InputError, match="had 2"):
        install(bundles[1], root)
    install(bundles[3], root)
    assert current(root) == 3


def test_a_deflated_file_is_kept_as_it_is_in_the_archive(
    bundles: Bundles, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with another zlib would deflate it to other bytes, of another digest than what was signed."""
    place = install(bundles[1], root)
    monkeypatch.setattr(archive.zlib, "compressobj", None)
    assert read_bundle(place).sha256 == read_bundle(bundles[1]).sha256
    (place / "check.npz").write_bytes(b"x")
    with pytest.raises(InputError, match="two files named"):
        read_bundle(place)
    (place / "check.npz").unlink()
    (place / "check.npz~").write_bytes(b"x")
    with pytest.raises(InputError, match=r"is not deflated|can't be inflated"):
        read_bundle(place)


def test_a_foreign_file_or_link_in_a_slot_is_found(bundles: Bundles, root: Path) -> None:
    place = install(bundles[1], root)
    (place / "payload.so").write_bytes(b"x")
    with pytest.raises(InputError, match="files differ from the manifest"):
        read_bundle(place)
    (place / "payload.so").unlink()
    (place / "encoder.onnx").rename(place / "golden" / "moved")
    (place / "encoder.onnx").symlink_to("golden/moved")
    with pytest.raises(InputError, match="cannot read file"):
        read_bundle(place)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 2, "version": 1}', '{"schema": 1, "version": 0}', "9" * 5000]
)
def test_a_state_that_cannot_be_read_is_no_way_around_it(text: str, bundles: Bundles, root: Path) -> None:
    install(bundles[1], root)
    (root / "state.json").write_text(text)
    assert "state.json" in refuse(bundles[2], root)
    install(bundles[2], root, force=True)
    assert json.loads((root / "state.json").read_text()) == {"schema": 1, "version": 2}


@pytest.mark.parametrize("target", ["..", "/etc", "c", "a/", ""])
def test_a_link_that_leads_elsewhere_is_refused(target: str, bundles: Bundles, root: Path) -> None:
    install(bundles[1], root)
    (root / "current").unlink()
    if target:
        (root / "current").symlink_to(target)
    else:
        (root / "current").mkdir()
    for action in (lambda: install(bundles[2], root), lambda: rollback(root)):
        if target == "a/":  # the same place, as any program would say it
            action()
        else:
            with pytest.raises(InputError, match="choose another --root"):
                action()


def test_nothing_to_roll_back_to(bundles: Bundles, root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing installed"):
        rollback(root)
    assert not root.exists()
    root.mkdir()
    with pytest.raises(InputError, match="nothing installed"):
        rollback(root)
    install(bundles[1], root)
    with pytest.raises(InputError, match="no earlier bundle"):
        rollback(root)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="nothing installed"):
        rollback(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write"):
        install(bundles[1], tmp_path / "file")


def test_two_at_once_do_not_meet(bundles: Bundles, root: Path) -> None:
    install(bundles[1], root)
    with locked(root), pytest.raises(InputError, match="another edgemm"):
        install(bundles[2], root)
    assert current(root) == 1


def test_a_full_disk_is_named_and_the_old_bundle_stays(
    bundles: Bundles, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(bundles[1], root)
    before = tree(root)

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:1])
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(module, "write_durable", full)
    with pytest.raises(InputError, match=r"No space left[\s\S]*free some space"):
        install(bundles[2], root)
    assert tree(root) == before


def test_leftovers_of_a_cut_install_do_not_disturb(bundles: Bundles, root: Path) -> None:
    install(bundles[1], root)
    (root / ".new" / NAME).mkdir(parents=True)
    (root / ".new" / NAME / "half").write_bytes(b"x")
    (root / ".new-current").symlink_to("b")
    (root / ".new-state.json").write_text("{")
    (root / "b").mkdir()
    with pytest.raises(InputError, match="no earlier bundle"):
        rollback(root)
    install(bundles[2], root)
    assert current(root) == 2
    assert {p.name for p in root.iterdir()} == {"a", "b", "current", "state.json", ".lock"}


def test_from_the_command_line(bundles: Bundles, keys: tuple[Path, Path], root: Path) -> None:
    def call(*arguments: Any) -> tuple[int, str]:
        done = CliRunner().invoke(build_app(), [str(a) for a in arguments])
        return done.exit_code, done.stdout.strip() + done.stderr

    trusted = ("--require-signature", keys[1])
    assert call("install", bundles[1], "--root", root, *trusted) == (0, f"{root}/current/{NAME}")
    assert call("install", bundles[2], "--root", root, *trusted)[0] == 0
    assert call("install", bundles[1], "--root", root, *trusted)[0] == 2
    assert call("rollback", "--root", root, *trusted) == (0, f"{root}/current/{NAME}")
    assert current(root) == 1
    assert call("install", bundles[1].with_name("none.edgemm"), "--root", root)[0] == 2
    code, shown = call("inspect", root / "current" / NAME)
    assert code == 0 and "logits" in shown
    signature_of(root / "a" / NAME).unlink()
    assert call("rollback", "--root", root)[0] == 0
    code, shown = call("rollback", "--root", root, *trusted)
    assert code == 2 and "cannot read signature" in shown


def test_power_cut_at_every_change_leaves_a_root_that_boots(bundles: Bundles, keys: tuple[Path, Path]) -> None:
    """The whole enumeration; tests/power.py says what is done."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        for bundle in bundles.values():
            shutil.copyfile(bundle, Path(folder, bundle.name))
            shutil.copyfile(signature_of(bundle), signature_of(Path(folder, bundle.name)))
        shutil.copyfile(keys[1], Path(folder, "key.pub"))
        script = Path(__file__).parents[1] / "power.py"
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(script.parents[1])}
        command = [sys.executable, str(script), folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    scenarios = json.loads(done.stdout)["scenarios"]
    assert [s["unbootable"] for s in scenarios.values()] == [[]] * 5, done.stderr
    assert scenarios["update"]["changes"] > 40, "every change was met"
