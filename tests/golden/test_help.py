"""`--help` of every command, word for word: a change of the interface is a change of a file here.

EDGEMM_UPDATE_GOLDEN=1 pytest tests/golden writes the files anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgemm.cli import build_app
from edgemm.plugins import names

GOLDEN = Path(__file__).parent / "help"
COMMANDS = ["", *(name.replace("_", "-") for name in names("cli")), "recipes show", "recipes check", "targets list"]


def check_golden(path: Path, text: str) -> None:
    if os.environ.get("EDGEMM_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    plain = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "TERMINAL_WIDTH": "100"}
    result = CliRunner().invoke(build_app(), [*command.split(), "--help"], env=plain)
    assert result.exit_code == 0
    lines = "\n".join(line.rstrip() for line in result.stdout.splitlines())
    check_golden(GOLDEN / f"{command.replace(' ', '-') or 'edgemm'}.txt", lines + "\n")
