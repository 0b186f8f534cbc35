"""One TensorRT engine on a CUDA device, of TensorRT 10, 11 or RTX; needs no library but theirs and the driver's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError, ToolchainError

Tensors = Mapping[str, NDArray[Any]]
Call = Callable[[Tensors], dict[str, NDArray[Any]]]
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


def load(trt: ModuleType, files: Mapping[str, bytes], component: dict[str, Any], cuda: Cuda) -> Call:
    """A component's engine as a call from named inputs to named outputs, on the first CUDA device.

    Any thread may call it, one at a time.

    component   its entry in program.json
    Raises ToolchainError for an engine of another GPU or version, and for inputs outside its profile.
    """
    engine_bytes = engine_of(files, component["name"])
    logger = trt.Logger(trt.Logger.ERROR)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(engine_bytes)
    if engine is None:
        raise ToolchainError(f"TensorRT {trt.__version__} cannot load {component['name']}.engine", fix=FOREIGN)
    context = engine.create_execution_context()
    buffers: dict[str, tuple[int, int]] = {}

    def place(name: str, array: NDArray[Any]) -> int:
        """Device memory for `array`, the same as before while it is large enough."""
        address, room = buffers.get(name, (0, 0))
        if room < array.nbytes:
            if room:
                cuda.free(address)
            address, room = cuda.allocate(max(1, array.nbytes)), max(1, array.nbytes)
            buffers[name] = address, room
        context.set_tensor_address(name, address)
        return address

    def call(tensors: Tensors) -> dict[str, NDArray[Any]]:
        cuda.use()
        for port in component["inputs"]:
            array = np.ascontiguousarray(tensors[port["name"]])
            if not context.set_input_shape(port["name"], array.shape):
                what = f"{component['name']}: {port['name']} {list(array.shape)} is outside the engine's profile"
                raise ToolchainError(what, fix="widen `shapes` in the target and compress again")
            cuda.upload(place(port["name"], array), array)
        outputs = {}
        for port in component["outputs"]:
            outputs[port["name"]] = np.empty(tuple(context.get_tensor_shape(port["name"])), port["dtype"])
            place(port["name"], outputs[port["name"]])
        if not context.execute_async_v3(cuda.stream):
            raise ToolchainError(f"TensorRT {trt.__version__} failed to run {component['name']}", fix=FOREIGN)
        cuda.wait()
        for name, array in outputs.items():
            cuda.download(array, buffers[name][0])
        return outputs

    return call


def engine_of(files: Mapping[str, bytes], name: str) -> bytes:
    """The engine of a component: INT8 where there is one, else FP16. InputError where it was left to the device."""
    for precision in ("int8", "fp16"):
        if f"{name}.{precision}.engine" in files:
            return files[f"{name}.{precision}.engine"]
    raise InputError(
        f"the bundle holds no engine of {name}: it is built on the device", fix="run device_runner.py there"
    )
