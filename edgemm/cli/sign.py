"""edgemm sign"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from edgemm import console


def command(
    bundle: Annotated[Path, typer.Argument(help="An .edgemm file.")],
    key: Annotated[Path, typer.Option(help="PEM file of an elliptic-curve private key, not encrypted.")],
    certificate: Annotated[Optional[Path], typer.Option(help="PEM file of the certificate of that key.")] = None,
    certificate_chain: Annotated[
        Optional[list[Path]], typer.Option(metavar="PEM", help="Intermediate certificates, to be sent along.")
    ] = None,
) -> None:
    """Sign a bundle in the OpenSSF model-signing format: BUNDLE.sig.

    The bundle is checked first and stays as it is.

    Exit codes: 0 done, 2 bad input, 3 model-signing is not installed.
    """
    from edgemm.errors import InputError
    from edgemm.runtime.bundle import read_bundle
    from edgemm.runtime.signature import write_signature

    if certificate_chain and certificate is None:
        raise InputError("--certificate-chain without --certificate", fix="give the key's own certificate too")
    console.result(str(write_signature(bundle, read_bundle(bundle).sha256, key, certificate, certificate_chain or [])))
