"""Package: one .edgemm file of all that a device needs, and nothing that the clock measured."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgemm.artifact import Artifact, build
from edgemm.console import log
from edgemm.data import Sample, split
from edgemm.device.files import RUNNER, TRTEXEC, device_files
from edgemm.levels import simulation
from edgemm.recipe import Recipe
from edgemm.report.bom import bill_of_materials
from edgemm.report.schema import TargetReport
from edgemm.runtime.archive import deflatable
from edgemm.runtime.bundle import write_bundle
from edgemm.runtime.query import Array
from edgemm.runtime.session import Session, open_directory
from edgemm.target import Target

GOLDEN = 4
BESIDE = (RUNNER, TRTEXEC)


def package(
    verified: Artifact,
    engine: Artifact,
    quantized: Artifact,
    graph: Artifact,
    source: Artifact,
    recipe: Recipe,
    target: Target,
    runs: Path,
) -> Artifact:
    """The bundle of a verified engine: model.edgemm in the artifact.

    Inside: the components, tokenizer.json, golden/ (inputs and expected outputs), check.npz (the FP32
    model's outputs on the verification split, for `edgemm verify`), bom.cdx.json, and manifest.json with the
    program, the parity certificate and provenance. Format: runtime/bundle.py.

    Where the engine is built on the device, the bundle has what device/files.py lists instead of golden/ and
    check.npz, and the artifact also has the files of it that are to lie beside the bundle.

    quantized, graph   the graphs that the engine was compiled from, and the FP32 ones behind them
    """
    # Names, not paths: where model and data lay is nobody's business on the device.
    name, data = Path(recipe.model).name, Path(recipe.data or "").name
    report = TargetReport.model_validate(verified.json("target.json"))
    accuracy = [a.model_dump(mode="json") for a in report.accuracy]
    certificate: dict[str, Any] = {"verdict": report.verdict, "accuracy": accuracy}
    if report.level:
        certificate |= {"level": report.level, "established": report.established}
    provenance = {
        "engine": engine.digest,
        "source": source.digest,
        "data": source.manifest.config["data"],
        "recipe": recipe.model_copy(update={"model": name, "data": data}).model_dump(mode="json", by_alias=True),
        "target": target.model_dump(mode="json", by_alias=True),
        "versions": {k: v for a in (source, graph, quantized, engine) for k, v in a.manifest.versions.items()},
    }

    def make(out: Path) -> None:
        log(f"package {recipe.model} for {target.name}")
        program = engine.json("program.json")
        _, samples = split(recipe, lambda: program)
        files = {n: (engine.path / n).read_bytes() for n in engine.manifest.files if n != "program.json"}
        session = simulation(engine, target) if target.dialect == "tensorrt" else open_directory(engine.path)
        files |= golden(samples[:GOLDEN], session)
        files["check.npz"] = (source.path / "reference.npz").read_bytes()
        if program["backend"] == "tensorrt" and target.compile == "on-device":
            files |= device_files(engine, graph, samples, recipe, target)
            for beside in BESIDE:
                (out / Path(beside).name).write_bytes(files[beside])
        manifest = {
            "version": recipe.version,
            "model": name,
            "target": target.name,
            "program": program,
            "certificate": certificate,
            "provenance": provenance | {"versions": provenance["versions"] | deflater(files)},
        }
        files["bom.cdx.json"] = bill_of_materials(manifest, files)
        (out / "model.edgemm").write_bytes(write_bundle(manifest, files))

    # Parents are what the bundle is made of, not the timed report: same verdict, same bytes.
    return build(
        "bundle",
        runs,
        parents=[engine, source],
        config={"certificate": certificate, "provenance": provenance, "zlib": zlib.ZLIB_RUNTIME_VERSION},
        make=make,
    )


def deflater(files: Mapping[str, bytes]) -> dict[str, str]:
    """The version of zlib, where a bundle of these files has bytes that it makes: who rebuilds it needs the same."""
    return {"zlib": zlib.ZLIB_RUNTIME_VERSION} if any(deflatable(content) for content in files.values()) else {}


def golden(samples: list[Sample], session: Session) -> dict[str, bytes]:
    """golden/inputs.json, the media and tensors that it names, and golden/expected.npz: "<i>.<output>" of sample i."""
    files: dict[str, bytes] = {}
    expected: dict[str, Array] = {}
    cases = []
    for i, sample in enumerate(samples):
        case: dict[str, Any] = {} if sample.text is None else {"text": sample.text}
        for modality, medium in (("image", sample.image), ("audio", sample.audio)):
            if medium is not None:
                case[modality] = f"golden/{i}.{modality}"
                files[case[modality]] = medium if isinstance(medium, bytes) else medium.read_bytes()
        if sample.boxes is not None:
            case["boxes"] = sample.boxes
        if sample.tensors is not None:
            case["tensors"] = sorted(sample.tensors)
            for name, value in sample.tensors.items():
                files[f"golden/{i}.{name}.npy"] = array_bytes(np.save, value)
        cases.append(case)
        expected |= {f"{i}.{name}": value for name, value in session.outputs([sample.query]).items()}
    files["golden/inputs.json"] = json.dumps(cases, indent=1).encode()
    files["golden/expected.npz"] = array_bytes(np.savez, **expected)
    return files


def array_bytes(save: Callable[..., None], *args: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()
