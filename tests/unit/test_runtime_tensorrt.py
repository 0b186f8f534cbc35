"""Running an engine: addresses, shapes and copies, against a CUDA driver and a TensorRT made of numpy."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemm.errors import InputError, ToolchainError
from edgemm.runtime import _tensorrt, tensorrt_rtx
from edgemm.runtime.component import Component

FILES = {"twice.fp16.engine": b"an engine"}
COMPONENT = {
    "name": "twice",
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 3]}],
}


class Memory:
    """Cuda, with host memory for the device's."""

    stream = 7

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.waited = 0
        self.threads: set[int] = set()

    def use(self) -> None:
        self.threads.add(threading.get_ident())

    def allocate(self, size_bytes: int) -> int:
        assert threading.get_ident() in self.threads, "CUDA has a context for each thread"
        block = ctypes.create_string_buffer(size_bytes)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, address: int, array: NDArray[Any]) -> None:
        assert array.nbytes <= len(self.blocks[address])
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: NDArray[Any], address: int) -> None:
        assert self.waited, "before the stream is done there is nothing to read"
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def wait(self) -> None:
        self.waited += 1


class Context:
    """y = 2 x, for at most 4 rows."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.works = True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return name == "x" and shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == Memory.stream
        size = int(np.prod(self.shape))
        x, y = (
            np.ctypeslib.as_array(ctypes.cast(self.addresses[n], ctypes.POINTER(ctypes.c_float)), (size,)) for n in "xy"
        )
        y[:] = 2 * x
        return self.works


def fake(context: Context | None) -> Any:
    """A `tensorrt` whose engine has this context; without one the engine can't be loaded."""

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            pass

    engine = context and SimpleNamespace(create_execution_context=lambda: context)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: engine)
    return SimpleNamespace(__version__="10.3", Logger=Logger, Runtime=lambda logger: runtime)


def test_inputs_go_in_and_outputs_come_back_for_growing_and_shrinking_batches() -> None:
    memory = Memory()
    call = _tensorrt.load(fake(Context()), FILES, COMPONENT, memory)  # type: ignore[arg-type]
    kept = []
    for rows in (1, 4, 2):
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        kept.append((call({"x": x, "unused": x})["y"], 2 * x))
    for got, expected in kept:  # an output is the caller's own, not overwritten by the next call
        np.testing.assert_array_equal(got, expected)
    assert len(memory.blocks) == 2


def test_each_thread_has_an_execution_context_and_the_cuda_context() -> None:
    memory, library, contexts = Memory(), fake(Context()), []

    def load(spec: dict[str, Any]) -> _tensorrt.Engine:
        loaded = _tensorrt.load(library, FILES, spec, memory)  # type: ignore[arg-type]
        loaded.engine.create_execution_context = lambda: contexts.append(Context()) or contexts[-1]
        return loaded

    component = Component(COMPONENT, load)
    xs = [np.full((1 + i % 4, 3), i, np.float32) for i in range(64)]
    with component.call(), component.call(), ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda x: component({"x": x})["y"], xs))
    assert all(np.array_equal(y, 2 * x) for x, y in zip(xs, made, strict=True))
    assert 2 <= len(contexts) <= 5


def test_what_is_no_array_in_a_row_is_made_one() -> None:
    call = _tensorrt.load(fake(Context()), FILES, COMPONENT, Memory())  # type: ignore[arg-type]
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T
    np.testing.assert_array_equal(call({"x": x})["y"], 2 * x)


def test_an_engine_of_another_gpu_an_input_outside_the_profile_and_a_failed_run_are_named() -> None:
    with pytest.raises(ToolchainError, match=r"TensorRT 10.3 cannot load twice.engine\n  fix: run edgemm compress"):
        _tensorrt.load(fake(None), FILES, COMPONENT, Memory())  # type: ignore[arg-type]
    context = Context()
    call = _tensorrt.load(fake(context), FILES, COMPONENT, Memory())  # type: ignore[arg-type]
    with pytest.raises(ToolchainError, match=r"twice: x \[5, 3\] is outside the engine's profile"):
        call({"x": np.zeros((5, 3), np.float32)})
    context.works = False
    with pytest.raises(ToolchainError, match="failed to run twice"):
        call({"x": np.zeros((1, 3), np.float32)})


def test_int8_is_taken_before_fp16_and_a_bundle_without_engines_says_where_they_are_built() -> None:
    files = {"a.fp16.engine": b"16", "a.int8.engine": b"8", "b.fp16.engine": b"16"}
    assert _tensorrt.engine_of(files, "a") == b"8"
    assert _tensorrt.engine_of(files, "b") == b"16"
    with pytest.raises(InputError, match=r"no engine of c: it is built on the device\n  fix: run device_runner.py"):
        _tensorrt.engine_of({"c.int8.onnx": b""}, "c")


def test_without_a_cuda_driver_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'edgemm[tensorrt-rtx]'")

    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(ToolchainError, match="there is no CUDA driver on this machine"):
        tensorrt_rtx.compile_component({"twice.int8.engine": b""}, COMPONENT, {})
