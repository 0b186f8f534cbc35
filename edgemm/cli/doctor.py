"""edgemm doctor"""

from __future__ import annotations

from typing import Annotated

import typer

from edgemm import console


def command(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """What is installed, what it can do on this machine, and what is missing."""
    from edgemm.inspection import doctor

    found = doctor()
    if json:
        console.result_json(found)
        return
    console.table("host", ("fact", "value"), found["host"].items())
    console.table("tools", ("tool", "version"), found["tools"].items())
    console.table("backends", ("backend", "what it can do here"), found["backends"].items())
