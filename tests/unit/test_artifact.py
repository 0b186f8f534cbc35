"""Artifacts: whole or absent, found again by their inputs, the same bytes everywhere; failing disks are named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgemm import artifact
from edgemm.artifact import Artifact, build, locked, sha256_file, write_atomic, writing
from edgemm.errors import EdgemmError, InputError, ToolchainError

FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
CONFIG = {"keep": 0.5, "layers": ["b", "a"]}
MEGABYTE = 1 << 20


class Maker:
    """A `make` that counts its calls."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = {"model.bin": b"weights", "sub/notes.json": b'{"a": 1}'} if files is None else files
        self.calls = 0

    def __call__(self, out: Path) -> None:
        self.calls += 1
        for name, content in self.files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)


def made(runs: Path, make: Callable[[Path], None], **changes: Any) -> Artifact:
    return build("graph", runs, **{"config": CONFIG, "make": make, **changes})


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_user_error(error: EdgemmError, place: Path) -> None:
    assert isinstance(error, InputError)
    assert error.exit_code == 2
    assert str(place) in str(error)
    assert "\n  fix: " in str(error)


def test_artifact_holds_what_make_wrote_and_a_manifest_of_it(tmp_path: Path) -> None:
    found = made(tmp_path / "deep" / "runs", Maker())
    assert (found.path / "model.bin").read_bytes() == b"weights"
    assert found.json("sub/notes.json") == {"a": 1}
    assert set(found.manifest.files) == {"model.bin", "sub/notes.json"}
    for name, file in found.manifest.files.items():
        assert (file.sha256, file.size_bytes) == (sha256_file(found.path / name), (found.path / name).stat().st_size)
    assert found.json("manifest.json") == json.loads(found.manifest.model_dump_json(by_alias=True))
    assert found.path.name.startswith("graph-")
    assert [p.name for p in (tmp_path / "deep" / "runs").iterdir()] == [found.path.name]


def test_same_inputs_are_made_once(tmp_path: Path) -> None:
    make = Maker()
    first, second = made(tmp_path, make), made(tmp_path, make)
    assert make.calls == 1
    assert second == first
    assert made(tmp_path, make, config=dict(reversed(CONFIG.items()))) == first
    assert make.calls == 1


def test_artifact_without_files_is_made_once(tmp_path: Path) -> None:
    make = Maker({})
    assert made(tmp_path, make) == made(tmp_path, make)
    assert make.calls == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "model.bin").write_bytes(b"WEIGHTS"),
        lambda path: (path / "model.bin").write_bytes(b""),
        lambda path: (path / "model.bin").unlink(),
        lambda path: shutil.rmtree(path / "sub"),
        lambda path: ((path / "model.bin").unlink(), (path / "model.bin").mkdir()),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_bytes(b""),
        lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-5]),
        lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"),
        lambda path: (path / "manifest.json").write_bytes(b"[" * 100_000),
        lambda path: edit_manifest(path, key="0" * 64),
        lambda path: edit_manifest(path, digest="0" * 64),
        lambda path: edit_manifest(path, schema=2),
        lambda path: edit_manifest(path, files={}),
        lambda path: edit_manifest(path, files={"a\0b": {"sha256": "", "size_bytes": 0}}),
        lambda path: consistent_forgery(path),
        lambda path: shutil.rmtree(path),
        lambda path: (shutil.rmtree(path), path.mkdir()),
    ],
)
def test_spoiled_artifact_is_made_again(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    make = Maker()
    first = made(tmp_path, make)
    before = tree(first.path)
    spoil(first.path)
    assert made(tmp_path, make) == first
    assert make.calls == 2
    assert tree(first.path) == before
    assert made(tmp_path, make) == first
    assert make.calls == 2


def edit_manifest(path: Path, **changes: Any) -> None:
    values = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps({**values, **changes}), encoding="utf-8")


