#!/usr/bin/env python3
"""Build, check and measure an edgemm bundle's TensorRT engines on the device that they are for.

    python3 device_runner.py BUNDLE.edgemm [--cache DIR] [--report FILE] [--json]

One file, and long for that, so that it can be copied to a device and read there. Python 3.10, numpy and tensorrt
(10.3 to 11.x) are all it needs; CUDA is called through the driver library.

Each component's FP16 and INT8 graph is built (in a process of its own: a builder that is killed for want of memory
takes nothing with it), checked against the FP32 model's outputs in the bundle, and timed. The faster one that
passes is shipped; INT8 that is not faster than FP16 is not. FILE, by default device-report.json, is what
`edgemm verify BUNDLE --device-report FILE` judges.

Cache: KEY.engine with KEY.json (what it was built for, and its SHA-256: written last, so an engine without it is
no engine); HARDWARE.timing, TensorRT's timing cache. Latency is host to host: copies in, execution, copies out.
Device memory: one cuMemAlloc a tensor, grown to the largest shape met; activations are TensorRT's own allocation.

Exit codes: 0 every component has an engine that passes and the limits hold, 2 the bundle or a path is wrong,
3 TensorRT or CUDA is absent, or this is another GPU, 4 no engine of a component passes or a limit is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[Any]]
Json = dict[str, Any]
Loaded = tuple["Engine", list[Tensors]]

SEAL = b"edgemm-bundle sha256="
HEX_DIGITS = 64
WARM_UP, BLOCK, RESAMPLES = 20, 10, 2000
MEMORY_RUNS = 5
CUDA_OUT_OF_MEMORY = 2
# CUdevice_attribute of cuda.h
MULTIPROCESSORS, INTEGRATED, MAJOR, MINOR = 16, 18, 75, 76
PRECISIONS = ("fp16", "int8")


class Refused(Exception):
    """Nothing can be done at all: the exit code, what is wrong and what to do about it."""

    def __init__(self, exit_code: int, what: str, fix: str) -> None:
        super().__init__(f"{what}\n  fix: {fix}")
        self.exit_code = exit_code


class Unfit(Exception):
    """One candidate can't be built or run."""


