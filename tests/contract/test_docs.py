"""README and --help say the same: every command and exit code is in the README, and no option that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edgemm import errors
from edgemm.cli import build_app
from edgemm.plugins import names

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", names("cli"))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"edgemm {command.replace('_', '-')}\b", README)


@pytest.mark.parametrize("error", errors.EdgemmError.__subclasses__())
def test_every_exit_code_is_in_the_readme(error: type[errors.EdgemmError]) -> None:
    assert re.search(rf"^\| {error.exit_code} \|", README, re.MULTILINE)


def test_options_in_the_readme_exist() -> None:
    root = typer.main.get_command(build_app())
    for line in re.findall(r"^\$ edgemm (.+)$", README, re.MULTILINE):
        command = root
        for word in line.split():
            if word not in getattr(command, "commands", {}):
                break
            command = command.commands[word]
        known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
        used = {w for w in re.sub(r'"[^"]*"', "", line).split() if w.startswith("-")}
        assert used <= known, f"{line}: {used - known}"


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(build_app(), ["--help"]).stdout
    assert all(name.replace("_", "-") in shown for name in names("cli"))
