"""A bundle's check, repeated on the machine that it is for: no torch, no toolchain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from edgemm import plugins
from edgemm.console import log
from edgemm.data import check_data, is_random, split
from edgemm.errors import InputError, ToolchainError
from edgemm.parity import judge, read_reference
from edgemm.recipe import Recipe
from edgemm.report.schema import Accuracy, BundleFile, Gate, TargetReport
from edgemm.runtime.bundle import Bundle, read_bundle
from edgemm.runtime.golden import TOLERANCE, golden_error
from edgemm.runtime.session import Session
from edgemm.target import Target
from edgemm.verdict import accuracy_gates, at_most, worst


def verify_bundle(bundle: Path, data: str | None = None) -> TargetReport:
    """Repeat a bundle's check on this machine: golden outputs, then accuracy against the FP32 outputs inside.

    data   another place of the data that the bundle was verified on; it must have the same samples
    Raises InputError when the samples here are not those that the FP32 outputs belong to, ToolchainError when only
    a device can tell: device_report.py judges what it says.
    """
    content = read_bundle(bundle)
    if "device/spec.json" in content.files:
        raise ToolchainError(
            f"the engines of {bundle} are built and checked on the device",
            fix="run device_runner.py there, then edgemm verify BUNDLE --device-report device-report.json",
        )
    session = Session(content.files, content.manifest["program"], str(bundle), sha256=content.sha256)
    recipe, target = origin(content, bundle)
    if data is not None:
        recipe = recipe.model_copy(update={"data": data})
    try:
        check_data(recipe)
    except InputError as e:
        if data is not None:
            raise
        raise InputError(f"{bundle} was verified on {recipe.data!r}, which is not here", fix="--data FILE") from e
    gates = [golden_gate(session, content.files, str(bundle))]
    notes = ["latency, memory and size are not measured: a bundle does not carry the FP32 graph"]
    accuracy: tuple[Accuracy, ...] = ()
    if is_random(recipe):
        notes.append(f"accuracy is not measured: {recipe.data} is noise")
    else:
        _, samples = split(recipe, lambda: session.program)
        reference = read_reference(content.files["check.npz"])
        if [(s.id, s.group) for s in samples] != list(zip(reference.ids, reference.groups, strict=True)):
            raise InputError(
                f"{recipe.data} is not the data that {bundle} was verified on",
                fix="leave out --data, or give that data",
            )
        log(f"verify {target.name}: accuracy on {len(samples)} samples")
        accuracy = judge(session.outputs([s.query for s in samples]), reference, session.program, recipe)
    gates += accuracy_gates(accuracy, recipe)
    return TargetReport(
        name=target.name,
        verdict=worst([g.verdict for g in gates]),
        accuracy=accuracy,
        gates=tuple(gates),
        bundle=BundleFile(path=str(bundle), sha256=content.sha256),
        notes=tuple(notes),
    )


def origin(bundle: Bundle, path: Path) -> tuple[Recipe, Target]:
    """The recipe and the target that a bundle was made with."""
    found = bundle.manifest["provenance"]
    recipe = plugins.validate(Recipe, found.get("recipe"), f"{path}: provenance.recipe")
    return recipe, plugins.validate(Target, found.get("target"), f"{path}: provenance.target")


def golden_gate(session: Session, files: Mapping[str, bytes], where: str) -> Gate:
    error = golden_error(session, files, where)
    return Gate(
        name="golden outputs",
        value=error if math.isfinite(error) else None,
        limit=TOLERANCE,
        unit="relative",
        verdict=at_most(error, TOLERANCE),
        detail="largest difference to the outputs on the machine that packed the bundle",
    )
