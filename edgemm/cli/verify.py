"""edgemm verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    data: Annotated[Optional[str], typer.Option(help="Data set or file. Default: the one it was verified on.")] = None,
    device_report: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="What device_runner.py wrote on the device: judge that instead."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Repeat a bundle's check on this machine: golden outputs, and accuracy against FP32.

    A bundle whose engines are built on a device is checked there by device_runner.py; --device-report FILE gives
    the verdict on what that measured.

    Exit codes: 0 PASS, 2 bad input, 3 a toolchain is absent, 4 FAIL, 5 INCONCLUSIVE.
    """
    from edgemm.errors import InputError
    from edgemm.report.markdown import measure
    from edgemm.verdict import raise_verdict

    if data is not None and device_report is not None:
        raise InputError("--data and --device-report exclude each other", fix="leave out --data: the device used none")
    if device_report is not None:
        from edgemm.device_report import verify_device

        row = verify_device(bundle, device_report)
    else:
        from edgemm.recheck import verify_bundle

        row = verify_bundle(bundle, data)
    if json:
        console.result_json(row.model_dump(mode="json"))
    else:
        gates = ((g.name, g.verdict, measure(g.value, ""), measure(g.limit, g.unit), g.detail) for g in row.gates)
        console.table(f"{row.verdict}: {bundle}", ("gate", "verdict", "value", "limit", "detail"), gates)
        if row.established:
            console.log(row.established)
        for note in row.notes:
            console.log(note)
    raise_verdict([row])
