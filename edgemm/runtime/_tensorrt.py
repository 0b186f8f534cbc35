"""One TensorRT engine on a CUDA device, of TensorRT 10, 11 or RTX; needs no library but theirs and the driver's."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError, ToolchainError

Tensors = Mapping[str, NDArray[Any]]
FOREIGN = "run edgemm compress again for this GPU and this version of TensorRT"


class Cuda:
    """What of the CUDA driver's API an engine needs; https://docs.nvidia.com/cuda/cuda-driver-api/."""

    def __init__(self) -> None:
        try:
            self.driver = ctypes.CDLL("libcuda.so.1")
        except OSError as e:
            raise ToolchainError(
                "there is no CUDA driver on this machine", fix="run the bundle on a machine with an NVIDIA GPU"
            ) from e
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.context = context
        self.use()
        self.call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream = int(stream.value or 0)

    def call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self.driver, name)(*arguments):
            raise ToolchainError(f"CUDA: {name} failed with code {code}", fix="look at nvidia-smi; free GPU memory")

    def use(self) -> None:
        """Make the device that of the thread which calls this: each thread has to."""
        self.call("cuCtxSetCurrent", self.context)

    def allocate(self, size_bytes: int) -> int:
        """Device memory, kept until the process ends or `free`."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: NDArray[Any]) -> None:
        pointer = ctypes.c_void_p(array.ctypes.data)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), pointer, ctypes.c_size_t(array.nbytes))

    def download(self, array: NDArray[Any], address: int) -> None:
        pointer = ctypes.c_void_p(array.ctypes.data)
        self.call("cuMemcpyDtoH_v2", pointer, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def wait(self) -> None:
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))


def load(trt: ModuleType, files: Mapping[str, bytes], component: dict[str, Any], cuda: Cuda) -> Engine:
    """A component's engine on the first CUDA device.

    component   its entry in program.json
    Raises ToolchainError for an engine of another GPU or version.
    """
    engine_bytes = engine_of(files, component["name"])
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(engine_bytes)
    if engine is None:
        raise ToolchainError(f"TensorRT {trt.__version__} cannot load {component['name']}.engine", fix=FOREIGN)
    return Engine(engine, component, cuda, trt.__version__)


class Engine:
    """One execution context of an engine: named inputs to named outputs, for one thread at a time.

    Raises ToolchainError for inputs outside its profile.
    """

    def __init__(self, engine: Any, component: dict[str, Any], cuda: Cuda, version: str) -> None:
        self.engine, self.component, self.cuda, self.version = engine, component, cuda, version
        cuda.use()
        self.context = engine.create_execution_context()
        self.buffers: dict[str, tuple[int, int]] = {}

    def __call__(self, tensors: Tensors) -> dict[str, NDArray[Any]]:
        name = self.component["name"]
        self.cuda.use()
        for port in self.component["inputs"]:
            array = np.ascontiguousarray(tensors[port["name"]])
            if not self.context.set_input_shape(port["name"], array.shape):
                what = f"{name}: {port['name']} {list(array.shape)} is outside the engine's profile"
                raise ToolchainError(what, fix="widen `shapes` in the target and compress again")
            self.cuda.upload(self._place(port["name"], array), array)
        outputs = {}
        for port in self.component["outputs"]:
            outputs[port["name"]] = np.empty(tuple(self.context.get_tensor_shape(port["name"])), port["dtype"])
            self._place(port["name"], outputs[port["name"]])
        if not self.context.execute_async_v3(self.cuda.stream):
            raise ToolchainError(f"TensorRT {self.version} failed to run {name}", fix=FOREIGN)
        self.cuda.wait()
        for output, array in outputs.items():
            self.cuda.download(array, self.buffers[output][0])
        return outputs

    def another(self) -> Engine:
        return Engine(self.engine, self.component, self.cuda, self.version)

    def _place(self, name: str, array: NDArray[Any]) -> int:
        """Device memory for `array`, the same as before while it is large enough."""
        address, room = self.buffers.get(name, (0, 0))
        if room < array.nbytes:
            if room:
                self.cuda.free(address)
            address, room = self.cuda.allocate(max(1, array.nbytes)), max(1, array.nbytes)
            self.buffers[name] = address, room
        self.context.set_tensor_address(name, address)
        return address


def engine_of(files: Mapping[str, bytes], name: str) -> bytes:
    """The engine of a component: INT8 where there is one, else FP16. InputError where it was left to the device."""
    for precision in ("int8", "fp16"):
        if f"{name}.{precision}.engine" in files:
            return files[f"{name}.{precision}.engine"]
    raise InputError(
        f"the bundle holds no engine of {name}: it is built on the device", fix="run device_runner.py there"
    )
