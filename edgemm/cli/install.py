"""edgemm install"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    root: Annotated[Path, typer.Option(help="The device's directory for bundles; made when it is not there.")],
    require_signature: Annotated[
        Optional[Path], typer.Option(metavar="KEY", help="Refuse a bundle without a signature by this key.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take a version that is not higher than any before.")] = False,
) -> None:
    """Check a bundle, unpack it, test it on its golden inputs, and make it the current one, all or nothing.

    What was current stays beside it for `edgemm rollback`. `edgemm run ROOT/current/model.edgemm` runs it.

    Exit codes: 0 done, 2 bad input or an old version, 3 a toolchain is absent, 4 it does not work here.
    """
    from edgemm.runtime.install import install

    console.result(str(install(bundle, root, require_signature, force=force)))
