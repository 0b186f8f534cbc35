"""An OCI layout holds the bundle as it is, under digests that are right, in ModelPack's media types."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgemm.cli import build_app
from edgemm.errors import InputError
from edgemm.oci import write_layout
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.install import install
from tests.bundles import key_pair, signed, tiny_bundle


def blob(layout: Path, descriptor: dict[str, Any]) -> bytes:
    """What a registry's client does with a descriptor."""
    algorithm, _, digest = descriptor["digest"].partition(":")
    content = (layout / "blobs" / algorithm / digest).read_bytes()
    assert len(content) == descriptor["size"] and hashlib.sha256(content).hexdigest() == digest
    return content


def manifests(layout: Path) -> dict[str, dict[str, Any]]:
    """Manifest by tag."""
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_text())
    assert (index["schemaVersion"], index["mediaType"]) == (2, "application/vnd.oci.image.index.v1+json")
    tag = "org.opencontainers.image.ref.name"
    return {m["annotations"][tag]: json.loads(blob(layout, m)) for m in index["manifests"]}


def test_the_bundle_and_its_signature_come_out_as_they_went_in(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    bundle = signed(tmp_path / "m.edgemm", tiny_bundle(4), private)
    manifest = manifests(write_layout(bundle, tmp_path / "oci"))["4"]
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    weight, signature = manifest["layers"]
    assert weight["mediaType"] == "application/vnd.cncf.model.weight.v1.raw"
    assert weight["digest"] == f"sha256:{read_bundle(bundle).sha256}"
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for layer in (weight, signature):
        (pulled / layer["annotations"]["org.cncf.model.filepath"]).write_bytes(blob(tmp_path / "oci", layer))
    install(pulled / "m.edgemm", tmp_path / "root", public)
    config = json.loads(blob(tmp_path / "oci", manifest["config"]))
    assert config["descriptor"] == {"name": "tiny", "version": "4"}
    assert config["modelfs"] == {"type": "layers", "diffIds": [weight["digest"], signature["digest"]]}
    assert config["config"]["capabilities"] == {"inputTypes": ["other"], "outputTypes": ["text"]}
    assert set(config) == {"descriptor", "config", "modelfs"}, "ModelPack's schema takes no other keys"


def test_versions_are_tags_and_the_same_bundle_makes_the_same_bytes(tmp_path: Path) -> None:
    for version in (1, 2, 2):
        (tmp_path / "m.edgemm").write_bytes(tiny_bundle(version, gain=version))
        write_layout(tmp_path / "m.edgemm", tmp_path / "oci")
    assert list(manifests(tmp_path / "oci")) == ["1", "2"]
    write_layout(tmp_path / "m.edgemm", tmp_path / "again")
    ours, theirs = (manifests(tmp_path / name)["2"] for name in ("oci", "again"))
    assert ours == theirs


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifests": 5}', '{"manifests": [5]}', "[" * 100_000])
def test_a_directory_that_is_no_layout_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.edgemm").write_bytes(tiny_bundle())
    (tmp_path / "oci").mkdir()
    (tmp_path / "oci" / "index.json").write_text(text)
    with pytest.raises(InputError, match=r"is no OCI index[\s\S]*fix: "):
        write_layout(tmp_path / "m.edgemm", tmp_path / "oci")
    assert (tmp_path / "oci" / "index.json").read_text() == text


def test_from_the_command_line(tmp_path: Path) -> None:
    bundle, out = tmp_path / "m.edgemm", tmp_path / "oci"
    bundle.write_bytes(tiny_bundle())

    def call(*more: Any) -> tuple[int, str]:
        done = CliRunner().invoke(build_app(), ["package", str(bundle), "--format", "oci", *map(str, more)])
        return done.exit_code, done.stdout.strip() + done.stderr

    assert call("-o", out) == (0, str(out))
    assert call("-o", out, "--engines", tmp_path)[0] == 2
    install(bundle, tmp_path / "root")
    bundle = tmp_path / "root" / "current" / "model.edgemm"
    assert "is unpacked" in call("-o", out)[1]
    bundle = tmp_path / "none.edgemm"
    assert call("-o", out)[0] == 2
    bundle = tmp_path / "m.edgemm"
    (tmp_path / "file").write_text("x")
    assert call("-o", tmp_path / "file")[0] == 2