def consistent_forgery(path: Path) -> None:
    """Other content, and its digest in the manifest: only the artifact's own digest tells."""
    (path / "model.bin").write_bytes(b"forged")
    files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    files["model.bin"] = {"sha256": sha256_file(path / "model.bin"), "size_bytes": 6}
    edit_manifest(path, files=files)


def test_other_config_kind_parent_or_version_is_another_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker()
    parent = build("source", tmp_path, config={}, make=Maker())
    other_parent = build("source", tmp_path, config={}, make=Maker({"x": b"y"}), tools=("pytest",))
    found = [
        made(tmp_path, make),
        made(tmp_path, make, config={**CONFIG, "keep": 0.25}),
        made(tmp_path, make, config={}),
        made(tmp_path, make, parents=[parent]),
        made(tmp_path, make, parents=[other_parent]),
        made(tmp_path, make, parents=[parent, other_parent]),
        made(tmp_path, make, parents=[other_parent, parent]),
        made(tmp_path, make, tools=("pytest",)),
        made(tmp_path, make, tools=("no-such-tool",)),
        build("quantized", tmp_path, config=CONFIG, make=make),
    ]
    monkeypatch.setattr(artifact.importlib.metadata, "version", lambda _name: "99.0")
    found.append(made(tmp_path, make, tools=("pytest",)))
    monkeypatch.setattr(artifact, "source_digest", lambda: "f" * 64)
    found.append(made(tmp_path, make))
    assert make.calls == len(found)
    assert len({a.path for a in found}) == len({a.digest for a in found}) == len(found)
    assert all(a.path.is_dir() for a in found)


def test_payload_is_in_the_digest_of_artifact_and_children(tmp_path: Path) -> None:
    """Two makers of the same key, on two machines: what differs in content differs in digest and in children."""
    one, two = (made(tmp_path / n, Maker({"model.bin": n.encode()})) for n in ("one", "two"))
    assert one.manifest.key == two.manifest.key
    assert one.digest != two.digest
    keys = {made(tmp_path, Maker(), parents=[parent]).manifest.key for parent in (one, two)}
    assert len(keys) == 2


def test_same_inputs_in_two_places_give_the_same_bytes(tmp_path: Path) -> None:
    here = made(tmp_path / "here", Maker(), parents=[build("source", tmp_path / "here", config={}, make=Maker())])
    there_source = build("source", tmp_path / "far" / "there", config={}, make=Maker())
    there = made(tmp_path / "far" / "there", Maker(), parents=[there_source])
    assert here.digest == there.digest
    assert tree(tmp_path / "here") == tree(tmp_path / "far" / "there")


class Interrupted(BaseException):
    """What KeyboardInterrupt is to a running stage."""


@pytest.mark.parametrize(
    "error", [ValueError("x"), InputError("x", fix="y"), ToolchainError("x", fix="y"), Interrupted()]
)
def test_failing_make_leaves_a_clean_place_and_can_be_repeated(error: BaseException, tmp_path: Path) -> None:
    finished = build("source", tmp_path, config={}, make=Maker())

    def fail(out: Path) -> None:
        Maker()(out)
        raise error

    with pytest.raises(type(error)) as caught:
        made(tmp_path, fail)
    assert caught.value is error
    assert [p.name for p in tmp_path.iterdir()] == [finished.path.name]
    make = Maker()
    made(tmp_path, make)
    assert make.calls == 1


def test_rest_of_a_killed_run_does_not_get_in(tmp_path: Path) -> None:
    whole = made(tmp_path, Maker())
    rest = tmp_path / f".tmp-{whole.path.name}"
    whole.path.rename(rest)
    (rest / "half.bin").write_bytes(b"half")
    make = Maker()
    again = made(tmp_path, make)
    assert (make.calls, again.digest) == (1, whole.digest)
    assert not rest.exists()
    assert not (again.path / "half.bin").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from edgemm import artifact

def make(out):
    (out / "model.bin").write_bytes(b"weights")
    if sys.argv[2] == "make":
        os.kill(os.getpid(), signal.SIGKILL)

