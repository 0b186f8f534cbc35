"""What a bundle carries to a device that builds its own engines: how to build, check and judge them there.

device/spec.json       for each component: `profiles`; `candidates`, each with its graph, the SQNR that ONNX Runtime
                       measured on it against the FP32 graph and the SQNR that the engine must reach, dB; `ranges`,
                       the calibrated [low, high] of each tensor that is quantized. For the whole: `gates`, `rounds`
                       of timing, `decoder` (its name, or null), `fp32_bytes` of the unquantized graphs,
                       `sm`, `workspace_mb` (MiB of scratch memory a layer may take), `sparsity` and `power_mode` of
                       the target
device/reference.npz   <component>/<i>/in/<tensor>, <component>/<i>/out/<tensor>: what the FP32 graph met and made
device/trtexec.sh      the same builds with NVIDIA's own tool
device_runner.py       builds, checks and measures; see device/device_runner.py
"""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from edgemm.artifact import Artifact
from edgemm.data import Sample
from edgemm.device import device_runner
from edgemm.errors import InputError
from edgemm.recipe import Recipe
from edgemm.runtime.onnxruntime import compile_component
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import Session, open_directory
from edgemm.target import Target

RUNNER, TRTEXEC = "device_runner.py", "device/trtexec.sh"
CASES = 8
STEPS = 4  # calls of a decoder that are kept of one sample
CASE_BYTES = 32 << 20  # of one component; the first case is kept whatever its size
SLACK_DB = 6.0  # an engine may have twice the simulation's error: its kernels round in other places
ENOUGH_DB = 40.0  # 1 % of the signal: no engine has to be better than this
ZEROS_DB = 1.0  # an output of zeros has 0 dB
Case = tuple[Tensors, Tensors]


def device_files(
    engine: Artifact, graph: Artifact, samples: Sequence[Sample], recipe: Recipe, target: Target
) -> dict[str, bytes]:
    """Name -> content of what the bundle of `engine` needs beside the engine's own files.

    engine   <component>.fp16.onnx and <component>.int8.onnx, program.json with `profiles`
    graph    the FP32 graphs that they were made of
    Raises InputError when no sample fits the profiles, or a graph gives NaN.
    """
    program = engine.json("program.json")
    session = open_directory(graph.path)
    cases = reference_cases(session, program["profiles"], samples)
    spec = {
        "schema": 1,
        "components": {
            component["name"]: component_spec(engine.path, component, program, cases[component["name"]])
            for component in program["components"]
        },
        "sm": target.sm,
        "workspace_mb": target.memory_mb,
        "sparsity": target.sparsity,
        "power_mode": target.power_mode,
        "gates": {"max_p50_ms": target.budgets.max_p50_ms, "max_peak_mb": target.budgets.max_peak_mb},
        "rounds": recipe.verify.rounds,
        "decoder": session.decoder,
        "fp32_bytes": sum((graph.path / f"{c['name']}.onnx").stat().st_size for c in program["components"]),
    }
    stored = BytesIO()
    np.savez(stored, **reference_arrays(cases))
    return {
        "device/spec.json": json.dumps(spec, indent=1).encode(),
        "device/reference.npz": stored.getvalue(),
        TRTEXEC: trtexec_script(spec).encode(),
        RUNNER: Path(device_runner.__file__).read_bytes(),
    }


