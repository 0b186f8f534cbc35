"""Bundle schema 1 in rules of MUST and MAY, each checked by itself; the README's section on the bundle states them.

No engine is loaded and nothing of a model is run: that is what `install` and `verify` are for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edgemm.errors import InputError
from edgemm.inspection import is_bundle
from edgemm.parity import read_reference
from edgemm.plugins import validate
from edgemm.recipe import Recipe
from edgemm.report.schema import Certificate
from edgemm.runtime.bundle import Bundle, read_bundle
from edgemm.runtime.golden import read_golden
from edgemm.runtime.program import Program
from edgemm.runtime.signature import signature_of
from edgemm.target import Target
from edgemm.yaml_files import Strict

ENGINE_FILES = {"openvino": ("xml", "bin"), "onnxruntime": ("onnx",)}
TENSORRT_FILES = tuple(f"{precision}.{kind}" for precision in ("int8", "fp16") for kind in ("engine", "onnx"))
FOREIGN = "edgemm does not write such a bundle: run edgemm compress again"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Provenance(Strict):
    """What the bundle was made of and with; digests of artifacts and of the samples that it was judged on."""

    engine: Sha256
    source: Sha256
    data: Sha256
    recipe: Recipe
    target: Target
    versions: dict[str, str] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a bundle. `kept`: for MAY, whether it makes use of it; `detail` says what was found."""

    level: Literal["MUST", "MAY"]
    name: str
    kept: bool
    detail: str


def conformance(model: str) -> list[Rule]:
    """Every rule, on a bundle. Raises InputError where the layout or the manifest is no bundle's at all."""
    if not is_bundle(model):
        raise InputError(f"{model} is no .edgemm file", fix="edgemm inspect MODEL, without --strict")
    path = Path(model)
    bundle = read_bundle(path)
    size = sum(map(len, bundle.files.values()))
    rules = [Rule("MUST", "layout", True, f"{len(bundle.files)} files of {size} bytes, sha256 {bundle.sha256}")]
    rules.append(Rule("MUST", "manifest", True, f"schema {bundle.manifest['schema']}, version {bundle.version}"))
    for name, check in MUST.items():
        try:
            rules.append(Rule("MUST", name, True, check(bundle, str(path))))
        except InputError as e:
            what = str(e).partition("\n")[0].removeprefix(f"{path}: ")
            rules.append(Rule("MUST", name, False, what[:300]))
    signed = signature_of(path).is_file()
    rules.append(Rule("MAY", "signature", signed, "edgemm verify-signature checks it" if signed else "not signed"))
    for name, why in MAY.items():
        rules.append(Rule("MAY", name, name in bundle.files, why))
    return rules


def raise_broken(rules: list[Rule], model: str) -> None:
    """InputError naming the first MUST that is broken, if one is."""
    if broken := [r for r in rules if r.level == "MUST" and not r.kept]:
        raise InputError(f"{model} breaks {len(broken)} MUST: {broken[0].name}: {broken[0].detail}", fix=FOREIGN)


def _program(bundle: Bundle, where: str) -> str:
    program = validate(Program, bundle.manifest["program"], "program")
    return f"{program.backend}: {' + '.join(program.sources())} to {program.output.kind}"


def _components(bundle: Bundle, where: str) -> str:
    program = validate(Program, bundle.manifest["program"], "program")
    found = [name for c in program.components for name in _engines(bundle, program, c.name)]
    return ", ".join(found)


def _engines(bundle: Bundle, program: Program, component: str) -> list[str]:
    """The files of one component: all that its backend reads, or of TensorRT one graph or engine at least."""
    suffixes = ENGINE_FILES.get(program.backend, TENSORRT_FILES)
    files = [f"{component}.{suffix}" for suffix in suffixes]
    there = [name for name in files if name in bundle.files]
    if not there or (program.backend in ENGINE_FILES and there != files):
        raise InputError(f"{component} has not the files {', '.join(files)}", fix=FOREIGN)
    return there


def _certificate(bundle: Bundle, where: str) -> str:
    certificate = validate(Certificate, bundle.manifest["certificate"], "certificate")
    return ", ".join([certificate.verdict, *(a.metric for a in certificate.accuracy)])


def _provenance(bundle: Bundle, where: str) -> str:
    provenance = validate(Provenance, bundle.manifest["provenance"], "provenance")
    if provenance.recipe.version != bundle.version:
        raise InputError(f"the recipe has version {provenance.recipe.version}, not {bundle.version}", fix=FOREIGN)
    return f"recipe {provenance.recipe.name}, seed {provenance.recipe.seed}, data {provenance.data[:12]}"


def _golden(bundle: Bundle, where: str) -> str:
    queries, expected = read_golden(bundle.files, where)
    if missing := [i for i in range(len(queries)) if not any(name.startswith(f"{i}.") for name in expected)]:
        raise InputError(f"golden input {missing[0]} has no expected output", fix=FOREIGN)
    return f"{len(queries)} inputs, {len(expected)} outputs"


def _bom(bundle: Bundle, where: str) -> str:
    """The bill of materials names this model and these files; its schema is CycloneDX's own to check."""
    try:
        bom = json.loads(bundle.files["bom.cdx.json"])
        kind = (bom["bomFormat"], bom["specVersion"], bom["metadata"]["component"]["name"])
        rows = [c for c in bom["components"] if c["type"] == "file"]
        listed = {c["name"]: c["hashes"][0]["content"] for c in rows}
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as e:
        raise InputError(f"bom.cdx.json is no CycloneDX: {e!r}"[:200], fix=FOREIGN) from e
    if kind != ("CycloneDX", "1.6", bundle.manifest["model"]):
        raise InputError(f"bom.cdx.json is {kind}"[:200], fix=FOREIGN)
    actual = {n: hashlib.sha256(c).hexdigest() for n, c in bundle.files.items() if n != "bom.cdx.json"}
    if listed != actual:
        raise InputError("bom.cdx.json lists other files than the bundle has", fix=FOREIGN)
    return f"CycloneDX 1.6, {len(bom['components'])} components"


def _files(bundle: Bundle, where: str) -> str:
    """Nothing is inside that no part of edgemm reads, and what is optional is whole."""
    program = validate(Program, bundle.manifest["program"], "program")
    known = {name for c in program.components for name in _engines(bundle, program, c.name)}
    known |= {"bom.cdx.json", "tokenizer.json", "check.npz", "layers.json"}
    if "device/spec.json" in bundle.files:
        known |= {"device/spec.json", "device/reference.npz", "device/trtexec.sh", "device_runner.py"}
    strays = [name for name in bundle.files if name not in known and not name.startswith("golden/")]
    if strays:
        raise InputError(f"nothing reads {strays[0]!r}", fix=FOREIGN)
    needs_tokenizer = program.text is not None or hasattr(program.output, "tokenizer")
    if needs_tokenizer and "tokenizer.json" not in bundle.files:
        raise InputError("texts need tokenizer.json", fix=FOREIGN)
    if "check.npz" in bundle.files:
        read_reference(bundle.files["check.npz"])
    return "each is read by something"


MUST: dict[str, Callable[[Bundle, str], str]] = {
    "program": _program,
    "components": _components,
    "certificate": _certificate,
    "provenance": _provenance,
    "golden": _golden,
    "bill of materials": _bom,
    "files": _files,
}
MAY: dict[str, str] = {
    "check.npz": "the FP32 model's outputs, with which edgemm verify repeats the proof",
    "device/spec.json": "engines are built on the device, by device_runner.py",
}