def fsync(handle, real=os.fsync):
    real(handle)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "fsync":
    artifact.os.fsync = fsync
artifact.build("graph", Path(sys.argv[1]), config={}, make=make)
"""


@pytest.mark.parametrize("moment", ["make", "fsync"])
def test_kill_leaves_no_finished_name(moment: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], check=False)
    assert done.returncode == -9
    assert not list(tmp_path.glob("graph-*"))
    make = Maker({"model.bin": b"weights"})
    build("graph", tmp_path, config={}, make=make)
    assert make.calls == 1
    assert len(list(tmp_path.iterdir())) == 1


HOLDER = """
import sys
from pathlib import Path
from edgemm.artifact import locked
from edgemm.errors import InputError

try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except InputError as e:
    print(e, flush=True)
    sys.exit(e.exit_code)
"""


def test_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    runs = tmp_path / "out" / ".runs"
    command = [sys.executable, "-c", HOLDER, str(runs)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        assert second.returncode == 2, second.stderr
        assert str(runs) in second.stdout
        assert "\n  fix: " in second.stdout
        with pytest.raises(InputError, match="another edgemm"), locked(runs):
            pytest.fail("locked twice")
        first.kill()
    with locked(runs):
        pass
    assert subprocess.run(command, input="", capture_output=True, check=False).returncode == 0


def test_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), locked(tmp_path):
        raise ValueError("inside")
    with locked(tmp_path):
        pass


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "report.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert tree(tmp_path) == {"a/b/report.json": b"new"}


@pytest.mark.parametrize("number", [*FULL_DISK_ERRNOS, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR])
@pytest.mark.parametrize("call", ["fsync", "open", "replace"])
def test_failing_disk_leaves_the_old_content_and_is_named(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, b"old")

    def fail(*_given: object, **_named: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((artifact.os, "fsync") if call == "fsync" else (Path, call)), fail)
    with pytest.raises(InputError) as caught:
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert_user_error(caught.value, path)
    assert os.strerror(number) in str(caught.value)
    assert tree(tmp_path) == {"report.json": b"old"}


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL])
def test_our_own_mistake_is_not_taken_for_a_full_disk(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(artifact.os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_atomic(tmp_path / "x", b"new")
    assert caught.value.errno == number
    assert not list(tmp_path.iterdir())


def test_error_of_a_library_is_passed_on_while_there_is_space(tmp_path: Path) -> None:
    for error in (RuntimeError("shape"), ValueError("x"), TypeError("y")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error


def is_a_file(folder: Path) -> Path:
    (folder / "taken").write_text("x", encoding="utf-8")
    return folder / "taken"


@pytest.mark.parametrize("below", ["x", "a/b/x"])
def test_place_below_a_regular_file_is_refused(below: str, tmp_path: Path) -> None:
    place = is_a_file(tmp_path) / below
    for attempt in (lambda: write_atomic(place, b"x"), lambda: made(place, Maker()), lambda: locked(place).__enter__()):
        with pytest.raises(InputError) as caught:
            attempt()
        assert_user_error(caught.value, tmp_path / "taken")
    assert tree(tmp_path) == {"taken": b"x"}


def test_place_that_is_a_regular_file_is_refused(tmp_path: Path) -> None:
    place = is_a_file(tmp_path)
    for attempt in (lambda: made(place, Maker()), lambda: locked(place).__enter__()):
        with pytest.raises(InputError) as caught:
            attempt()
        assert_user_error(caught.value, place)


def test_report_whose_name_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json" / "inner").mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        write_atomic(tmp_path / "report.json", b"x")
    assert_user_error(caught.value, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_name_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 300)
    for attempt in (
        lambda: write_atomic(place / "y", b"x"),
        lambda: made(place, Maker()),
        lambda: locked(place).__enter__(),
    ):
        with pytest.raises(InputError) as caught:
            attempt()
        assert_user_error(caught.value, place)


def test_link_that_points_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for attempt in (lambda: write_atomic(tmp_path / "loop" / "x", b"x"), lambda: made(tmp_path / "loop", Maker())):
        with pytest.raises(InputError) as caught:
            attempt()
        assert_user_error(caught.value, tmp_path / "loop")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 1 MB, or None where mounting is not permitted."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


LIMITED = """
import resource, sys
from pathlib import Path
from edgemm.artifact import build, write_atomic
from edgemm.errors import InputError

