"""The compile cache: what is found in it, and that nothing is taken from it that this user did not put there whole."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import openvino
import pytest

from edgemm import load_bundle
from edgemm.runtime import cache
from edgemm.runtime import openvino as runtime
from tests.graphs import two_encoders

TEXT = "is it red ?"
COMPONENT = "text_encoder"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "m.edgemm"
    path.write_bytes(two_encoders("openvino", joined=False))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a graph was compiled or imported."""
    counted: Counter[str] = Counter()
    core = openvino.Core

    class Core(core):  # type: ignore[valid-type,misc]
        def compile_model(self, *args: Any, **kwargs: Any) -> Any:
            counted["compiled"] += 1
            return super().compile_model(*args, **kwargs)

        def import_model(self, *args: Any, **kwargs: Any) -> Any:
            counted["imported"] += 1
            return super().import_model(*args, **kwargs)

    monkeypatch.setattr(openvino, "Core", Core)
    return counted


def embed(bundle: Path) -> list[float]:
    return load_bundle(bundle).run(text=TEXT).outputs["text_embeds"].tolist()


def entry(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_the_second_process_imports_what_the_first_compiled(bundle: Path, folder: Path, calls: Counter[str]) -> None:
    first = embed(bundle)
    assert calls == {"compiled": 1}
    assert embed(bundle) == first
    assert calls == {"compiled": 1, "imported": 1}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert entry(folder).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("what", ["version", "device", "flags", "capabilities"])
def test_another_library_or_device_finds_nothing(
    what: str, bundle: Path, folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(bundle)
    device = runtime._device(openvino.Core())
    if what == "version":
        monkeypatch.setattr(openvino, "get_version", lambda: "2099.1")
    else:
        at = ("device", "capabilities", "flags").index(what)
        monkeypatch.setattr(runtime, "_device", lambda core: (*device[:at], device[at] + "x", *device[at + 1 :]))
    embed(bundle)
    assert calls == {"compiled": 2}
    assert len(list(folder.iterdir())) == 2


def test_other_settings_and_weights_find_nothing(folder: Path, tmp_path: Path, calls: Counter[str]) -> None:
    for i, gain in enumerate((1.0, 2.0)):
        path = tmp_path / f"{i}.edgemm"
        path.write_bytes(two_encoders("openvino", joined=False, gain=gain))
        embed(path)
    assert calls == {"compiled": 2}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: b"",
        lambda c: c[:20],
        lambda c: c[:-1],
        lambda c: c + b"x",
        lambda c: c[:100] + bytes([c[100] ^ 1]) + c[101:],
        lambda c: bytes([c[0] ^ 1]) + c[1:],
    ],
)
def test_an_entry_that_is_not_whole_never_reaches_the_engine(
    spoil: Any, bundle: Path, folder: Path, calls: Counter[str]
) -> None:
    first = embed(bundle)
    entry(folder).write_bytes(spoil(entry(folder).read_bytes()))
    assert embed(bundle) == first
    assert calls == {"compiled": 2}
    assert embed(bundle) == first
    assert calls == {"compiled": 2, "imported": 1}


def test_what_the_engine_refuses_is_compiled_again(bundle: Path, folder: Path, calls: Counter[str]) -> None:
    first = embed(bundle)
    key = entry(folder).name
    cache.keep(key, b"no compiled graph")
    assert embed(bundle) == first
    assert calls == {"compiled": 2, "imported": 1}


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_directory_that_others_may_write_to_is_not_used(
    mode: int, bundle: Path, folder: Path, calls: Counter[str]
) -> None:
    embed(bundle)
    folder.chmod(mode)
    embed(bundle)
    assert calls == {"compiled": 2}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_the_directory_of_another_user_is_not_used(bundle: Path, folder: Path, calls: Counter[str]) -> None:
    embed(bundle)
    os.chown(folder, 12345, 12345)
    embed(bundle)
    assert calls == {"compiled": 2}


def test_links_are_not_followed(bundle: Path, folder: Path, tmp_path: Path, calls: Counter[str]) -> None:
    embed(bundle)
    key = entry(folder).name
    shutil.move(entry(folder), tmp_path / "elsewhere")
    (folder / key).symlink_to(tmp_path / "elsewhere")
    embed(bundle)
    assert calls == {"compiled": 2}
    shutil.move(folder, tmp_path / "real")
    folder.symlink_to(tmp_path / "real")
    embed(bundle)
    assert calls == {"compiled": 3}


def test_nowhere_to_keep_it_is_no_failure(
    bundle: Path, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for where in ("", str(tmp_path / "file" / "below"), str(tmp_path / ("x" * 5000))):
        monkeypatch.setenv("EDGEMM_CACHE", where)
        embed(bundle)
    assert calls == {"compiled": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_nothing_half(
    bundle: Path, folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    embed(bundle)
    assert list(folder.iterdir()) == []


def test_what_was_used_longest_ago_makes_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST", 1000)
    keys = [cache.key_of(i) for i in range(4)]
    for i, key in enumerate(keys[:3]):
        cache.keep(key, bytes(250))
        os.utime(folder / key, ns=(i, i))
    assert cache.kept(keys[0], len, ValueError) == 250  # it is the newest now
    cache.keep(keys[3], bytes(300))
    assert {p.name for p in folder.iterdir()} == {keys[0], keys[2], keys[3]}
    cache.keep("larger", bytes(1001))
    assert not (folder / "larger").exists()


def test_tools_keep_nothing(bundle: Path, folder: Path, tmp_path: Path) -> None:
    """A model that is measured, or one of many that are tried, is no bundle."""
    from edgemm.runtime.bundle import read_bundle
    from edgemm.runtime.session import Session

    read = read_bundle(bundle)
    Session(read.files, read.manifest["program"], "tool").run(text=TEXT)
    assert not folder.exists()
