"""A run that is killed in any stage leaves nothing half-written, and the next run ends in the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

STAGES = ("load", "prune", "export", "quantize", "compile", "verify", "package")


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, tiny_recipe: Path, tiny_target: Path) -> list[str]:
    return ["compress", str(tiny_model), "--recipe", str(tiny_recipe), "--target", str(tiny_target)]


@pytest.fixture(scope="module")
def reference(edgemm, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole")
    done = edgemm(*arguments, "-o", out)
    assert done.returncode == 0, done.stderr
    return bundle(out).read_bytes()


def bundle(out: Path) -> Path:
    return out / "box" / "model-box.edgemm"


def stop_in(stage: str, arguments: list[str], out: Path, how: signal.Signals) -> tuple[int, str]:
    """Start a run and send `how` as soon as it says that it is in `stage` -> (exit code, stderr)."""
    command = [sys.executable, "-m", "edgemm", *arguments, "-o", str(out)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    # A background job ignores Ctrl-C and so would its children: give it back.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, preexec_fn=listen, **pipes) as process:
        seen = ""
        for line in process.stderr:
            seen += line
            if line.startswith(stage):
                os.kill(process.pid, how)
                break
        seen += process.stderr.read()
    return process.returncode, seen


def test_kill_in_every_stage_then_resume_gives_the_same_bytes(
    edgemm, arguments: list[str], reference: bytes, tmp_path: Path
) -> None:
    for stage in STAGES:
        code, stderr = stop_in(stage, arguments, tmp_path, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"{stage}: {stderr}"
        assert not bundle(tmp_path).exists()
        assert not (tmp_path / "report.json").exists()
    done = edgemm(*arguments, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "load" not in done.stderr, "finished stages are not done again"
    assert bundle(tmp_path).read_bytes() == reference
    assert not list((tmp_path / ".runs").glob(".tmp-*"))


def test_ctrl_c_leaves_nothing_half_written_and_resumes(
    edgemm, arguments: list[str], reference: bytes, tmp_path: Path
) -> None:
    for stage in ("load", "export", "quantize"):
        code, stderr = stop_in(stage, arguments, tmp_path, signal.SIGINT)
        assert code == 130, stderr
        assert "interrupted" in stderr
        assert not list((tmp_path / ".runs").glob(".tmp-*"))
    assert edgemm(*arguments, "-o", tmp_path).returncode == 0
    assert bundle(tmp_path).read_bytes() == reference


def test_full_disk_is_named_and_leaves_nothing(edgemm, arguments: list[str], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], check=True)
    try:
        done = edgemm(*arguments, "-o", small / "out")
        assert done.returncode == 2, done.stderr
        assert "space" in done.stderr
        assert "fix:" in done.stderr
        assert not list((small / "out" / ".runs").glob("*-*"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_fresh_run_from_another_place_makes_the_same_bytes(
    edgemm, arguments: list[str], reference: bytes, tmp_path: Path
) -> None:
    shutil.copytree(Path(arguments[1]), tmp_path / "elsewhere" / "model")
    elsewhere = ["compress", str(tmp_path / "elsewhere" / "model"), *arguments[2:]]
    done = edgemm(*elsewhere, "-o", tmp_path / "out", "--fresh")
    assert done.returncode == 0, done.stderr
    assert bundle(tmp_path / "out").read_bytes() == reference
