"""Signatures of bundles in the OpenSSF model-signing format, beside the bundle as BUNDLE.sig.

Beside and not inside: a bundle's bytes and digest stay what `compress` made, so it is rebuilt bit for bit, signed
later, elsewhere and by another key, and found by `model_signing verify` as by edgemm. BUNDLE.sig is a Sigstore
bundle with a DSSE envelope over an in-toto statement of the bundle file's SHA-256; all of it is checked offline.

Format: https://github.com/sigstore/model-transparency, https://docs.sigstore.dev/about/bundle/
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from edgemm.artifact import write_atomic
from edgemm.errors import InputError, ToolchainError
from edgemm.runtime.disk import read_regular

MAX_PEM = MAX_SIGNATURE = 1 << 20
UNTRUSTED = "do not use this bundle, or give the key that it was signed with"
MAKE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out KEY; openssl ec -in KEY -pubout -out PUB"


def signature_of(bundle: Path) -> Path:
    """Where the signature of a bundle lies."""
    return bundle.with_name(f"{bundle.name}.sig")


def check_signature(bundle: Path, sha256: str, trusted: Path | None) -> None:
    """InputError unless BUNDLE.sig signs these bytes for the holder of `trusted`; None asks for no signature.

    sha256   of the bundle's bytes, as they were read: the file itself is not read again
    trusted  PEM file: a public key (P-256, P-384 or P-521), or the root and intermediate certificates of a chain.
             A chain is judged at the time from which the signer's certificate is valid, as the format has no other
    Raises ToolchainError when model-signing is not installed.
    """
    if trusted is None:
        return
    signature = signature_of(bundle)
    pem = read_regular(trusted, MAX_PEM, "key", "give a PEM file")
    read_regular(signature, MAX_SIGNATURE, "signature", "edgemm sign BUNDLE --key KEY makes one")
    with _library() as (library, errors):
        config = library.verifying.Config().set_hashing_config(_known(library, bundle.name, sha256))
        try:
            if b"-----BEGIN CERTIFICATE-----" in pem:
                config.use_certificate_verifier(certificate_chain=[trusted])
            elif b"-----BEGIN PUBLIC KEY-----" in pem:
                config.use_elliptic_key_verifier(public_key=trusted)
            else:
                raise ValueError("it has neither BEGIN PUBLIC KEY nor BEGIN CERTIFICATE")
        except errors as e:
            raise InputError(f"{trusted} can't check signatures: {_reason(e)}", fix=MAKE_KEY) from e
        try:
            config.verify(bundle, signature)
        except errors as e:
            raise InputError(
                f"{signature} is no signature of {bundle} for {trusted}: {_reason(e)}", fix=UNTRUSTED
            ) from e


def write_signature(bundle: Path, sha256: str, key: Path, certificate: Path | None, chain: Sequence[Path]) -> Path:
    """Sign a bundle whose bytes have this digest -> BUNDLE.sig.

    key          PEM file of an elliptic-curve private key (P-256, P-384 or P-521), not encrypted
    certificate  PEM file of its certificate, which must allow digital signatures or code signing
    chain        PEM files of intermediate certificates, sent along
    Raises InputError for a key or certificate that can't sign, ToolchainError when model-signing is not installed.
    """
    for file in (key, *([certificate] if certificate else ()), *chain):
        read_regular(file, MAX_PEM, "key", MAKE_KEY)
    with _library() as (library, errors), tempfile.TemporaryDirectory() as folder:
        config = library.signing.Config().set_hashing_config(_known(library, bundle.name, sha256))
        try:
            if certificate is None:
                config.use_elliptic_key_signer(private_key=key)
            else:
                config.use_certificate_signer(private_key=key, signing_certificate=certificate, certificate_chain=chain)
            config.sign(bundle, Path(folder, "signature"))
        except errors as e:
            raise InputError(f"{key} can't sign: {_reason(e)}", fix=MAKE_KEY) from e
        write_atomic(signature_of(bundle), Path(folder, "signature").read_bytes())
    return signature_of(bundle)


@contextlib.contextmanager
def _library() -> Iterator[tuple[Any, tuple[type[Exception], ...]]]:
    """model-signing, and what it raises for keys and signatures that are broken; it may print, but not to stdout."""
    try:
        import cryptography.exceptions
        import cryptography.x509
        import model_signing
        import OpenSSL.crypto
    except ImportError as e:
        raise ToolchainError(f"signatures can't be checked: {e}", fix="pip install 'edgemm[sign]'") from e
    errors = (
        *(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError),  # it trusts what it parses
        cryptography.exceptions.InvalidSignature,
        cryptography.exceptions.UnsupportedAlgorithm,
        cryptography.x509.InvalidVersion,
        cryptography.x509.DuplicateExtension,
        cryptography.x509.UnsupportedGeneralNameType,
        OpenSSL.crypto.Error,
        OpenSSL.crypto.X509StoreContextError,
    )
    with contextlib.redirect_stdout(sys.stderr):
        yield model_signing, errors


def _known(library: Any, name: str, sha256: str) -> Any:
    """How model-signing hashes a file whose digest is known: the bytes that were checked are those that count."""
    from model_signing._hashing.hashing import Digest

    class Known(library.hashing.Config):  # type: ignore[misc]
        def hash(self, model_path: object, *, files_to_hash: object = None) -> Any:
            del model_path, files_to_hash
            digest = Digest("sha256", bytes.fromhex(sha256))
            file = library.manifest.FileManifestItem(path=PurePosixPath("."), digest=digest)
            how = library.manifest.SerializationType.from_args(
                {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
            )
            return library.manifest.Manifest(name, [file], how)

    return Known()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
