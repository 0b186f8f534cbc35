"""A `tensorrt` with the classes and calls of one version (contract.txt) and a CUDA driver to match; it runs graphs in
ONNX Runtime, so results are real. A name that the version lacks is an AttributeError, as with the real module.

Environment: FAKE_TENSORRT, a JSON object:
    version       10.3 (default), 10.16 or 11.4
    driver        what the CUDA driver calls itself (default 12060)
    fail_build, kill_build, out_of_memory, wrong, nan, slow, dies   fp16, int8 or both: whose engine misbehaves
    device_bytes  memory that tensors can have
    log           a file that gets a line for each engine built
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

SETTINGS = json.loads(os.environ.get("FAKE_TENSORRT", "{}"))
VERSION = SETTINGS.get("version", "10.3")
__version__ = {"10.3": "10.3.0", "10.16": "10.16.0.72", "11.4": "11.4.0.106"}[VERSION]
CONTRACT = Path(__file__).with_name("contract.txt")
MAGIC = f"fake plan of TensorRT {__version__}\n".encode()
OUT_OF_MEMORY, INVALID_VALUE = 2, 1
RUNS_OF_A_CHECK = 8
SECONDS = {False: 8e-4, True: 2e-4}  # of one execution, in INT8 or not


class _Clock:
    """time.perf_counter of a process in which only executions take time: what is faster is no matter of the host."""

    def __init__(self) -> None:
        self._now = 0.0

    def _spend(self, seconds: float) -> None:
        self._now += seconds

    def __call__(self) -> float:
        return self._now


CLOCK = time.perf_counter = _Clock()


def read_contract() -> dict[str, set[str]]:
    """Version -> every name of it, calls with their arguments in parentheses."""
    found: dict[str, set[str]] = {}
    for line in CONTRACT.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            call, versions = line.rsplit("  ", 1)
            for version in versions.split():
                found.setdefault(version, set()).add(call)
    return found


def misbehaves(how: str, model: bytes) -> bool:
    precision = "int8" if b"DequantizeLinear" in model else "fp16"
    return SETTINGS.get(how) in (precision, "both")


class Value:
    """A value of one of pybind11's enums: no integer, but `int` makes one of it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class DataType:
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, INT64 = map(Value, (0, 1, 2, 3, 4, 5, 8))


class TensorIOMode:
    NONE, INPUT, OUTPUT = map(Value, range(3))


class MemoryPoolType:
    WORKSPACE, DLA_MANAGED_SRAM = map(Value, range(2))


class BuilderFlag:
    DEBUG, SPARSE_WEIGHTS = map(Value, range(2))


class NetworkDefinitionCreationFlag:
    EXPLICIT_BATCH, STRONGLY_TYPED = map(Value, range(2))


NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.INT64: np.int64,
    DataType.BOOL: np.bool_,
    DataType.UINT8: np.uint8,
}


def nptype(trt_type: Value) -> type:
    return NUMPY[trt_type]


def data_type(value: onnx.ValueInfoProto) -> Value:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return next(t for t, d in NUMPY.items() if np.dtype(d) == dtype)


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = map(Value, range(5))

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: Value, msg: str) -> None:
        raise NotImplementedError


class IHostMemory(bytearray):  # for the buffer protocol, which the real one has
    @property
    def nbytes(self) -> int:
        return len(self)


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._content)


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self._shapes[input] = (min, opt, max)


class IBuilderConfig:
    def __init__(self) -> None:
        self._cache = ITimingCache(b"")
        self._profiles: list[IOptimizationProfile] = []
        self._sparse = ""

    def set_memory_pool_limit(self, pool: Value, pool_size: int) -> None:
        assert pool is MemoryPoolType.WORKSPACE and pool_size > 0

    def set_flag(self, flag: Value) -> None:
        assert flag is BuilderFlag.SPARSE_WEIGHTS
        self._sparse = " sparse"

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        known = not serialized_timing_cache or serialized_timing_cache.startswith(b"timing ")
        return ITimingCache(serialized_timing_cache) if known else None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, ITimingCache) and not ignore_mismatch
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class ITensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self._value = value

    @property
    def name(self) -> str:
        return self._value.name

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self._value)


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self._typed = VERSION.startswith("11") or bool(flags & 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._bytes = b""
        self._model = onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self._model.graph.input[index])


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        assert logger._made
        self._network, self._errors = network, []

    def parse(self, model: bytes, path: str | None = None) -> bool:
        try:
            self._network._model = onnx.load_from_string(model)
        except DecodeError:
            self._errors = [ParserError("Failed to parse ONNX model from buffer")]
            return False
        self._network._bytes = bytes(model)
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class Builder:
    def __init__(self, logger: ILogger) -> None:
        assert logger._made
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        model = network._bytes
        if "log" in SETTINGS:
            with Path(SETTINGS["log"]).open("a") as f:
                f.write(f"{config._cache._content.decode()}{config._sparse}\n")
        if misbehaves("kill_build", model):
            os.kill(os.getpid(), signal.SIGKILL)
        if misbehaves("fail_build", model):
            return self._fail("Error Code 10: Internal Error (Could not find any implementation for node {fake}.)")
        if not network._typed:
            return self._fail("Error Code 4: a weakly typed network keeps no precision")
        dynamic = {v.name: shape_of(v) for v in network._model.graph.input if -1 in shape_of(v)}
        shapes = config._profiles[0]._shapes if config._profiles else {}
        for name, axes in dynamic.items():
            if name not in shapes:
                return self._fail(f"Error Code 4: API Usage Error (Network has dynamic input {name}, no profile.)")
            if any(axis not in (-1, size) for row in shapes[name] for axis, size in zip(axes, row, strict=True)):
                return self._fail("kOPT values for profile 0 violate shape constraints")
        config._cache = ITimingCache(b"timing " + config._cache._content.removeprefix(b"timing ") + b"+")
        return IHostMemory(MAGIC + json.dumps(shapes).encode() + b"\n" + model)

    def _fail(self, message: str) -> None:
        self._logger.log(ILogger.ERROR, message)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert logger._made
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if not bytes(serialized_engine).startswith(MAGIC):
            self._logger.log(ILogger.ERROR, "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed")
            return None
        shapes, _, model = bytes(serialized_engine)[len(MAGIC) :].partition(b"\n")
        return ICudaEngine(json.loads(shapes), model, self._logger)


