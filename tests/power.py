"""Kill `install` and `rollback` at each change that they make to the disk, and see that the device still boots.

    python tests/power.py FOLDER    FOLDER has v1.edgemm, v2.edgemm, v3.edgemm, signed, and key.pub

A process is stopped before its n-th change (open for writing, write, fsync, mkdir, symlink, rename, unlink, rmdir), for
n from 1 until it ends by itself; a write is stopped half way. Opened and renamed files are found by Python's audit
events, whoever opened them; nothing but edgemm/runtime/disk.py writes. These disks are looked at then:

    kill   what a `kill -9` leaves
    cut    what is left when nothing is on the disk but what an fsync of the file, and of its directory, brought there
    torn   names as the process saw them, and of contents only what was synced: a file system with a journal of names
    NAME   like cut, and of the changes to ROOT's names since its last fsync this one alone, before the others

On each: what is current is whole, signed, answers its golden inputs and is one of the two versions; the same command
then succeeds; and an older version is refused. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemm.errors import EdgemmError, InputError
from edgemm.runtime import onnxruntime  # noqa: F401  imported before the forks
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.install import NAME, install, rollback, self_test

KILLED = 9
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
Action = Callable[[Path], object]


class Disk:
    """What of a directory has been brought to the disk: contents and names, by inode."""

    def __init__(self, root: Path) -> None:
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[str, int | str]]] = {}
        self.held: list[int] = []
        self.top = root.parent.stat().st_ino  # the root's own name was there before
        for folder in (root.parent, *(p for p in (root, *root.rglob("*")) if p.is_dir() and not p.is_symlink())):
            self.names[folder.stat().st_ino] = listing(folder)
        for file in root.rglob("*"):
            if file.is_file() and not file.is_symlink():
                self.contents[file.stat().st_ino] = file.read_bytes()

    def sync(self, handle: int) -> None:
        info = os.fstat(handle)
        if stat.S_ISDIR(info.st_mode):
            self.names[info.st_ino] = listing(Path(f"/proc/self/fd/{handle}"))
        else:
            self.contents[info.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def hold(self, path: Any, folder: int) -> None:
        """Keep the inode of what is about to go, so that no new file gets its number."""
        try:
            self.held.append(os.open(path, os.O_PATH | os.O_NOFOLLOW, dir_fd=None if folder == -1 else folder))
        except FileNotFoundError:
            return

    def cut(self, inode: int, out: Path) -> None:
        """Lay out what a power cut leaves of a directory."""
        out.mkdir(parents=True, exist_ok=True)
        for name, (kind, what) in self.names.get(inode, {}).items():
            if kind == "link":
                (out / name).symlink_to(str(what))
            elif kind == "directory":
                self.cut(int(what), out / name)
            else:
                (out / name).write_bytes(self.contents.get(int(what), b""))

    def disordered(self, root: Path, out: Path) -> None:
        """A directory for each name in `root` that was changed and not synced."""
        inode = root.stat().st_ino
        synced, now = self.names.get(inode, {}), listing(root)
        for name in sorted(synced.keys() | now.keys()):
            if synced.get(name) != now.get(name):
                self.names[inode] = {k: v for k, v in synced.items() if k != name}
                if name in now:
                    self.names[inode][name] = now[name]
                self.cut(self.top, out / name)
        self.names[inode] = synced

    def torn(self, root: Path, out: Path) -> None:
        shutil.copytree(root, out, symlinks=True)
        for file in root.rglob("*"):
            if file.is_file() and not file.is_symlink():
                (out / file.relative_to(root)).write_bytes(self.contents.get(file.stat().st_ino, b""))


def listing(folder: Path) -> dict[str, tuple[str, int | str]]:
    found: dict[str, tuple[str, int | str]] = {}
    for entry in os.scandir(folder):
        if entry.is_symlink():
            found[entry.name] = "link", str(Path(entry.path).readlink())
        else:
            found[entry.name] = "directory" if entry.is_dir() else "file", entry.inode()
    return found


def die_at(n: int, root: Path, disks: Path) -> Callable[[], object]:
    """From here on, stop this process at its n-th change under `root`, and lay out the other disks in `disks`.

    What comes back lays out the disk that a power cut leaves after the last change.
    """
    disk, count = Disk(root), 0
    real_write, real_fsync = os.write, os.fsync
    watching = True

    def change(before: Callable[[], object] | None = None) -> None:
        nonlocal count, watching
        count += 1
        if count == n:
            watching = False
            if before:
                before()
            disk.cut(disk.top, disks / "cut")
            if root.exists():
                disk.torn(root, disks / "torn" / root.name)
                disk.disordered(root, disks)
            os._exit(KILLED)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal watching
        if not watching or not (event == "open" or event in CHANGES):
            return
        watching = False
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        inside = path.startswith(str(root)) or event in ("os.remove", "os.rmdir", "os.symlink")
        if inside and (event != "open" or arguments[2] & WRITES):
            change()
            if event in ("os.remove", "os.rmdir"):
                disk.hold(arguments[0], arguments[1])
            elif event == "os.rename":
                disk.hold(arguments[1], arguments[3])
        watching = True

    def write(handle: int, content: Any) -> int:
        change(lambda: real_write(handle, content[: len(content) // 2]))
        return real_write(handle, content)

    def fsync(handle: int) -> None:
        nonlocal watching
        change()
        real_fsync(handle)
        watching = False
        disk.sync(handle)
        watching = True

    os.write, os.fsync = write, fsync  # type: ignore[assignment]
    sys.addaudithook(hook)

    def end() -> None:
        nonlocal watching
        watching = False
        disk.cut(disk.top, disks / "end")

    return end


def in_a_child(action: Callable[[], object]) -> int:
    """Exit code of `action` in a process of its own; 1 and a traceback where it raised."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001  reported, and judged by the exit code
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def boots(root: Path, key: Path, versions: set[int]) -> None:
    current = read_bundle(root / "current" / NAME, key)
    assert current.version in versions, f"{current.version} is current, not one of {versions}"
    self_test(current, root)


