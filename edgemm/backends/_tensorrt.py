"""One builder for TensorRT 10 and 11 and TensorRT-RTX: a strongly typed network from ONNX, one profile, an engine.

Precision is in the ONNX alone. What a version has is looked for, never told from its number.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edgemm.backends import _tensorrt_lint
from edgemm.backends._tensorrt_counts import Row, count
from edgemm.errors import InputError, ToolchainError
from edgemm.target import Target

Profile = Mapping[str, Mapping[str, Sequence[int]]]
ROW = re.compile(r"Name: .*?, LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: .*?Metadata: ?(.*)")
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
    """Build one engine of the ONNX graph `content`.

    Raises InputError with the parser's words when it refuses the graph, ToolchainError when no engine comes out.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if flag is None:
        raise ToolchainError(
            f"TensorRT {trt.__version__} has no strongly typed networks", fix="install TensorRT 10 or newer"
        )
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(flag))
    _parse(trt, network, logger, content, where)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names each layer's ONNX nodes
    if target.memory_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.memory_mb << 20)
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = len(target.sm)
        for i, sm in enumerate(target.sm):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    shapes = builder.create_optimization_profile()
    for name, sizes in profile.items():
        shapes.set_shape(name, tuple(sizes["min"]), tuple(sizes["opt"]), tuple(sizes["max"]))
    config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        errors = [text for error, text in logger.lines if error]
        raise ToolchainError(
            f"{where}: TensorRT {trt.__version__} built no engine: {errors[-1] if errors else 'it does not say why'}",
            fix="raise memory_mb or narrow shapes in the target",
        )
    return Built(bytes(engine), layer_table(text for _, text in logger.lines))


def parse_errors(trt: ModuleType, content: bytes) -> list[tuple[str, str]]:
    """(node, the parser's words) for each thing that the real parser refuses in a graph; nothing is built."""
    builder = trt.Builder(logger := _logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return _errors(trt.OnnxParser(network, logger), content)


def _errors(parser: Any, content: bytes) -> list[tuple[str, str]]:
    if parser.parse(content):
        return []
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return [(e.node_name(), e.desc()) for e in errors]


def _parse(trt: ModuleType, network: Any, logger: Any, content: bytes, where: str) -> None:
    parser = trt.OnnxParser(network, logger)
    if errors := _errors(parser, content):
        node, words = errors[0]
        raise InputError(
            f"{where}: TensorRT {trt.__version__} refuses node {node!r}: {words}",
            fix="export the graph without it; `keep_float` in the recipe's quantizer keeps an operator in float",
        )


def _logger(trt: ModuleType) -> Any:
    """Collects (is an error, text) of all that the builder says, the layer table among it."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[bool, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR), text))

    return Logger()


def layer_table(lines: Iterable[str]) -> tuple[Row, ...] | None:
    """The engine's layers from the builder's verbose text, an undocumented one; None when it reads otherwise."""
    rows = [line for text in lines for line in text.split("\n") if ", LayerType: " in line]
    found = [ROW.fullmatch(row) for row in rows]
    if not found or None in found:
        return None
    return tuple(
        Row(
            match[1],
            frozenset(DATATYPE.findall(match[2])),
            frozenset(DATATYPE.findall(match[3])),
            frozenset(ONNX_LAYER.findall(match[4])),
        )
        for match in found
        if match
    )