place = Path(sys.argv[1])
if sys.argv[2] == "file size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
write_atomic(place / "report.json", b"old")
for attempt in (
    lambda: write_atomic(place / "report.json", bytes(2 << 20)),
    lambda: build("graph", place / "runs", config={}, make=lambda out: (out / "x").write_bytes(bytes(2 << 20))),
):
    try:
        attempt()
    except InputError as e:
        print(e.exit_code, str(place) in str(e), "\\n  fix: " in str(e))
print((place / "report.json").read_bytes(), sorted(p.name for p in place.rglob("*")))
"""
LIMITED_OUTPUT = "2 True True\n2 True True\nb'old' ['report.json', 'runs']\n"


def at_the_limit(place: Path, limit: str) -> str:
    command = [sys.executable, "-c", LIMITED, str(place), limit]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_limit_on_file_size_is_named_and_leaves_the_old_content(tmp_path: Path) -> None:
    assert at_the_limit(tmp_path, "file size") == LIMITED_OUTPUT


def test_full_disk_is_named_and_leaves_the_old_content(small_disk: Path | None, tmp_path: Path) -> None:
    """Where no small disk can be mounted, the limit on file size is the real limit."""
    if small_disk is not None:
        assert at_the_limit(small_disk, "disk") == LIMITED_OUTPUT
    else:
        assert at_the_limit(tmp_path / "other", "file size") == LIMITED_OUTPUT


@pytest.mark.parametrize(
    "error", [RuntimeError("Can't open bin file"), ValueError("I/O error"), OSError("write failed")]
)
def test_full_disk_is_recognised_whatever_a_library_says(
    error: Exception, small_disk: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO, safetensors and others fail on a full disk with errors of their own."""
    runs = (small_disk or tmp_path) / "runs"
    if small_disk is None:
        monkeypatch.setattr(artifact.shutil, "disk_usage", lambda where: full_while_there(Path(where), runs))

    def fill(out: Path) -> None:
        if small_disk is None:
            (out / "x").write_bytes(b"x")
            raise error
        try:
            (out / "x").write_bytes(bytes(2 * MEGABYTE))
        except OSError:
            raise error from None

    with pytest.raises(InputError) as caught:
        made(runs, fill)
    assert_user_error(caught.value, runs)
    assert "space" in str(caught.value)
    assert not list(runs.iterdir())
    if small_disk is not None:
        make = Maker()
        made(runs, make)
        assert make.calls == 1, "the space is given back"


def full_while_there(where: Path, runs: Path) -> Any:
    """Disk usage of a disk that half-made files fill."""
    total, used, free = os.statvfs(where).f_blocks, 0, 0 if list(runs.glob(".tmp-*")) else 1 << 30
    return type("usage", (), {"total": total, "used": used, "free": free})


def test_safetensors_on_a_full_disk_is_a_user_error(small_disk: Path | None, tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from safetensors.numpy import save_file\n"
        "from edgemm.artifact import build\n"
        "from edgemm.errors import InputError\n"
        "weights = {'w': np.zeros(1 << 19, np.float32)}\n"
        "make = lambda out: save_file(weights, out / 'm.safetensors')\n"
        "try:\n"
        "    build('pruned', Path(sys.argv[1]), config={}, make=make)\n"
        "except InputError as e:\n"
        "    print(e.exit_code)\n"
    )
    if small_disk is not None:
        done = subprocess.run(
            [sys.executable, "-c", code, str(small_disk)], capture_output=True, text=True, check=False
        )
        assert done.stdout == "2\n", done.stderr
    else:
        with pytest.raises(InputError), writing(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
