"""The README's `console` blocks, run as they stand where the main job ran; `make` and `pip` lines are CI's own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from edgemm.data.easy_vqa import samples

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What the machine and the clock decide: numbers and table frames are compared as shapes.
NO_TIMED_GATE = ("--set", "target.budgets.min_speedup=null")
VARIES = re.compile(r"[\d.,]+")


def blocks() -> list[str]:
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def steps(block: str) -> list[tuple[str, str]]:
    """(command, expected output) pairs of one block."""
    return [
        (head, output)
        for head, _, output in (part.partition("\n") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:])
    ]


def test_the_console_blocks_run(main_job: Path) -> None:
    shutil.copytree(ROOT / "recipes", main_job / "recipes", dirs_exist_ok=True)
    shutil.copytree(ROOT / "targets", main_job / "targets", dirs_exist_ok=True)
    shutil.copyfile(next(s.image for s in samples("test") if "circle" in s.label), main_job / "sample.png")
    ran = 0
    for block in blocks():
        for command, expected in steps(block):
            if command.split()[0] in ("make", "pip", "git"):
                continue
            line = re.sub(r"\bedgemm ", f"{sys.executable} -m edgemm ", command, count=1)
            if command.startswith("edgemm compress"):
                line += " " + " ".join(NO_TIMED_GATE)
            done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=main_job, check=False)
            wanted = expected.strip()
            got = (done.stdout + done.stderr).strip() if wanted.startswith("error:") else done.stdout.strip()
            if wanted and "..." not in wanted:
                assert VARIES.sub("#", got) == VARIES.sub("#", wanted), command
            assert wanted.startswith("error:") or done.returncode == 0, f"{command}: {done.stderr}"
            ran += 1
    assert ran >= 5
