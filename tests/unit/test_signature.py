"""Signatures: by key and by certificate, the same for edgemm and for model_signing, and nothing else is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgemm.cli import build_app
from edgemm.errors import InputError
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.signature import signature_of, write_signature
from tests.bundles import key_pair, openssl, signed, tiny_bundle

CONTENT = tiny_bundle()
SIGNING = "keyUsage=critical,digitalSignature\n"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "m.edgemm"
    path.write_bytes(CONTENT)
    return path


def sign(bundle: Path, *arguments: Any) -> Path:
    return write_signature(bundle, read_bundle(bundle).sha256, *arguments)


def certificate(folder: Path, name: str, issuer: str | None, extensions: str, key: str = "EC") -> Path:
    """NAME.crt for a new key NAME.pem, signed by ISSUER, or by itself."""
    how = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if key == "EC" else ["-newkey", "rsa:2048"]
    request, made, config = (folder / f"{name}.{suffix}" for suffix in ("csr", "crt", "ext"))
    openssl("req", "-new", *how, "-nodes", "-keyout", folder / f"{name}.pem", "-subj", f"/CN={name}", "-out", request)
    config.write_text(extensions)
    by = ["-signkey", folder / f"{name}.pem"]
    if issuer:
        by = ["-CA", folder / f"{issuer}.crt", "-CAkey", folder / f"{issuer}.pem", "-CAcreateserial"]
    openssl("x509", "-req", "-in", request, *by, "-days", "2", "-extfile", config, "-out", made)
    return made


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """root -> middle -> leaf, which may sign; and others that may not."""
    ca = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n"
    certificate(tmp_path, "root", None, ca)
    certificate(tmp_path, "middle", "root", ca)
    certificate(tmp_path, "leaf", "middle", f"basicConstraints=CA:FALSE\n{SIGNING}")
    certificate(tmp_path, "server", "middle", "basicConstraints=CA:FALSE\nkeyUsage=critical,keyEncipherment\n")
    certificate(tmp_path, "rsa", "middle", SIGNING, key="RSA")
    certificate(tmp_path, "stranger", None, ca)
    return tmp_path


@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_a_signature_by_a_key_is_found_right_and_the_bundle_stays_as_it_is(curve: str, bundle: Path) -> None:
    private, public = key_pair(bundle.parent, curve=curve)
    assert sign(bundle, private, None, []) == bundle.parent / "m.edgemm.sig"
    assert bundle.read_bytes() == CONTENT
    assert read_bundle(bundle, public).files == read_bundle(bundle).files
    bundle.write_bytes(tiny_bundle(2))
    with pytest.raises(InputError, match="it signs other bytes"):
        read_bundle(bundle, public)


def test_model_signing_and_edgemm_take_each_others_signatures(bundle: Path) -> None:
    private, public = key_pair(bundle.parent)

    def model_signing(*arguments: str) -> str:
        command = [sys.executable, "-m", "model_signing", *arguments, str(bundle), "--signature", f"{bundle}.sig"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    sign(bundle, private, None, [])
    model_signing("verify", "key", "--public_key", str(public))
    signature_of(bundle).unlink()
    model_signing("sign", "key", "--private_key", str(private))
    assert read_bundle(bundle, public)


def test_a_certificate_that_goes_back_to_the_root_is_trusted(bundle: Path, authority: Path) -> None:
    leaf, middle, root = (authority / f"{name}.crt" for name in ("leaf", "middle", "root"))
    sign(bundle, authority / "leaf.pem", leaf, [middle])
    assert read_bundle(bundle, root)
    both = authority / "both.pem"
    both.write_bytes(root.read_bytes() + middle.read_bytes())
    sign(bundle, authority / "leaf.pem", leaf, [])
    assert read_bundle(bundle, both), "the intermediate may be with the one who checks"
    for not_enough in (root, middle, authority / "stranger.crt"):
        with pytest.raises(InputError, match=r"is no signature of[\s\S]*fix: "):
            read_bundle(bundle, not_enough)


@pytest.mark.parametrize("name", ["server", "stranger"])
def test_a_certificate_that_may_not_sign_is_refused(name: str, bundle: Path, authority: Path) -> None:
    sign(bundle, authority / f"{name}.pem", authority / f"{name}.crt", [authority / "middle.crt"])
    trusted = authority / ("root.crt" if name == "server" else "stranger.crt")
    with pytest.raises(InputError, match="is no signature of"):
        read_bundle(bundle, trusted)


def test_a_certificate_of_another_key_or_kind_of_key_cannot_sign(bundle: Path, authority: Path) -> None:
    for key, crt in (("leaf", "server"), ("rsa", "rsa"), ("leaf", "root")):
        with pytest.raises(InputError, match="can't sign"):
            sign(bundle, authority / f"{key}.pem", authority / f"{crt}.crt", [])
    assert not signature_of(bundle).exists()


def test_keys_that_cannot_sign_or_check_are_named(bundle: Path) -> None:
    folder = bundle.parent
    private, public = key_pair(folder)
    openssl("genrsa", "-out", folder / "rsa.pem", "2048")
    openssl("rsa", "-in", folder / "rsa.pem", "-pubout", "-out", folder / "rsa.pub")
    openssl("ec", "-in", private, "-aes256", "-passout", "pass:secret", "-out", folder / "locked.pem")
    key_pair(folder, "koblitz", "secp256k1")
    (folder / "text.pem").write_text("no key")
    (folder / "broken.pub").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    (folder / "broken.crt").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (folder / "large.pem").write_bytes(bytes(2_000_000))
    os.mkfifo(folder / "pipe")
    for name in ("rsa.pem", "locked.pem", "koblitz.pem", "key.pub", "text.pem", "large.pem", "pipe", "none", "."):
        with pytest.raises(InputError, match="fix: "):
            sign(bundle, folder / name, None, [])
    sign(bundle, private, None, [])
    for name in (
        "rsa.pub",
        "koblitz.pub",
        "key.pem",
        "text.pem",
        "broken.pub",
        "broken.crt",
        "large.pem",
        "pipe",
        "none",
    ):
        with pytest.raises(InputError, match=r"fix: "):
            read_bundle(bundle, folder / name)
    assert read_bundle(bundle, public)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        '{"verificationMaterial": {}}',
        '{"verificationMaterial": null}',
        "x" * 2_000_000,
    ],
)
def test_a_file_that_is_no_signature_is_refused(text: str, bundle: Path) -> None:
    _, public = key_pair(bundle.parent)
    signature_of(bundle).write_text(text)
    with pytest.raises(InputError, match=r"m\.edgemm\.sig[\s\S]*fix: "):
        read_bundle(bundle, public)


def test_an_absent_signature_is_named_with_how_to_make_one(bundle: Path) -> None:
    _, public = key_pair(bundle.parent)
    with pytest.raises(InputError, match=r"cannot read signature .*m\.edgemm\.sig[\s\S]*edgemm sign"):
        read_bundle(bundle, public)
    signature_of(bundle).mkdir()
    with pytest.raises(InputError, match="cannot read signature"):
        read_bundle(bundle, public)


def test_a_signature_without_its_key_s_hint_prints_nothing_on_stdout(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """model_signing warns of older signatures by print(); stdout is for the result."""
    private, public = key_pair(bundle.parent)
    signature = json.loads(sign(bundle, private, None, []).read_text())
    del signature["verificationMaterial"]["publicKey"]["hint"]
    signature_of(bundle).write_text(json.dumps(signature))
    assert read_bundle(bundle, public)
    shown = capsys.readouterr()
    assert shown.out == "" and "WARNING" in shown.err


def call(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(build_app(), [str(a) for a in arguments])
    return done.exit_code, done.stdout + done.stderr


def test_from_the_command_line(bundle: Path, authority: Path) -> None:
    private, public = key_pair(bundle.parent)
    assert call("sign", bundle, "--key", private) == (0, f"{bundle}.sig\n")
    code, shown = call("verify-signature", bundle, "--key", public)
    assert code == 0 and read_bundle(bundle).sha256 in shown and "version 1" in shown
    assert call("verify-signature", bundle)[0] == 2
    assert call("verify-signature", bundle, "--key", public, "--certificate-chain", public)[0] == 2
    root = authority / "root.crt"
    assert call("verify-signature", bundle, "--certificate-chain", root)[0] == 2
    chain = ("--certificate", authority / "leaf.crt", "--certificate-chain", authority / "middle.crt")
    assert call("sign", bundle, "--key", authority / "leaf.pem", *chain)[0] == 0
    assert call("verify-signature", bundle, "--certificate-chain", root)[0] == 0
    assert call("sign", bundle, "--key", private, "--certificate-chain", root)[0] == 2
    assert "signature" in call("run", bundle, "--text", "x", "--require-signature", public)[1]
    bundle.write_bytes(CONTENT[:-1])
    assert call("sign", bundle, "--key", private)[0] == 2, "a damaged bundle is not signed"


@pytest.mark.parametrize("absent", ["model_signing", "OpenSSL"])
def test_without_model_signing_it_says_what_to_install(
    absent: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key_pair(bundle.parent)
    signed(bundle, CONTENT, private)
    monkeypatch.setitem(sys.modules, absent, None)
    for command in (("sign", bundle, "--key", private), ("verify-signature", bundle, "--key", public)):
        code, shown = call(*command)
        assert code == 3 and "pip install 'edgemm[sign]'" in shown
    assert call("inspect", bundle)[0] == 0, "only signatures need it"