def survives(root: Path, key: Path, older: list[Path], action: Action, before: set[int], after: set[int]) -> None:
    """`before`: versions that may be current now, none where nothing has to be; `after` the action, done again."""
    if before or (root / "current").is_symlink():
        boots(root, key, before or after)
    action(root)
    boots(root, key, after)
    current = read_bundle(root / "current" / NAME).sha256
    for bundle in older:
        if read_bundle(bundle).sha256 != current:
            refused(lambda bundle=bundle: install(bundle, root, key))


def refused(action: Callable[[], object]) -> None:
    try:
        action()
    except InputError as e:
        assert "has version" in str(e), e
    else:
        raise AssertionError("a version that was had already was taken")


def fingerprint(root: Path) -> str:
    """Of everything in a directory."""
    rows = [
        f"{p.relative_to(root)} {p.readlink() if p.is_symlink() else p.read_bytes().hex() if p.is_file() else ''}"
        for p in sorted(root.rglob("*"))
    ]
    return "\n".join(rows)


def enumerate_crashes(folder: Path) -> dict[str, Any]:
    """Every scenario -> its number of changes, of different disks, and of those that don't boot."""
    v1, v2, v3 = (folder / f"v{i}.edgemm" for i in (1, 2, 3))
    key = folder / "key.pub"
    read_bundle(v1, key)  # what that imports need not be imported in each child

    def put(*bundles: Path) -> Action:
        return lambda root: [install(b, root, key) for b in bundles]

    # name: (what was done before, what is killed, versions that may be current then, and after doing it again)
    scenarios: dict[str, tuple[Action, Action, set[int], set[int]]] = {
        "first": (lambda root: None, put(v2), set(), {2}),
        "update": (put(v1), put(v2), {1, 2}, {2}),
        "third": (put(v1, v2), put(v3), {2, 3}, {3}),
        "rollback": (put(v1, v2), lambda root: rollback(root, key), {1, 2}, {1, 2}),
        "forced back": (put(v1, v2), lambda root: install(v1, root, key, force=True), {1, 2}, {1}),
    }
    found = {}
    for name, (earlier, action, before, after) in scenarios.items():
        work = folder / name.replace(" ", "-")
        base = work / "base" / "root"
        base.parent.mkdir(parents=True)
        assert in_a_child(lambda base=base, earlier=earlier: earlier(base)) == 0
        seen: set[str] = set()
        bad: list[str] = []
        n = 0
        while True:
            n += 1
            disks = work / str(n)
            root = disks / "kill" / "root"
            shutil.copytree(base.parent, root.parent, symlinks=True)

            def killed(n: int = n, root: Path = root, disks: Path = disks, action: Action = action) -> None:
                end = die_at(n, root, disks)
                action(root)
                end()

            code = in_a_child(killed)
            if code == 0:
                if in_a_child(lambda disks=disks, after=after: boots(disks / "end" / "root", key, after)) != 0:
                    bad.append("a power cut after the end")
                break
            assert code == KILLED, f"{name}: change {n} ended with {code}"
            for left in sorted(disks.iterdir()):
                if (image := fingerprint(left)) not in seen:
                    seen.add(image)
                    check = (left / "root", key, [v1, v2], action, before, after)
                    if in_a_child(lambda check=check: survives(*check)) != 0:
                        bad.append(f"change {n}, {left.name}")
            shutil.rmtree(disks)
        found[name] = {"changes": n - 1, "disks": len(seen), "unbootable": bad}
    return found


if __name__ == "__main__":
    start = time.monotonic()
    try:
        result = enumerate_crashes(Path(sys.argv[1]))
    except EdgemmError as e:
        sys.exit(str(e))
    print(json.dumps({"seconds": round(time.monotonic() - start, 1), "scenarios": result}))  # noqa: T201
