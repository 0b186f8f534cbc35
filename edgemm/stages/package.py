"""Package: one .edgemm file of all that a device needs, and nothing that the clock measured."""

from __future__ import annotations

import json
from pathlib import Path

from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.data import split
from edgemm.recipe import Recipe
from edgemm.report.schema import TargetReport
from edgemm.runtime.bundle import write_bundle
from edgemm.runtime.session import Query, open_directory
from edgemm.target import Target

GOLDEN = 4


def package(
    verified: Artifact, engine: Artifact, source: Artifact, recipe: Recipe, target: Target, runs: Path
) -> Artifact:
    """The bundle of a verified engine: model.edgemm in the artifact.

    Inside: the components, tokenizer.json, golden/ (inputs and expected logits), check.npz (the FP32
    model's outputs on the verification split, for `edgemm verify`), and manifest.json with the
    program, the parity certificate and provenance. Format: runtime/bundle.py.
    """
    name = Path(recipe.model).name  # not the path: where the model lay is nobody's business on the device
    report = TargetReport.model_validate(verified.json("target.json"))
    certificate = {"verdict": report.verdict, "accuracy": [a.model_dump(mode="json") for a in report.accuracy]}
    provenance = {
        "engine": engine.digest,
        "source": source.digest,
        "recipe": recipe.model_copy(update={"model": name}).model_dump(mode="json", by_alias=True),
        "target": target.model_dump(mode="json", by_alias=True),
        "versions": {**source.manifest.versions, **engine.manifest.versions},
    }

    def make(out: Path) -> None:
        log(f"package {recipe.model} for {target.name}")
        _, samples = split(recipe.data, recipe.calibration, recipe.seed, recipe.verify.limit)
        payload = [n for n in engine.manifest.files if n != "program.json"]
        files = {n: (engine.path / n).read_bytes() for n in payload}
        golden = []
        session = open_directory(engine.path)
        for i, sample in enumerate(samples[:GOLDEN]):
            image = f"golden/{i}{sample.image.suffix}"
            files[image] = sample.image.read_bytes()
            logits = session.logits([Query(sample.image, sample.text)])[0]
            golden.append({"image": image, "text": sample.text, "logits": [float(f"{v:.6g}") for v in logits]})
        files["golden/expected.json"] = json.dumps(golden, indent=1).encode()
        files["check.npz"] = (source.path / "reference.npz").read_bytes()
        manifest = {
            "model": name,
            "target": target.name,
            "program": engine.json("program.json"),
            "certificate": certificate,
            "provenance": provenance,
        }
        (out / "model.edgemm").write_bytes(write_bundle(manifest, files))

    # Parents are what the bundle is made of, not the timed report: same verdict, same bytes.
    return build(
        "bundle",
        runs,
        parents=[engine, source],
        config={"certificate": certificate, "provenance": provenance},
        make=make,
    )