class ICudaEngine:
    def __init__(self, shapes: dict[str, list[list[int]]], model: bytes, logger: ILogger) -> None:
        graph = onnx.load_from_string(model).graph
        self._shapes, self._bytes, self._logger = shapes, model, logger
        self._inputs = {v.name: v for v in graph.input}
        self._values = {v.name: v for v in (*graph.input, *graph.output)}

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    @property
    def device_memory_size(self) -> int:
        return 4096

    @property
    def device_memory_size_v2(self) -> int:
        return 4096

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_mode(self, name: str) -> Value:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Value:
        return data_type(self._values[name])

    def create_execution_context(self, strategy: object = None) -> IExecutionContext | None:
        if misbehaves("out_of_memory", self._bytes):
            self._logger.log(ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 6442450944 bytes.)")
            return None
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._runs = engine, 0
        self._addresses: dict[str, int] = {}
        self._set: dict[str, tuple[int, ...]] = {}
        self._known: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
        import onnxruntime  # where it is needed: a process that builds starts sooner without

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # Q/DQ as written, as in the simulation
        self._session = onnxruntime.InferenceSession(engine._bytes, options, providers=["CPUExecutionProvider"])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self._engine._shapes:
            low, _, high = self._engine._shapes[name]
            fits = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        else:
            fits = tuple(shape) == shape_of(self._engine._inputs[name])
        if fits:
            self._set[name] = tuple(shape)
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._engine._inputs:
            return self._set[name]
        key = tuple(self._set.items())
        if key not in self._known:
            zeros = {n: np.zeros(self._set[n], self._dtype(n)) for n in self._engine._inputs}
            self._known[key] = [v.shape for v in self._session.run(None, zeros)]
        return self._known[key][[o.name for o in self._session.get_outputs()].index(name)]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory in DRIVER.blocks, f"{name}: {memory} is no device memory"
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == FakeDriver.STREAM and self._addresses.keys() == self._engine._values.keys()
        self._runs += 1
        if misbehaves("dies", self._engine._bytes) and self._runs > RUNS_OF_A_CHECK:
            self._engine._logger.log(ILogger.ERROR, "Error Code 1: Cuda Runtime (an illegal memory access)")
            return False
        sent = {}
        for name in self._engine._inputs:
            shape, dtype = self._set[name], np.dtype(self._dtype(name))
            size = int(np.prod(shape)) * dtype.itemsize
            sent[name] = np.frombuffer(DRIVER.read(self._addresses[name], size), dtype).reshape(shape)
        for output, value in zip(self._session.get_outputs(), self._session.run(None, sent), strict=True):
            if misbehaves("wrong", self._engine._bytes):
                value = np.flip(value).copy()
            if misbehaves("nan", self._engine._bytes):
                value = np.full_like(value, np.nan)
            DRIVER.write(self._addresses[output.name], np.ascontiguousarray(value).tobytes())
        CLOCK._spend(
            2e-3 if misbehaves("slow", self._engine._bytes) else SECONDS[b"DequantizeLinear" in self._engine._bytes]
        )
        return True

    def _dtype(self, name: str) -> type:
        return nptype(data_type(self._engine._values[name]))


