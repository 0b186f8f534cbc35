"""edgemm rollback"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    root: Annotated[Path, typer.Option(help="The device's directory for bundles.")],
    require_signature: Annotated[
        Optional[Path], typer.Option(metavar="KEY", help="Refuse a bundle without a signature by this key.")
    ] = None,
) -> None:
    """Make the bundle that was installed before the current one again; a second time goes forward.

    It is checked and tested first. An older version stays refused by `edgemm install`.

    Exit codes: 0 done, 2 there is none or it is damaged, 3 a toolchain is absent, 4 it does not work here.
    """
    from edgemm.runtime.install import rollback

    console.result(str(rollback(root, require_signature)))
