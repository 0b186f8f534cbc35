"""edgemm verify"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    data: Annotated[Optional[str], typer.Option(help="Data set by name. Default: the one it was verified on.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Repeat a bundle's check on this machine: golden outputs, and accuracy against FP32.

    Exit codes: 0 PASS, 2 bad input, 3 a toolchain is absent, 4 FAIL, 5 INCONCLUSIVE.
    """
    from edgemm.recheck import verify_bundle
    from edgemm.verdict import raise_verdict

    row = verify_bundle(bundle, data)
    if json:
        console.result_json(row.model_dump(mode="json"))
    else:
        gates = ((g.name, g.verdict, f"{g.value:.4g}", f"{g.limit:.4g} {g.unit}", g.detail) for g in row.gates)
        console.table(f"{row.verdict}: {bundle}", ("gate", "verdict", "value", "limit", "detail"), gates)
        for note in row.notes:
            console.log(note)
    raise_verdict([row])
