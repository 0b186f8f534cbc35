"""edgemm package"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


class Format(str, Enum):
    triton = "triton"


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    format_: Annotated[Format, typer.Option("--format", help="A Triton Inference Server model repository.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The repository. Models in it get another version.")],
    device_report: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="device_runner.py's report, for engines that were built on a device."),
    ] = None,
    engines: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="device_runner.py's --cache, with those engines.")
    ] = None,
) -> None:
    """Lay a bundle out for a server: a model a component, and an ensemble of them.

    Exit codes: 0 done, 2 bad input, 3 a toolchain is absent.
    """
    from edgemm.triton import write_repository

    del format_  # there is one
    for model in write_repository(bundle, out, device_report, engines):
        console.result(str(model))
