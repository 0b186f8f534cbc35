"""A bundle as an OCI image layout on disk, in ModelPack's media types, so that registries can carry it.

    DIR/oci-layout  index.json  blobs/sha256/<digest>: the manifest, its configuration, the bundle, the signature

The bundle is one raw layer: its digest in the registry is the SHA-256 that the report and the signature name, and
`oras copy --from-oci-layout DIR:TAG REGISTRY/NAME:TAG` moves it as it is. Same bundle, same bytes: no time is in it.

Specifications: https://github.com/modelpack/model-spec (v1), https://github.com/opencontainers/image-spec (1.1)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edgemm.artifact import canonical, locked, write_atomic
from edgemm.errors import InputError
from edgemm.plugins import validate
from edgemm.runtime.archive import MAX_FILE
from edgemm.runtime.bundle import read_bundle
from edgemm.runtime.disk import read_regular
from edgemm.runtime.program import Program
from edgemm.runtime.signature import MAX_SIGNATURE, signature_of

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
DOCUMENT = "application/vnd.cncf.model.doc.v1.raw"
TAG = "org.opencontainers.image.ref.name"
MODALITIES = {"tensors": "other"}  # the others are called as in ModelPack
OUTPUTS = {"generation": "text", "transcript": "text", "labels": "text", "embeddings": "embedding", "features": "other"}
MAX_INDEX = 1 << 20


def write_layout(bundle: Path, out: Path) -> Path:
    """Add a bundle, and BUNDLE.sig where there is one, to the layout `out`, tagged with its version -> `out`.

    A tag that is there already goes to the new one. Raises InputError for a bundle or layout that is not to be used.
    """
    checked = read_bundle(bundle)
    program = validate(Program, checked.manifest["program"], f"{bundle}: program")
    if not bundle.is_file():
        raise InputError(f"{bundle} is unpacked", fix="give the .edgemm file")
    content = read_regular(bundle, MAX_FILE, "bundle", "give the path of an .edgemm file")
    if hashlib.sha256(content).hexdigest() != checked.sha256:
        raise InputError(f"{bundle} changed while it was read", fix="run it again")
    with locked(out):
        index = _index(out)
        layers = [_blob(out, content, WEIGHT, bundle.name)]
        if (signature := signature_of(bundle)).exists():
            signed = read_regular(signature, MAX_SIGNATURE, "signature", "edgemm sign BUNDLE --key KEY")
            layers.append(_blob(out, signed, DOCUMENT, signature.name))
        precision = checked.manifest["program"]["settings"].get("precision", "f32")
        config = {
            "descriptor": {"name": checked.manifest["model"], "version": str(checked.version)},
            "config": {
                "format": program.backend,
                "precision": precision,
                "capabilities": {
                    "inputTypes": [MODALITIES.get(name, name) for name in program.sources()],
                    "outputTypes": [OUTPUTS[program.output.kind]],
                },
            },
            "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": _blob(out, canonical(config).encode(), CONFIG),
            "layers": layers,
        }
        entry = _blob(out, canonical(manifest).encode(), MANIFEST) | {"artifactType": ARTIFACT}
        entry["annotations"] = {TAG: str(checked.version)}
        kept = [m for m in index if m.get("annotations", {}).get(TAG) != str(checked.version)]
        listed = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*kept, entry]}
        write_atomic(out / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        write_atomic(out / "index.json", canonical(listed).encode())
    return out


def _blob(out: Path, content: bytes, media_type: str, name: str | None = None) -> dict[str, Any]:
    """Write a blob under its digest -> its descriptor, with the file name that it is to be unpacked under."""
    digest = hashlib.sha256(content).hexdigest()
    write_atomic(out / "blobs" / "sha256" / digest, content)
    named = {"org.cncf.model.filepath": name, "org.opencontainers.image.title": name}
    descriptor = {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}
    return descriptor | ({"annotations": named} if name else {})


def _index(out: Path) -> list[dict[str, Any]]:
    """The manifests that a layout lists; none where there is no layout yet."""
    if not (out / "index.json").exists():
        return []
    try:
        listed = json.loads(read_regular(out / "index.json", MAX_INDEX, "file", "choose another -o"))["manifests"]
        if not all(isinstance(m.get("annotations", {}), dict) for m in listed):
            raise TypeError("annotations are no mapping")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{out}/index.json is no OCI index", fix="choose another -o directory") from e
    return list(listed)