class FakeDriver:
    """libcuda.so.1: device memory is host memory whose bounds are checked. Argument types are checked as C would."""

    STREAM = 0x5EED

    def __init__(self) -> None:
        self.blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def read(self, address: int, size: int) -> bytes:
        assert size <= len(self.blocks[address])
        return bytes(self.blocks[address].raw[:size])

    def write(self, address: int, content: bytes) -> None:
        assert len(content) <= len(self.blocks[address])
        ctypes.memmove(self.blocks[address], content, len(content))

    def cuInit(self, flags: int) -> int:
        return 0 if SETTINGS.get("driver", 1) else 100

    def cuDeviceGet(self, device: object, ordinal: int) -> int:
        return put(device, ctypes.c_int, ordinal)

    def cuDriverGetVersion(self, version: object) -> int:
        return put(version, ctypes.c_int, SETTINGS.get("driver", 12060))

    def cuDeviceGetName(self, name: ctypes.Array[ctypes.c_char], size: int, device: ctypes.c_int) -> int:
        assert len(name) == size
        name.value = b"Fake Orin"
        return 0

    def cuDeviceTotalMem_v2(self, size: object, device: ctypes.c_int) -> int:
        return put(size, ctypes.c_size_t, 8 << 30)

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: ctypes.c_int) -> int:
        return put(value, ctypes.c_int, {75: 8, 76: 7, 16: 8, 18: 1}[attribute])

    def cuDevicePrimaryCtxRetain(self, context: object, device: ctypes.c_int) -> int:
        return put(context, ctypes.c_void_p, 1)

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:
        return 0 if context.value == 1 else INVALID_VALUE

    def cuStreamCreate(self, stream: object, flags: int) -> int:
        return put(stream, ctypes.c_void_p, self.STREAM)

    def cuStreamSynchronize(self, stream: ctypes.c_void_p) -> int:
        return 0 if stream.value == self.STREAM else INVALID_VALUE

    def cuMemAlloc_v2(self, address: object, size: ctypes.c_size_t) -> int:
        assert isinstance(size, ctypes.c_size_t)
        if sum(map(len, self.blocks.values())) + size.value > SETTINGS.get("device_bytes", 1 << 30):
            return OUT_OF_MEMORY
        block = ctypes.create_string_buffer(size.value)
        self.blocks[ctypes.addressof(block)] = block
        return put(address, ctypes.c_uint64, ctypes.addressof(block))

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        assert isinstance(address, ctypes.c_uint64)
        del self.blocks[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(
        self, target: ctypes.c_uint64, source: ctypes.c_void_p, size: ctypes.c_size_t, stream: ctypes.c_void_p
    ) -> int:
        assert isinstance(target, ctypes.c_uint64) and isinstance(source, ctypes.c_void_p)
        self.write(target.value, ctypes.string_at(source, size.value))
        return self.cuStreamSynchronize(stream)

    def cuMemcpyDtoHAsync_v2(
        self, target: ctypes.c_void_p, source: ctypes.c_uint64, size: ctypes.c_size_t, stream: ctypes.c_void_p
    ) -> int:
        assert isinstance(target, ctypes.c_void_p) and isinstance(source, ctypes.c_uint64)
        ctypes.memmove(target, self.read(source.value, size.value), size.value)
        return self.cuStreamSynchronize(stream)

    def cuMemGetInfo_v2(self, free: object, total: object) -> int:
        used = sum(map(len, self.blocks.values()))
        return put(free, ctypes.c_size_t, (1 << 30) - used) + put(total, ctypes.c_size_t, 1 << 30)


def put(place: object, kind: type, value: int) -> int:
    assert isinstance(place._obj, kind), f"{kind.__name__} expected"
    place._obj.value = value
    return 0


def calls_of(owner: type) -> dict[str, str]:
    """Public name -> its arguments in parentheses as the contract writes them, or nothing for what is no call."""
    found = {}
    for name, value in vars(owner).items():
        if inspect.isfunction(value):
            parameters = list(inspect.signature(value).parameters.values())[1:]
            texts = [p.name + ("" if p.default is p.empty else "=...") for p in parameters]
            found[name] = f"({', '.join(texts)})"
        elif isinstance(value, (property, Value)):
            found[name] = ""
    return {name: arguments for name, arguments in found.items() if not name.startswith("_")}


CLASSES = [
    kind
    for kind in list(globals().values())
    if inspect.isclass(kind) and kind.__module__ == __name__ and kind not in (FakeDriver, Value)
]


def calls() -> set[str]:
    """What this module has now, as the contract writes it."""
    return {f"{kind.__name__}.{name}{text}" for kind in CLASSES for name, text in calls_of(kind).items()}


def forget_what_the_version_lacks() -> None:
    names = {call.partition("(")[0] for call in read_contract()[VERSION]}
    for kind in CLASSES:
        for name in calls_of(kind):
            if f"{kind.__name__}.{name}" not in names:
                delattr(kind, name)


EVERY_CALL = calls()
forget_what_the_version_lacks()
DRIVER = FakeDriver()
_cdll = ctypes.CDLL
ctypes.CDLL = lambda name, *rest, **more: DRIVER if name == "libcuda.so.1" else _cdll(name, *rest, **more)
