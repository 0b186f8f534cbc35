"""bom.cdx.json: the CycloneDX ML-BOM of a bundle, for those who keep account of what runs on a fleet.

The model with its card (what goes in and comes out, data, accuracy against FP32), every file of the bundle, the
data set by its digest, and the tools that made it. No time and no random number is in it: same bundle, same bytes.

Written by hand, as cyclonedx-python-lib 11 has no model cards; the tests hold it to the schema that comes with that.
Specification: https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from edgemm.artifact import canonical

NAMESPACE = uuid.UUID("b8f5d1d4-3ac1-5d3b-9d5e-5a5f0e3c7a11")  # of edgemm's bundles
REGISTRIES = {"zlib": "generic"}  # of tools that are not on PyPI
MEDIA = ("image", "text", "audio", "tensors")


def bill_of_materials(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """The BOM of a bundle: its manifest without `files`, and its files without this one."""
    provenance, program = manifest["provenance"], manifest["program"]
    data = {
        "type": "data",
        "bom-ref": "data",
        "name": provenance["recipe"].get("data") or "none",
        "hashes": [{"alg": "SHA-256", "content": provenance["data"]}],
        "data": [{"type": "dataset"}],
    }
    listed = [
        {
            "type": "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}],
        }
        for name, content in sorted(files.items())
    ]
    tools = [
        {"type": "library", "bom-ref": f"tool:{name}", "name": name, "version": version}
        | ({} if name == "edgemm" else {"purl": f"pkg:{REGISTRIES.get(name, 'pypi')}/{name}@{quote(version)}"})
        for name, version in sorted(provenance["versions"].items())
        if version != "absent"
    ]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": manifest["model"],
        "version": str(manifest["version"]),
        "modelCard": {
            "modelParameters": {
                "task": program["output"].get("kind", "labels"),
                "datasets": [{"ref": "data"}],
                "inputs": [{"format": medium} for medium in MEDIA if program.get(medium)],
                "outputs": [{"format": program["output"].get("kind", "labels")}],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [m for row in manifest["certificate"]["accuracy"] for m in metrics(row)]
            },
        },
        "properties": [
            {"name": f"edgemm:{name}", "value": str(value)}
            for name, value in (
                ("target", manifest["target"]),
                ("verdict", manifest["certificate"]["verdict"]),
                ("recipe", provenance["recipe"]["name"]),
                ("seed", provenance["recipe"]["seed"]),
                ("engine", provenance["engine"]),
                ("source", provenance["source"]),
            )
        ],
    }
    content: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"lifecycles": [{"phase": "build"}], "component": model},
        "components": [data, *listed, *tools],
        "dependencies": [{"ref": "model", "dependsOn": sorted(f["bom-ref"] for f in listed)}],
    }
    content["serialNumber"] = f"urn:uuid:{uuid.uuid5(NAMESPACE, canonical(content))}"
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode()


def metrics(row: Mapping[str, Any]) -> list[dict[str, str | dict[str, str]]]:
    """One row of the certificate: the FP32 model, the compressed one, and the bound on the drop between them."""
    return [
        {"type": row["metric"], "slice": "fp32", "value": str(row["fp32"])},
        {"type": row["metric"], "slice": "compressed", "value": str(row["compressed"])},
        {
            "type": f"drop of {row['metric']}",
            "slice": f"paired, {row['n']} samples, one-sided 95 %",
            "value": str(row["drop"]),
            "confidenceInterval": {"upperBound": str(row["drop_ci95_upper"])},
        },
    ]
