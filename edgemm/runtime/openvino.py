"""OpenVINO IR on the CPU: one compiled component."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError, ToolchainError
from edgemm.runtime import cache

Tensors = Mapping[str, Any]
SMALL = 65_536  # bytes that are copied sooner than handed over, 10 us


def compile_component(files: Mapping[str, bytes], component: dict[str, Any], settings: dict[str, Any]) -> Engine:
    """Compile `component` from its .xml and .bin.

    component  its inputs' shapes are what it is compiled for
    settings   threads; precision: INFERENCE_PRECISION_HINT of the float parts, unless the component has one. The CPU
               plugin picks bf16 by itself, so it is always set. cache: keep what was compiled; see cache.py
               streams: calls that run at the same time, each on its share of the threads
    """
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    core = ov.Core()
    xml, weights = (files[f"{component['name']}.{suffix}"] for suffix in ("xml", "bin"))
    shapes = {p["name"]: [axis if isinstance(axis, int) else -1 for axis in p["shape"]] for p in component["inputs"]}
    streams = settings.get("streams", 1)
    threads = (component.get("threads") or settings["threads"]) * streams
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": component.get("precision") or settings["precision"],
        "INFERENCE_NUM_THREADS": min(settings["threads"], threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    if streams > 1:
        # Pinned, the streams of two components would share a core.
        options |= {"NUM_STREAMS": streams, "ENABLE_CPU_PINNING": False}
    if b'type="Assign"' in xml:
        # A decoder's time is that of reading its weights: quantizing one token's activations only costs.
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    key = cache.key_of(xml, weights, sorted(options.items()), sorted(shapes.items()), ov.get_version(), *_device(core))
    compiled = None
    if settings.get("cache"):
        compiled = cache.kept(key, lambda blob: core.import_model(blob, "CPU", options), RuntimeError)
    if compiled is None:
        try:
            model = core.read_model(xml, ov.Tensor(np.frombuffer(weights, np.uint8)))
        except RuntimeError as e:
            what = f"{component['name']}: OpenVINO can't load it: {' '.join(str(e).split())}"[:500]
            raise InputError(what, fix="run edgemm compress again, or pip install --upgrade openvino") from e
        given = {name for port in model.inputs for name in port.get_names()}  # what the graph keeps is no input
        shapes = {name: shape for name, shape in shapes.items() if name in given}
        try:
            if any(model.input(name).partial_shape != ov.PartialShape(shape) for name, shape in shapes.items()):
                model.reshape(shapes)
        except RuntimeError as e:
            what = f"{component['name']}: its inputs can't be {shapes}: {' '.join(str(e).split())}"[:500]
            raise InputError(what, fix="run edgemm compress again") from e
        compiled = core.compile_model(model, "CPU", options)
        if settings.get("cache"):
            cache.keep(key, compiled.export_model().getvalue())
    return Engine(compiled, component, ov.Tensor, handed_over=streams > 1)


def _device(core: Any) -> tuple[str, ...]:
    """What code for this CPU depends on: its name, and the instructions that the kernel lets it use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return core.get_property("CPU", "FULL_DEVICE_NAME"), ",".join(capabilities), flags


class Engine:
    """One request of a compiled graph: named inputs to named outputs, for one thread at a time.

    The returned arrays are its own buffers, valid until its next call; an array that it is given again is not read
    again. What the graph keeps from call to call (a decoder's cache) is returned as a Kept.
    """

    def __init__(self, compiled: Any, component: dict[str, Any], tensor: Any, *, handed_over: bool = False) -> None:
        self.compiled, self.component, self.tensor, self.handed_over = compiled, component, tensor, handed_over
        self.request = compiled.create_infer_request()
        self.inputs, outputs = ([port["name"] for port in component[side]] for side in ("inputs", "outputs"))
        states = {state.name: state for state in self.request.query_state()}
        self.kept = {i: (o, Kept(states[i + o])) for i in self.inputs for o in outputs if i + o in states}
        self.computed = [name for name in outputs if name not in {o for o, _ in self.kept.values()}]
        self.bound: dict[str, tuple[Any, NDArray[Any]]] = {}  # what was given, and the memory that the engine reads
        self.own: dict[str, NDArray[Any]] = {}  # of that, what nobody else reads
        # In the calling thread, unless there are several streams: handing a call over takes as long as a small graph.
        self.run = self._hand_over if handed_over else partial(self.request.infer, share_outputs=True)

    def __call__(self, tensors: Tensors) -> dict[str, Any]:
        for name in self.inputs:
            value = tensors[name]
            if name in self.kept:
                if value is not self.kept[name][1]:
                    self.kept[name][1].state.state = self.tensor(np.ascontiguousarray(value))
            elif name not in self.bound or value is not self.bound[name][0]:
                self._bind(name, value)
        self.run()
        computed = {name: self.request.get_tensor(name).data for name in self.computed}
        return computed | dict(self.kept.values())

    def _hand_over(self) -> None:
        self.request.start_async()
        self.request.wait()

    def _bind(self, name: str, value: NDArray[Any]) -> None:
        """Let the graph read `value`: of a small one a copy, in the memory that it reads already."""
        held = self.own.get(name)
        if held is not None and held.shape == value.shape and held.dtype == value.dtype:
            np.copyto(held, value)
        else:
            small = value.nbytes <= SMALL
            # A view may be one of this engine's own buffers, which it writes to.
            copied = small or value.base is not None
            held = np.array(value, order="C") if copied else np.ascontiguousarray(value)
            self.request.set_tensor(name, self.tensor(held, shared_memory=True))
            self.own.pop(name, None)
            if small:
                self.own[name] = held
        self.bound[name] = value, held

    def another(self) -> Engine:
        return Engine(self.compiled, self.component, self.tensor, handed_over=self.handed_over)


class Kept:
    """A tensor that stays in the engine: handed back in the next call it costs nothing; numpy can read it."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.state.state.data, dtype)

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        return np.asarray(self)[rows]