def log(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Bundle:
    """A bundle; format: edgemm/runtime/bundle.py. `check` its seal and the digest of every file in it."""

    def __init__(self, path: Path, check: bool = True) -> None:
        self.path = path
        again = "copy the bundle again from where it was made"
        try:
            self.sha256 = self._sealed() if check else ""
            self.archive = zipfile.ZipFile(path)
            self.manifest: Json = json.loads(self.read("manifest.json"))
            self.files: Json = self.manifest["files"]
            names = sorted(name for name in self.archive.namelist() if name != "manifest.json")
            if names != sorted(self.files):
                raise ValueError("its files are not those of its manifest")
            for name in names if check else ():
                if hashlib.sha256(self.read(name)).hexdigest() != self.files[name]["sha256"]:
                    raise ValueError(f"{name} is not the file that the manifest names")
        except OSError as e:
            raise Refused(2, f"cannot read bundle {path}: {e.strerror}", "give the path of an .edgemm file") from e
        except (zipfile.BadZipFile, ValueError, KeyError, TypeError) as e:
            raise Refused(2, f"{path} is no bundle, or is damaged: {e}", again) from e
        if "device/spec.json" not in self.files:
            target = self.manifest.get("target")
            raise Refused(2, f"{path} is for {target}, whose engines are not built on the device", "edgemm run BUNDLE")
        self.spec: Json = json.loads(self.read("device/spec.json"))

    def _sealed(self) -> str:
        """SHA-256 of the whole file, whose last digits are that of all before them."""
        left, last, digest = self.path.stat().st_size - HEX_DIGITS, b"", hashlib.sha256()
        with self.path.open("rb") as f:
            while left > 0 and (block := f.read(min(left, 1 << 20))):
                left, last = left - len(block), (last + block)[-len(SEAL) :]
                digest.update(block)
            seal = f.read()
        if last != SEAL or digest.hexdigest().encode() != seal:
            raise ValueError("its SHA-256 is not the one it ends with")
        digest.update(seal)
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        return self.archive.read(name)

    def cases(self, component: str, most: int = 1 << 20) -> list[tuple[Tensors, Tensors]]:
        """[(inputs, outputs of the FP32 graph)] of a component, from device/reference.npz; at most the first `most`."""
        found: dict[int, dict[str, dict[str, NDArray[Any]]]] = {}
        with self.archive.open("device/reference.npz") as file, np.load(file) as stored:
            for key in stored.files:
                name, index, way, tensor = key.split("/", 3)
                if name == component and int(index) < most:
                    found.setdefault(int(index), {"in": {}, "out": {}})[way][tensor] = stored[key]
        return [(case["in"], case["out"]) for _, case in sorted(found.items())]


class Cuda:
    """The CUDA driver API, by ctypes. Device 0; `activate` makes its primary context current, and a stream."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as e:
            raise Refused(3, f"the CUDA driver is absent: {e}", "run on the device, outside a container without") from e
        device, version, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        try:
            self.call("cuInit", 0)
            self.call("cuDeviceGet", ctypes.byref(device), 0)
            self.device = device
            self.call("cuDriverGetVersion", ctypes.byref(version))
            self.call("cuDeviceGetName", name, 256, device)
            self.call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
            self.driver, self.name, self.total_bytes = version.value, name.value.decode(), total.value
            self.capability = f"{self.attribute(MAJOR)}.{self.attribute(MINOR)}"
            self.multiprocessors = self.attribute(MULTIPROCESSORS)
            self.integrated = bool(self.attribute(INTEGRATED))
        except Unfit as e:
            raise Refused(3, f"there is no CUDA device: {e}", "run on the device that the bundle is for") from e

    def call(self, function: str, *arguments: Any) -> None:
        if code := getattr(self.library, function)(*arguments):
            raise Unfit("out of memory" if code == CUDA_OUT_OF_MEMORY else f"{function}: CUDA error {code}")

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value

    def activate(self) -> None:
        context, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(self.stream), 0)

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        source, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, self.stream)

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self.call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, self.stream)

    def wait(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


def import_tensorrt() -> ModuleType:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as e:
        raise Refused(3, f"TensorRT's Python module is absent: {e}", "apt install python3-libnvinfer") from e


def make_logger(trt: Any) -> Any:
    """A logger that keeps what went wrong in `errors`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def build_engine(
    trt: Any, onnx: bytes, profiles: Json, workspace_mb: int | None, timing: bytes, sparse: bool = False
) -> tuple[bytes, bytes]:
    """Serialized engine and timing cache of one graph: strongly typed, so the precision is the graph's own.

    profiles      input -> min, opt, max shapes of each dynamic input
    workspace_mb  MiB of scratch memory that a layer may take; None: all there is
    sparse        whether kernels for 2:4 sparse weights may be used
    timing        what an earlier build learnt; of another device or TensorRT, or damaged, it is left out
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise Unfit("the parser refuses it: " + "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    if workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    cache = config.create_timing_cache(timing)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
    profile, dynamic = builder.create_optimization_profile(), False
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if -1 in tuple(tensor.shape):
            if tensor.name not in profiles:
                raise Unfit(f"no profile for the dynamic input {tensor.name}")
            shapes = profiles[tensor.name]
            profile.set_shape(tensor.name, tuple(shapes["min"]), tuple(shapes["opt"]), tuple(shapes["max"]))
            dynamic = True
    if dynamic and config.add_optimization_profile(profile) < 0:
        raise Unfit("the optimization profile is refused: " + "; ".join(logger.errors))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Unfit("the build failed: " + ("; ".join(logger.errors[-3:]) or "TensorRT gives no reason"))
    return bytes(plan), bytes(config.get_timing_cache().serialize())


class Engine:
    """A deserialized engine: call it with named arrays. Unfit when it does not load, fit in memory or run."""

    def __init__(self, trt: Any, cuda: Cuda, plan: bytes) -> None:
        self.cuda = cuda
        self.places: dict[str, tuple[int, int]] = {}  # address and bytes
        self.logger = make_logger(trt)
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine and self.engine.create_execution_context()
        if not self.context:
            raise Unfit("the engine does not load: " + ("; ".join(self.logger.errors) or "TensorRT gives no reason"))
        newer = hasattr(self.engine, "device_memory_size_v2")
        self.activation_bytes: int = self.engine.device_memory_size_v2 if newer else self.engine.device_memory_size
        self.inputs: dict[str, np.dtype[Any]] = {}
        self.outputs: dict[str, np.dtype[Any]] = {}
        for name in (self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)):
            is_input = self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            try:
                dtype = np.dtype(trt.nptype(self.engine.get_tensor_dtype(name)))
            except TypeError as e:
                raise Unfit(f"{name} has a type that numpy lacks") from e
            (self.inputs if is_input else self.outputs)[name] = dtype

    def __call__(self, tensors: Tensors) -> dict[str, NDArray[Any]]:
        """Named arrays in, named arrays out."""
        sent = {name: np.asarray(tensors[name], dtype, order="C") for name, dtype in self.inputs.items()}
        for name, array in sent.items():
            if not self.context.set_input_shape(name, array.shape):
                raise Unfit(f"{name} {list(array.shape)} is outside the engine's profile")
            self.cuda.copy_in(self._place(name, array.nbytes), array)
        got = {}
        for name, dtype in self.outputs.items():
            shape = tuple(self.context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise Unfit(f"the shape of {name} depends on data: {list(shape)}")
            got[name] = np.empty(shape, dtype)
            self._place(name, got[name].nbytes)
        if not self.context.execute_async_v3(self.cuda.stream.value or 0):
            raise Unfit("execution failed: " + "; ".join(self.logger.errors))
        for name, array in got.items():
            self.cuda.copy_out(array, self.places[name][0])
        self.cuda.wait()
        return got

    def _place(self, name: str, size: int) -> int:
        """Address of a tensor's device memory, of at least `size` bytes."""
        address, room = self.places.get(name, (0, 0))
        if size > room or not address:
            if address:
                self.cuda.free(address)
                del self.places[name]
            address = self.cuda.allocate(max(size, 1))
            self.places[name] = address, size
            self.context.set_tensor_address(name, address)
        return address

    def close(self) -> None:
        for address, _ in self.places.values():
            self.cuda.free(address)
        self.places, self.context, self.engine = {}, None, None


def write_atomic(path: Path, content: bytes) -> None:
    """Write so that the name holds the old content or all of the new, whenever the power goes."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Cache:
    """Engines by what they were built for: hardware, driver, TensorRT, graph and profiles."""

    def __init__(self, folder: Path, bundle: Bundle, hardware: Json) -> None:
        self.folder, self.bundle, self.hardware = folder, bundle, hardware
        self.timing = folder / f"{digest_of(hardware)[:32]}.timing"

    def key(self, component: str, precision: str) -> Json:
        spec = self.bundle.spec["components"][component]
        onnx = self.bundle.files[spec["candidates"][precision]["onnx"]]["sha256"]
        return {
            **self.hardware,
            "onnx": onnx,
            "profiles": spec["profiles"],
            "workspace_mb": self.bundle.spec["workspace_mb"],
            "sparsity": self.bundle.spec["sparsity"],
        }

    def path(self, component: str, precision: str) -> Path:
        return self.folder / f"{digest_of(self.key(component, precision))[:32]}.engine"

    def find(self, component: str, precision: str) -> tuple[bytes, Json] | None:
        """(engine, its record), or None when it is absent, of other hardware or software, or damaged."""
        path = self.path(component, precision)
        try:
            record, plan = json.loads(path.with_suffix(".json").read_bytes()), path.read_bytes()
            whole = record["key"] == self.key(component, precision)
            whole = whole and record["sha256"] == hashlib.sha256(plan).hexdigest()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (plan, record) if whole else None

    def build(self, trt: Any, component: str, precision: str) -> None:
        """Build one engine, and keep it and what the builder learnt."""
        spec = self.bundle.spec["components"][component]
        learnt = self.timing.read_bytes() if self.timing.is_file() else b""
        begin = time.perf_counter()
        onnx = self.bundle.read(spec["candidates"][precision]["onnx"])
        whole = self.bundle.spec
        sparse = whole["sparsity"] is not None
        plan, learnt = build_engine(trt, onnx, spec["profiles"], whole["workspace_mb"], learnt, sparse)
        record = {
            "key": self.key(component, precision),
            "sha256": hashlib.sha256(plan).hexdigest(),
            "size_bytes": len(plan),
            "build_s": round(time.perf_counter() - begin, 3),
        }
        path = self.path(component, precision)
        write_atomic(path, plan)
        write_atomic(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
        write_atomic(self.timing, learnt)


def digest_of(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hardware_of(trt: Any, cuda: Cuda) -> Json:
    """What an engine is tied to. Multiprocessors count: a power mode can switch some off."""
    release = first_line(Path("/etc/nv_tegra_release")) or first_line(Path("/proc/driver/nvidia/version"))
    return {
        "gpu": cuda.name,
        "compute_capability": cuda.capability,
        "multiprocessors": cuda.multiprocessors,
        "memory_bytes": cuda.total_bytes,
        "driver": cuda.driver,
        "release": release,
        "tensorrt": trt.__version__,
    }


def first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip("\0 ")
    except (OSError, IndexError):
        return None


def nvpmodel() -> str | None:
    """What `nvpmodel -q` says, or None where there is none."""
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def clocks(root: Path = Path("/sys")) -> Json | None:
    """Frequencies and governors of the processors (kHz) and devices (Hz), or None where /sys has none."""
    found = {}
    places = [*root.glob("devices/system/cpu/cpufreq/policy*"), *root.glob("class/devfreq/*")]
    for place in sorted(places):
        prefix = "scaling_" if place.name.startswith("policy") else ""
        names = ("cur_freq", "min_freq", "max_freq", "governor")
        values = {name: first_line(place / f"{prefix}{name}") for name in names}
        found[place.name] = {n: int(v) if v and v.isdigit() else v for n, v in values.items()}
    return found or None


def sqnr_db(want: NDArray[Any], got: NDArray[Any]) -> float | None:
    """Signal to noise of `got` against `want` in dB, at most 200; None where NaN or infinity stands for a number."""
    finite = np.isfinite(want)
    want, got = want[finite].astype(np.float64), got[finite].astype(np.float64)
    if not np.isfinite(got).all():
        return None
    signal, noise = float((want**2).sum()), float(((want - got) ** 2).sum())
    return 200.0 if noise == 0 else round(min(200.0, 10 * float(np.log10(max(signal, 1e-30) / noise))), 3)


def check(engine: Callable[[Tensors], Tensors], cases: list[tuple[Tensors, Tensors]]) -> dict[str, float | None]:
    """Output -> dB over all cases, the FP32 graph's outputs being the signal."""
    rows = [(want, engine(tensors)) for tensors, want in cases]
    found = {}
    for name in rows[0][0]:
        if any(want[name].shape != got[name].shape for want, got in rows):
            raise Unfit(f"{name} has shape {list(rows[0][1][name].shape)}, not {list(rows[0][0][name].shape)}")
        want, got = (np.concatenate([np.ravel(row[i][name]) for row in rows]) for i in (0, 1))
        found[name] = sqnr_db(want, got)
    return found


def abba(calls: Sequence[Callable[[Any], object]], inputs: Sequence[Any], rounds: int) -> list[NDArray[np.float64]]:
    """Time calls in turn -> ms[rounds, 2 * BLOCK] of each: blocks A B B A, so a drift falls on all alike."""

    def block(call: Callable[[Any], object]) -> list[float]:
        times = []
        for i in range(BLOCK):
            tensors = inputs[i % len(inputs)]
            begin = time.perf_counter()
            call(tensors)
            times.append((time.perf_counter() - begin) * 1e3)
        return times

    for call in calls:
        for i in range(WARM_UP):
            call(inputs[i % len(inputs)])
    found: list[list[list[float]]] = [[] for _ in calls]
    for _ in range(rounds):
        there = [block(call) for call in calls]
        back = [block(call) for call in reversed(calls)][::-1]
        for times, first, second in zip(found, there, back, strict=True):
            times.append(first + second)
    return [np.array(times).round(4) for times in found]


def ratio_interval(a: NDArray[np.float64], b: NDArray[np.float64]) -> Json:
    """Median(a) / median(b) and its 95 % interval, by a bootstrap over rounds."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(a), len(a))
        ratios.append(np.median(a[rows]) / np.median(b[rows]))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"p50": float(np.median(a) / np.median(b)), "ci95": [float(low), float(high)]}


def latency(times: NDArray[np.float64]) -> dict[str, float]:
    p50, p90, p99 = (round(float(v), 4) for v in np.percentile(times, [50, 90, 99]))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99}


def choose(passed: list[str], speedup: Json | None) -> tuple[str | None, str]:
    """(precision to ship or None, why). `speedup`: INT8 over FP16 where both were timed."""
    if not passed:
        return None, "neither candidate passes"
    if speedup is None:
        return passed[0], f"the only candidate that passes is {passed[0]}"
    low, high = speedup["ci95"]
    measured = f"{speedup['p50']:.2f}x FP16's speed (95 % interval {low:.2f} to {high:.2f})"
    return ("int8", f"INT8 has {measured}") if low > 1 else ("fp16", f"INT8 is not faster: it has {measured}")


class Run:
    """One bundle on one device; `report` is what goes into device-report.json."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.trt, self.cuda = import_tensorrt(), Cuda()
        self.hardware = hardware_of(self.trt, self.cuda)
        has, wanted = self.cuda.capability, [f"{sm // 10}.{sm % 10}" for sm in bundle.spec["sm"]]
        if has not in wanted:
            what = f"this device has compute capability {has}, and the bundle is for {', '.join(wanted)}"
            raise Refused(3, what, "run it on the device that it was made for, or compress for a target with this sm")
        self.cache = Cache(folder, bundle, self.hardware)
        self.built: set[tuple[str, str]] = set()  # in this run
        self.failed: dict[tuple[str, str], Unfit] = {}

    def child(self, *arguments: str) -> str:
        """This file again, in a process of its own; its stdout. Unfit with its last words when it fails."""
        command = [sys.executable, str(Path(__file__).resolve()), str(self.bundle.path), "--cache", str(self.folder)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode == -signal.SIGKILL:
            raise Unfit("killed by signal 9, which is how a system out of memory ends a process")
        if done.returncode < 0:
            raise Unfit(f"crashed with signal {-done.returncode}")
        if done.returncode:
            raise Unfit(done.stderr.strip().rpartition("unfit: ")[2][-2000:] or f"it ended with {done.returncode}")
        return done.stdout

    def build_missing(self) -> None:
        """Build what the cache lacks, before this process takes any of the device's memory."""
        for component, spec in self.bundle.spec["components"].items():
            for precision in spec["candidates"]:
                if not self.cache.find(component, precision):
                    self.build(component, precision)

    def build(self, component: str, precision: str) -> None:
        log(f"{component} {precision}: building")
        try:
            self.child("--build", component, precision)
            self.built.add((component, precision))
        except Unfit as e:
            self.failed[component, precision] = e

    def load(self, component: str, precision: str) -> tuple[Engine, Json]:
        """An engine and its record. One from the cache that does not load is built anew."""
        if error := self.failed.get((component, precision)):
            raise error
        if not (found := self.cache.find(component, precision)):
            raise Unfit("the engine that was just built can't be read back")
        try:
            return Engine(self.trt, self.cuda, found[0]), found[1]
        except Unfit as e:
            if (component, precision) in self.built:
                raise
            log(f"{component} {precision}: the cached engine is of no use ({e})")
        self.build(component, precision)
        return self.load(component, precision)

    def component(self, name: str) -> tuple[Json, Engine | None, list[Tensors]]:
        """One component: both candidates built, checked and timed, and the choice."""
        spec, cases = self.bundle.spec["components"][name], self.bundle.cases(name)
        rows: dict[str, Json] = {}
        engines: dict[str, Engine] = {}
        for precision, limits in spec["candidates"].items():
            row = rows[precision] = {
                "engine": None, "cached": False, "build_s": None, "activation_bytes": None, "error": None,
                "sqnr_db": {}, "passed": False, "latency": None, "samples_ms": [],
            }  # fmt: skip
            try:
                engine, record = self.load(name, precision)
                row["cached"] = (name, precision) not in self.built
                file = self.cache.path(name, precision).name
                row["engine"] = {"file": file, "sha256": record["sha256"], "size_bytes": record["size_bytes"]}
                row["build_s"], row["activation_bytes"] = record["build_s"], engine.activation_bytes
                row["sqnr_db"] = check(engine, cases)
            except Unfit as e:
                row["error"] = str(e)
                log(f"{name} {precision}: {row['error']}")
                continue
            under = {n: db for n, db in row["sqnr_db"].items() if db is None or db < limits["min_sqnr_db"][n]}
            if under:
                row["error"] = "; ".join(f"{n}: {db} dB, limit {limits['min_sqnr_db'][n]}" for n, db in under.items())
                engine.close()
            else:
                row["passed"], engines[precision] = True, engine
            log(f"{name} {precision}: {'passes' if row['passed'] else 'wrong: ' + row['error']}")
        inputs = [tensors for tensors, _ in cases]
        try:
            times = dict(zip(engines, abba(list(engines.values()), inputs, self.bundle.spec["rounds"]), strict=True))
        except Unfit as e:  # a device in that state runs nothing more
            times, engines = {}, {}
            for row in rows.values():
                row["passed"], row["error"] = False, row["error"] or str(e)
        for precision, measured in times.items():
            rows[precision]["latency"] = latency(measured)
            rows[precision]["samples_ms"] = measured.ravel().tolist()
        speedup = ratio_interval(times["fp16"], times["int8"]) if len(times) == 2 else None
        shipped, reason = choose([p for p in PRECISIONS if p in engines], speedup)
        log(f"{name}: {shipped or 'nothing'} is shipped: {reason}")
        for precision, engine in engines.items():
            if precision != shipped:
                engine.close()
        row = {"name": name, "shipped": shipped, "reason": reason, "int8_speedup": speedup, "candidates": rows}
        return row, engines.get(shipped or ""), inputs

    def whole(self, loaded: list[Loaded]) -> Json:
        """ms of one input through every component, one after the other, each on its own reference inputs."""

        def run(i: int) -> None:
            for engine, inputs in loaded:
                engine(inputs[i % len(inputs)])

        cases = max(len(inputs) for _, inputs in loaded)
        (times,) = abba([run], list(range(cases)), self.bundle.spec["rounds"])
        return {**latency(times), "samples_ms": times.ravel().tolist()}

    def report(self) -> Json:
        self.build_missing()
        notes = ["device memory: cuMemAlloc for each input and output, TensorRT's own allocator for activations"]
        power = {"nvpmodel": nvpmodel(), "clocks_before": clocks()}
        if power["nvpmodel"] is None:
            notes.append("nvpmodel is absent: the power mode is not known")
        elif (mode := self.bundle.spec["power_mode"]) and mode not in power["nvpmodel"]:
            notes.append(f"the target is meant for power mode {mode}, which is not the one measured in")
        if power["clocks_before"] is None:
            notes.append("/sys has no frequencies: the clocks are not known")
        self.cuda.activate()
        rows: list[Json] = []
        loaded: list[Loaded] = []
        for name in self.bundle.spec["components"]:
            row, engine, inputs = self.component(name)
            rows.append(row)
            if engine:
                loaded.append((engine, inputs))
        whole = memory = None
        if len(loaded) < len(rows):
            notes.append("latency and memory of the whole are not measured: a component has no engine")
        else:
            try:
                if self.bundle.spec["decoder"]:
                    notes.append("latency of the whole is not measured: it depends on how many tokens a decoder makes")
                else:
                    whole = self.whole(loaded)
                for engine, _ in loaded:
                    engine.close()
                shipped = [part for row in rows for part in (row["name"], row["shipped"])]
                memory = json.loads(self.child("--peak", *shipped))
            except Unfit as e:
                notes.append(f"the whole is not measured to its end: {e}")
        power["clocks_after"] = clocks()
        gates = []
        for name, value in (("max_p50_ms", whole and whole["p50_ms"]), ("max_peak_mb", memory and memory["peak_mb"])):
            if (limit := self.bundle.spec["gates"].get(name)) is not None:
                held = None if value is None else value <= limit
                gates.append({"name": name, "value": value, "limit": limit, "held": held})
        return {
            "schema": 1,
            "bundle": {"path": self.bundle.path.name, "sha256": self.bundle.sha256},
            "model": self.bundle.manifest["model"],
            "target": self.bundle.manifest["target"],
            "runner_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
            "hardware": {
                **self.hardware,
                "integrated": self.cuda.integrated,
                "board": first_line(Path("/proc/device-tree/model")),
            },
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "system": platform.release()},
            "power": power,
            "components": rows,
            "whole": whole,
            "memory": memory,
            "gates": gates,
            "notes": notes,
        }


def peak_memory(run: Run, shipped: list[str]) -> dict[str, float]:
    """MB (10^6 bytes) that the shipped engines need, in this process, which does nothing else.

    An integrated GPU takes its memory from the system's, so there the fall of free memory holds both.
    """
    run.cuda.activate()
    free, host = run.cuda.free_bytes(), status_bytes("VmRSS")
    kept = []
    for name, precision in zip(shipped[::2], shipped[1::2], strict=True):
        if not (found := run.cache.find(name, precision)):
            raise Unfit(f"the engine of {name} is gone from the cache")
        engine = Engine(run.trt, run.cuda, found[0])
        kept.append(engine)  # a device runs all of them
        del found
        ((inputs, _),) = run.bundle.cases(name, most=1)
        for _ in range(MEMORY_RUNS):
            engine(inputs)
    taken, most = max(0, free - run.cuda.free_bytes()), status_bytes("VmHWM")
    peak = host + taken if run.cuda.integrated else most + taken
    return {"host_peak_mb": most / 1e6, "device_mb": taken / 1e6, "peak_mb": peak / 1e6}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def summary(report: Json) -> str:
    lines = []
    for row in report["components"]:
        lines.append(f"{row['name']}: {row['shipped'] or 'NO ENGINE'} ({row['reason']})")
        for precision, c in row["candidates"].items():
            timed = f"p50 {c['latency']['p50_ms']:.3f} ms" if c["latency"] else c["error"]
            lines.append(f"  {precision}: {timed}, SQNR {c['sqnr_db'] or 'not measured'}")
    lines += [f"{g['name']}: {g['value']}, limit {g['limit']}" for g in report["gates"]]
    return "\n".join([*lines, *report["notes"]])


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "edgemm", metavar="DIR")
    parser.add_argument("--report", type=Path, default=Path("device-report.json"), metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print the report on stdout")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        its_parent_checked = bool(options.build or options.peak)
        run = Run(Bundle(options.bundle, check=not its_parent_checked), options.cache)
        if options.build:
            run.cache.build(run.trt, *options.build)
            return 0
        if options.peak:
            sys.stdout.write(json.dumps(peak_memory(run, options.peak)))
            return 0
        for folder in (options.cache, options.report.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with (options.cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run waits: two at once would time each other
            for left in options.cache.glob(".tmp-*"):
                left.unlink()
            report = run.report()
        write_atomic(options.report, (json.dumps(report, indent=1) + "\n").encode())
    except Refused as e:
        log(f"error: {e}")
        return e.exit_code
    except Unfit as e:
        log(f"unfit: {e}")
        return 4
    except OSError as e:
        what = f"cannot write {e.filename or options.cache}: {e.strerror}"
        log(f"error: {what}\n  fix: free some space, or choose another --cache or --report")
        return 2
    sys.stdout.write((json.dumps(report, indent=1) if options.json else summary(report)) + "\n")
    log(f"report: {options.report}")
    good = all(row["shipped"] for row in report["components"]) and all(g["held"] is not False for g in report["gates"])
    return 0 if good else 4


if __name__ == "__main__":
    sys.exit(main())
