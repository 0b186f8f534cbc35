"""Servers for tests: in this process with small graphs, or `edgemm serve` in one of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgemm.report.bom import bill_of_materials
from edgemm.runtime.bundle import write_bundle
from tests import bundles

SIZE, WIDTH, TOKENS = 8, 4, 16


def two_modalities(version: int = 1, gain: float = 1.0) -> bytes:
    """A bundle that looks at an image (8x8) and reads a text of at most 16 tokens: encoders, and a fusion of both."""
    rng = np.random.default_rng(0)
    floats = TensorProto.FLOAT
    pixels = rng.standard_normal((3 * SIZE * SIZE, WIDTH)).astype(np.float32) * 0.1
    table = rng.standard_normal((64, WIDTH)).astype(np.float32) * gain
    shape = np.array([-1, 3 * SIZE * SIZE], np.int64)
    graphs = {
        "image_encoder": (
            [("pixel_values", floats, ["batch", 3, SIZE, SIZE])],
            [("image_tokens", floats, ["batch", WIDTH])],
            [
                helper.make_node("Reshape", ["pixel_values", "shape"], ["flat"]),
                helper.make_node("MatMul", ["flat", "w"], ["image_tokens"]),
            ],
            {"w": pixels, "shape": shape},
        ),
        "text_encoder": (
            [("input_ids", TensorProto.INT64, ["batch", "tokens"]), ("mask", TensorProto.INT64, ["batch", "tokens"])],
            [("text_tokens", floats, ["batch", "tokens", WIDTH])],
            [
                helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
                helper.make_node("Cast", ["mask"], ["m"], to=floats),
                helper.make_node("Unsqueeze", ["m", "last"], ["m3"]),
                helper.make_node("Mul", ["rows", "m3"], ["text_tokens"]),
            ],
            {"table": table, "last": np.array([2], np.int64)},
        ),
        "fusion": (
            [("text_tokens", floats, ["batch", "tokens", WIDTH]), ("image_tokens", floats, ["batch", WIDTH])],
            [("logits", floats, ["batch", WIDTH])],
            [
                helper.make_node("ReduceSum", ["text_tokens", "axis"], ["read"], keepdims=0),
                helper.make_node("Add", ["read", "image_tokens"], ["logits"]),
            ],
            {"axis": np.array([1], np.int64)},
        ),
    }
    files, components = {}, []
    for name, (inputs, outputs, nodes, constants) in graphs.items():
        ports = [[helper.make_tensor_value_info(*p) for p in side] for side in (inputs, outputs)]
        values = [numpy_helper.from_array(v, n) for n, v in constants.items()]
        graph = helper.make_graph(nodes, name, *ports, values)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        files[f"{name}.onnx"] = model.SerializeToString()
        kinds = {floats: "float32", TensorProto.INT64: "int64"}
        sides = [[{"name": n, "dtype": kinds[t], "shape": s} for n, t, s in side] for side in (inputs, outputs)]
        sizes = {"batch": 16, "tokens": TOKENS}
        used = {a for side in sides for p in side for a in p["shape"] if isinstance(a, str)}
        components.append(
            {"name": name, "inputs": sides[0], "outputs": sides[1], "max_sizes": {a: sizes[a] for a in sorted(used)}}
        )
    words = {"[PAD]": 0, "[UNK]": 1, **{w: i for i, w in enumerate(("what", "color", "is", "the", "circle", "?"), 2)}}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    files["tokenizer.json"] = json.dumps(
        {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    ).encode()
    program = {
        "backend": "onnxruntime",
        "settings": {"threads": 1, "precision": "f32"},
        "components": components,
        "image": {
            "tensor": "pixel_values",
            "size": [SIZE, SIZE],
            "resample": "bilinear",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
        "text": {"ids": "input_ids", "mask": "mask", "tokenizer": "tokenizer.json", "max_tokens": TOKENS},
        "output": {"kind": "labels", "tensor": "logits", "labels": ["red", "green", "blue", "black"]},
    }
    manifest = {
        "version": version,
        "model": "looker",
        "target": "box",
        "program": program,
        "certificate": {"verdict": "PASS", "accuracy": []},
        "provenance": {
            "engine": "0" * 64,
            "source": "1" * 64,
            "data": "2" * 64,
            "recipe": bundles.RECIPE.model_copy(update={"version": version}).model_dump(mode="json", by_alias=True),
            "target": {},
            "versions": {"edgemm": "3" * 16},
        },
    }
    files["bom.cdx.json"] = bill_of_materials(manifest, files)
    return write_bundle(manifest, files)


class Server:
    """`edgemm serve` as a user runs it. `http`, `grpc`: addresses; `log`: its lines so far."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "edgemm", "serve", *map(str, arguments), "--port", "0", "--grpc-port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log: list[dict[str, Any]] = []
        self._said = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        listening = self.wait_for("listening")
        self.http, self.grpc = listening["http"], listening["grpc"]

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self._said:
                self.log.append(json.loads(line) if line.startswith("{") else {"event": line})
                self._said.notify_all()
        with self._said:
            self.log.append({"event": "ended"})
            self._said.notify_all()

    def wait_for(self, event: str, count: int = 1, timeout: float = 60) -> dict[str, Any]:
        """The `count`-th line of that event."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.log if line["event"] == event]

        with self._said:
            over = self._said.wait_for(
                lambda: len(found()) >= count or (self.log and self.log[-1]["event"] == "ended"), timeout
            )
            assert over and len(found()) >= count, f"no {event!r} in {self.log}"
            return found()[count - 1]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.stop()
