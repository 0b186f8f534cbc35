"""edgemm verify-signature"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file; its signature is BUNDLE.sig.")],
    key: Annotated[Optional[Path], typer.Option(help="PEM file of the public key.")] = None,
    certificate_chain: Annotated[
        Optional[Path], typer.Option(metavar="PEM", help="PEM file of the root and intermediate certificates.")
    ] = None,
) -> None:
    """Check a bundle and that it was signed by a key, or by one whose certificate goes back to a root. Offline.

    Exit codes: 0 it was, 2 it was not or the bundle is damaged, 3 model-signing is not installed.
    """
    from edgemm.errors import InputError
    from edgemm.runtime.bundle import read_bundle

    trusted = key or certificate_chain
    if trusted is None or (key and certificate_chain):
        raise InputError("give --key or --certificate-chain, one of them", fix="--key PUB")
    checked = read_bundle(bundle, trusted)
    console.result(f"{bundle}: signed, version {checked.version}, sha256 {checked.sha256}")
