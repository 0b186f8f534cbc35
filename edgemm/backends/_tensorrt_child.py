"""Builds one engine in a process of its own: its result then depends on nothing but what stdin says.

TensorRT-RTX orders some internal names by their addresses, so address randomization is switched off first, and
nothing that differs between two runs may be allocated here. Run by path; imports no edgemm.

stdin   one line of JSON: library, profile, sm, workspace_mb; then the ONNX graph
stdout  one line of JSON: refused ([node, the parser's words]), errors, table (layers of the engine), fixed (whether
        addresses were); then the engine
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from typing import Any

ADDR_NO_RANDOMIZE, ASK = 0x0040000, 0xFFFFFFFF  # personality(2)


def main() -> None:
    personality = ctypes.CDLL(None).personality
    fixed = bool(personality(ctypes.c_ulong(ASK)) & ADDR_NO_RANDOMIZE)
    if not fixed and personality(ctypes.c_ulong(ADDR_NO_RANDOMIZE)) != -1:
        os.execv(sys.executable, [sys.executable, "-I", __file__])  # in force from the next program on
    channel = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no result
    request = json.loads(sys.stdin.buffer.readline())
    result, engine = build(importlib.import_module(request["library"]), request, sys.stdin.buffer.read())
    with os.fdopen(channel, "wb") as out:
        out.write(json.dumps({**result, "fixed": fixed}).encode() + b"\n" + engine)


def build(trt: Any, request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    """Parse and build; what a version of the library has is looked for, never told from its number."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.table: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(text)
            elif ", LayerType: " in text:
                self.table += text.split("\n")

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return {"refused": [(e.node_name(), e.desc()) for e in errors], "errors": logger.errors, "table": []}, b""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names each layer's ONNX nodes
    if request["workspace_mb"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mb"] << 20)
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = len(request["sm"])
        for i, sm in enumerate(request["sm"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    shapes = builder.create_optimization_profile()
    for name, sizes in request["profile"].items():
        shapes.set_shape(name, tuple(sizes["min"]), tuple(sizes["opt"]), tuple(sizes["max"]))
    config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    result = {"refused": [], "errors": logger.errors, "table": logger.table}
    return result, b"" if engine is None else bytes(engine)


if __name__ == "__main__":
    main()