def reference_cases(
    session: Session, profiles: Mapping[str, Mapping[str, Any]], samples: Sequence[Sample]
) -> dict[str, list[Case]]:
    """What each component of the FP32 model meets on `samples`, and what it makes of it; inputs outside the
    component's profile are left out."""
    found: dict[str, list[Case]] = {name: [] for name in session.components}
    for sample in samples[:CASES]:
        met: dict[str, list[Tensors]] = defaultdict(list)
        session.observe = lambda name, tensors, met=met: met[name].append(dict(tensors))
        session.complete(session.tensors(sample.query), sample.text)
        for name, calls in met.items():
            fitting = [c for c in calls if fits(c, profiles.get(name, {}))]
            for inputs in fitting[:: max(1, len(fitting) // STEPS)]:
                found[name].append((inputs, session.components[name](inputs)))
    session.observe = None
    for name, cases in found.items():
        if not cases:
            raise InputError(
                f"no input that {name} meets in {CASES} verification samples fits its profile: {profiles.get(name)}",
                fix="widen the target's shapes, or give data of that size",
            )
        size = max(sum(v.nbytes for part in case for v in part.values()) for case in cases)
        most = min(CASES, max(1, CASE_BYTES // size))
        found[name] = cases[:: max(1, len(cases) // most)][:most]
    return found


def fits(tensors: Tensors, profile: Mapping[str, Any]) -> bool:
    """Whether the shape of every tensor lies within the profile."""
    return all(
        low <= size <= high
        for name, shapes in profile.items()
        for low, size, high in zip(shapes["min"], tensors[name].shape, shapes["max"], strict=True)
    )


def component_spec(folder: Path, component: dict[str, Any], program: dict[str, Any], cases: list[Case]) -> Any:
    """One entry of spec.json's `components`; an engine must come near to what ONNX Runtime makes of its graph."""
    name = component["name"]
    candidates = {}
    for precision in device_runner.PRECISIONS:
        file = folder / f"{name}.{precision}.onnx"
        if not file.is_file():
            continue
        settings = {"threads": program["settings"]["threads"], "qdq": "as written"}
        call = compile_component({f"{name}.onnx": file.read_bytes()}, component, settings)
        simulated = device_runner.check(call, cases)
        if missing := [output for output, db in simulated.items() if db is None]:
            raise InputError(
                f"{file.name} gives NaN or infinity in {missing[0]}", fix="keep the component in FP32, or quantize less"
            )
        limits = {o: max(ZEROS_DB, min(ENOUGH_DB, db - SLACK_DB)) for o, db in simulated.items() if db is not None}
        candidates[precision] = {"onnx": file.name, "simulated_sqnr_db": simulated, "min_sqnr_db": limits}
    assert candidates, f"the engine has no graph of {name}"
    spec = {"profiles": program["profiles"].get(name, {}), "candidates": candidates}
    return spec | ({"ranges": calibration_ranges(folder / f"{name}.int8.onnx")} if "int8" in candidates else {})


def calibration_ranges(path: Path) -> dict[str, tuple[float, float]]:
    """Tensor -> [low, high] that its QuantizeLinear represents, of each with one constant int8 scale."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    constants = {i.name: i for i in graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    found = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants and node.input[1] in constants:
            scale = numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
            if scale.size == 1:  # zero point 0: TensorRT takes no other
                found[node.input[0]] = (-128 * scale.item(), 127 * scale.item())
    return found


def reference_arrays(cases: Mapping[str, list[Case]]) -> dict[str, Any]:
    return {
        f"{name}/{i}/{way}/{tensor}": value
        for name, rows in cases.items()
        for i, case in enumerate(rows)
        for way, tensors in zip(("in", "out"), case, strict=True)
        for tensor, value in tensors.items()
    }


def trtexec_script(spec: Mapping[str, Any]) -> str:
    """A shell script of one trtexec line for each component and candidate."""
    lines = [
        "#!/bin/sh",
        "# The builds of device_runner.py with NVIDIA's trtexec: sh trtexec.sh BUNDLE.edgemm",
        'set -e; python3 -m zipfile -e "$1" .',
    ]
    workspace = [f"--memPoolSize=workspace:{spec['workspace_mb']}"] if spec["workspace_mb"] else []
    sparse = ["--sparsity=enable"] if spec["sparsity"] else []
    for name, component in spec["components"].items():
        shapes = []
        for which in ("min", "opt", "max") if component["profiles"] else ():
            sizes = [f"{tensor}:{'x'.join(map(str, s[which]))}" for tensor, s in component["profiles"].items()]
            shapes.append(f"--{which}Shapes={','.join(sizes)}")
        for precision, candidate in component["candidates"].items():
            options = [f"--onnx={candidate['onnx']}", "--stronglyTyped", *shapes, *workspace, *sparse]
            options += ["--timingCacheFile=edgemm.timing", f"--saveEngine={name}.{precision}.engine"]
            lines.append(shlex.join(["trtexec", *options]))
    return "\n".join(lines) + "\n"
