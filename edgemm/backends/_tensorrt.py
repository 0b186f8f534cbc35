"""One builder for TensorRT 10 and 11 and TensorRT-RTX: a strongly typed network from ONNX, one profile, an engine.

Precision is in the ONNX alone. The building itself is in _tensorrt_child.py.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edgemm.backends import _tensorrt_lint
from edgemm.backends._tensorrt_counts import Row, count
from edgemm.console import log
from edgemm.errors import InputError, ToolchainError
from edgemm.target import Target

Profile = Mapping[str, Mapping[str, Sequence[int]]]
ROW = re.compile(
    r"Name: .*?, LayerType: (\w+), Inputs: \[(.*?)\], (?:Constants: \[(.*?)\], )?Outputs: .*?Metadata: ?(.*)"
)
DATATYPE = re.compile(r"Datatype: (\w+)")
ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|\[ONNX Layer: |$)")


@dataclass(frozen=True, slots=True)
class Built:
    """An engine, and its layer table; None where the builder's text is not what we know how to read."""

    engine: bytes
    layers: tuple[Row, ...] | None


def check(onnx_file: Path, profile: Profile, target: Target) -> Any:
    """The linted graph of a file; InputError naming what the target's parser would refuse."""
    import onnx

    model = onnx.load(onnx_file)
    _tensorrt_lint.check(model, profile, target.opset_max, onnx_file.stem)
    return model


def compile_engine(trt: ModuleType, onnx_file: Path, out: Path, profile: Profile, target: Target) -> dict[str, Any]:
    """Write `out`/<stem>.engine, and the graph beside it; counts of what the engine computes how."""
    model = check(onnx_file, profile, target)
    content = onnx_file.read_bytes()
    built = build(trt, content, profile, target, onnx_file.stem)
    (out / onnx_file.name).write_bytes(content)
    (out / f"{onnx_file.stem}.engine").write_bytes(built.engine)
    return count(model, built.layers)


def where_it_runs() -> str:
    """Whether a CUDA device is here."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "cannot run them: no CUDA driver on this machine"
    devices = ctypes.c_int(0)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(devices)) or not devices.value:
        return "cannot run them: no CUDA device on this machine"
    return f"runs them on {devices.value} CUDA device(s)"


def build(trt: ModuleType, content: bytes, profile: Profile, target: Target, where: str) -> Built:
    """Build one engine of the ONNX graph `content`, the same bytes each time.

    Raises InputError with the parser's words when it refuses the graph, ToolchainError when no engine comes out.
    """
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise ToolchainError(
            f"TensorRT {trt.__version__} has no strongly typed networks", fix="install TensorRT 10 or newer"
        )
    result, engine = _in_a_child(trt.__name__, content, profile, target)
    if result["refused"]:
        node, words = result["refused"][0]
        raise InputError(
            f"{where}: TensorRT {trt.__version__} refuses node {node!r}: {words}",
            fix="export the graph without it; `keep_float` in the recipe's quantizer keeps an operator in float",
        )
    if not engine:
        reason = (result["errors"] or ["it does not say why"])[-1]
        raise ToolchainError(
            f"{where}: TensorRT {trt.__version__} built no engine: {reason}",
            fix="raise memory_mb or narrow shapes in the target",
        )
    return Built(engine, layer_table(result["table"]))


def _in_a_child(library: str, content: bytes, profile: Profile, target: Target) -> tuple[dict[str, Any], bytes]:
    """_tensorrt_child.py's answer, and the engine; no bytes where there is none."""
    request = {"library": library, "profile": profile, "sm": target.sm, "workspace_mb": target.memory_mb}
    head = json.dumps(request, sort_keys=True).encode() + b"\n"
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("_tensorrt_child.py"))],
        input=head + content,
        capture_output=True,
        env={},
        cwd="/",
        check=False,
    )
    line, _, engine = done.stdout.partition(b"\n")
    if done.returncode or not line:
        words = done.stderr.decode(errors="replace").strip()[-2000:]
        how = "was killed" if done.returncode < 0 else f"ended with {done.returncode}"
        return {"refused": [], "errors": [f"the builder {how}: {words}"], "table": []}, b""
    result = json.loads(line)
    if not result["fixed"]:
        log("this system keeps address randomization on: internal names in engines may differ from run to run")
    return result, engine


def layer_table(lines: Iterable[str]) -> tuple[Row, ...] | None:
    """The engine's layers from the builder's verbose text, an undocumented one; None when it reads otherwise."""
    rows = [line for line in lines if ", LayerType: " in line]
    found = [ROW.fullmatch(row) for row in rows]
    if not found or None in found:
        return None
    return tuple(
        Row(
            match[1],
            frozenset(DATATYPE.findall(match[2])),
            frozenset(DATATYPE.findall(match[3] or "")),
            frozenset(ONNX_LAYER.findall(match[4])),
        )
        for match in found
        if match
    )
