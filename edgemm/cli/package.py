"""edgemm package"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


class Format(str, Enum):
    triton = "triton"
    oci = "oci"


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    format_: Annotated[Format, typer.Option("--format", help="A Triton model repository, or an OCI layout.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The repository or layout, to which this is added.")],
    device_report: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="device_runner.py's report, for engines that were built on a device."),
    ] = None,
    engines: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="device_runner.py's --cache, with those engines.")
    ] = None,
) -> None:
    """Lay a bundle out for a Triton server, a model a component and an ensemble of them, or for a registry.

    An OCI layout holds the bundle and its signature as they are, tagged with the bundle's version.

    Exit codes: 0 done, 2 bad input, 3 a toolchain is absent.
    """
    if format_ is Format.oci:
        from edgemm.errors import InputError
        from edgemm.oci import write_layout

        if device_report or engines:
            raise InputError("--device-report and --engines are of --format triton", fix="leave them out")
        console.result(str(write_layout(bundle, out)))
        return

    from edgemm.triton import write_repository

    for model in write_repository(bundle, out, device_report, engines):
        console.result(str(model))
