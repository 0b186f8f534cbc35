"""A Triton Inference Server model repository of a bundle: a model a component, and an ensemble that joins them.

    DIR/<model>_<component>/config.pbtxt, <version>/model.xml + model.bin | model.onnx | model.plan
    DIR/<model>/config.pbtxt, <version>/       the ensemble; a bundle of one component is <model> itself

Inputs are what pre-processing makes (`edgemm inspect BUNDLE` names them). A decoder is served beside the ensemble,
which ends where the token loop begins: that loop is the client's.

Format: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict

from edgemm import plugins
from edgemm.artifact import sha256_file, write_atomic, writing
from edgemm.console import log
from edgemm.errors import InputError, ToolchainError
from edgemm.report.device import read_report
from edgemm.runtime.bundle import Bundle, read_bundle
from edgemm.runtime.program import ComponentSpec, Generation, Output, Port, Settings
from edgemm.runtime.session import MAX_BATCH
from edgemm.target import Target

TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32", "bool": "TYPE_BOOL"}
QUEUE_SHARE = 0.1  # of the target's latency budget may be spent waiting for more requests
Config = Mapping[str, Any]


class Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Served(BaseModel):
    """What of program.json a server needs. Older ones do not say that they answer with labels."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    backend: Literal["openvino", "onnxruntime", "tensorrt"]
    settings: Settings
    components: tuple[ComponentSpec, ...]
    output: Annotated[Output, BeforeValidator(lambda o: {"kind": "labels", **o} if isinstance(o, dict) else o)]
    profiles: dict[str, dict[str, Profile]] = {}

    @property
    def decoder(self) -> str | None:
        return self.output.decoder if isinstance(self.output, Generation) else None

    @property
    def encoders(self) -> list[ComponentSpec]:
        """The components that an ensemble can join."""
        return [c for c in self.components if c.name != self.decoder]

    @property
    def max_batch(self) -> int:
        """Largest batch of every component; 0 where one has its batch fixed."""
        ports = [p for c in self.components for p in (*c.inputs, *c.outputs)]
        if not all(p.shape and isinstance(p.shape[0], str) for p in ports):
            return 0
        return min((p.max[0] for inputs in self.profiles.values() for p in inputs.values()), default=MAX_BATCH)


class Word(str):
    """A value that text_format writes without quotes."""


def write_repository(path: Path, out: Path, report: Path | None, engines: Path | None) -> list[Path]:
    """Write the next version of a bundle's models to the repository `out`; their directories.

    report, engines  device-report.json and the runner's cache, for a bundle whose engines are built on a device
    Raises InputError for a bundle that Triton can't serve, or without its engines.
    """
    bundle = read_bundle(path)
    if (backend := bundle.manifest["program"].get("backend")) == "tensorrt_rtx":
        raise InputError(
            f"{path} holds TensorRT-RTX engines, which Triton does not run", fix="use --target x86-openvino"
        )
    program = plugins.validate(Served, bundle.manifest["program"], f"{path}: program")
    if any(c.state for c in program.components):
        raise InputError(f"{path} has a memory, which an ensemble has not", fix="use edgemm watch")
    target = plugins.validate(Target, bundle.manifest["provenance"].get("target"), f"{path}: provenance.target")
    files = device_engines(bundle, report, engines) if backend == "tensorrt" else component_files(bundle, program)
    if backend == "openvino":
        program = program.model_copy(
            update={"components": tuple(as_compiled(c, files[c.name]) for c in program.components)}
        )
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", bundle.manifest["model"]).strip("_") or "model"
    alone = len(program.components) == 1
    models: dict[str, tuple[Config, Mapping[str, bytes]]] = {}
    for component in program.components:
        called = name if alone else f"{name}_{component.name}"
        models[called] = component_config(called, component, program, target), files[component.name]
    if len(program.encoders) > 1:
        models[name] = ensemble_config(name, program), {}
    version = 1 + max((int(d.name) for m in models for d in (out / m).glob("*") if d.name.isdecimal()), default=0)
    if program.backend == "openvino" and program.settings.precision == "f32":
        log("note: on a CPU with bf16 OpenVINO takes it for float parts, and Triton's backend can't be told otherwise")
    head = f"# {bundle.manifest['model']} for {target.name}, edgemm bundle sha256 {bundle.sha256}\n"
    for called, (config, content) in models.items():
        log(f"package {called}, version {version}")
        write_model(out / called, version, head + "\n".join(text_format(config)) + "\n", content)
    return [out / called for called in models]


def write_model(folder: Path, version: int, config: str, files: Mapping[str, bytes]) -> None:
    """One model: a server that polls the repository sees the whole version or none."""
    temporary = folder / f".tmp-{version}"
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            write_atomic(temporary / name, content)
        write_atomic(folder / "config.pbtxt", config.encode())
        temporary.rename(folder / str(version))


def component_files(bundle: Bundle, program: Served) -> dict[str, dict[str, bytes]]:
    """Component -> its files under the names that Triton looks for."""
    suffixes = ("xml", "bin") if program.backend == "openvino" else ("onnx",)
    return {c.name: {f"model.{s}": bundle.files[f"{c.name}.{s}"] for s in suffixes} for c in program.components}


def as_compiled(component: ComponentSpec, files: Mapping[str, bytes]) -> ComponentSpec:
    """The component with the sizes that OpenVINO inferred, fixed ones too: Triton compares them one by one."""
    try:
        import openvino as ov
    except ImportError as e:
        raise ToolchainError("OpenVINO is not installed", fix="pip install 'edgemm[openvino]'") from e
    weights = ov.Tensor(np.frombuffer(files["model.bin"], np.uint8))
    model = ov.Core().read_model(files["model.xml"], weights)
    inferred = {name: port.partial_shape for port in (*model.inputs, *model.outputs) for name in port.names}

    def exact(port: Port) -> Port:
        axes = zip(inferred[port.name], port.shape, strict=True)
        return port.model_copy(update={"shape": tuple(a.get_length() if a.is_static else name for a, name in axes)})

    inputs, outputs = (tuple(map(exact, side)) for side in (component.inputs, component.outputs))
    return component.model_copy(update={"inputs": inputs, "outputs": outputs})


def device_engines(bundle: Bundle, report: Path | None, engines: Path | None) -> dict[str, dict[str, bytes]]:
    """Component -> the engine that the device ships. InputError when it is not in `engines`, or another."""
    if report is None or engines is None:
        raise InputError(
            "the bundle's engines are built on the device",
            fix="run device_runner.py there; then --device-report device-report.json --engines CACHE",
        )
    measured = read_report(report)
    if measured.bundle.sha256 != bundle.sha256:
        raise InputError(f"{report} is of another bundle", fix="run device_runner.py on this very bundle")
    found = {}
    for component in measured.components:
        engine = component.candidates[component.shipped].engine if component.shipped else None
        if engine is None:
            raise InputError(f"{report}: {component.name} has no engine: {component.reason}", fix="compress less")
        file = engines / Path(engine.file).name
        if not file.is_file() or sha256_file(file) != engine.sha256:
            raise InputError(f"{file} is not the engine of {component.name} that {report} names", fix="--engines CACHE")
        found[component.name] = {"model.plan": file.read_bytes()}
    hardware = measured.hardware
    log(f"note: these engines run on {hardware.gpu} with TensorRT {hardware.tensorrt} and nowhere else")
    return found


def component_config(name: str, component: ComponentSpec, program: Served, target: Target) -> Config:
    """config.pbtxt of one component. Batches are formed where the batch is not fixed; every model but a decoder,
    whose cache must fit its mask, is warmed up in the shape that it is tuned for."""
    batch = program.max_batch
    config: dict[str, Any] = {"name": name, **backend_config(program, batch), "max_batch_size": batch}
    config |= {"input": ports(component.inputs, batch), "output": ports(component.outputs, batch)}
    config["instance_group"] = [{"count": 1, "kind": Word("KIND_GPU" if program.backend == "tensorrt" else "KIND_CPU")}]
    if batch > 1:
        budget_ms = target.budgets.max_p50_ms
        delay = {"max_queue_delay_microseconds": int(budget_ms * QUEUE_SHARE * 1000)} if budget_ms else {}
        config["dynamic_batching"] = delay
    if component.name != program.decoder:
        inputs = {p.name: warm_up(p, component, program, batch) for p in component.inputs}
        config["model_warmup"] = [{"name": "tuned_shape", "batch_size": 1, "inputs": entries(inputs)}]
    return config


def backend_config(program: Served, batch: int) -> Config:
    """What runs a model, with as many threads as it was verified with.

    Triton's OpenVINO backend compiles for exactly `max_batch_size` and refuses smaller batches unless it may pad.
    """
    threads = str(program.settings.threads)
    if program.backend == "tensorrt":
        return {"platform": "tensorrt_plan"}
    if program.backend == "onnxruntime":
        return {"platform": "onnxruntime_onnx", "parameters": strings({"intra_op_thread_count": threads})}
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
    if program.settings.precision == "bf16":
        options["HINT_BF16"] = "YES"
    if batch:
        options["ENABLE_BATCH_PADDING"] = "YES"
    return {"backend": "openvino", "parameters": strings(options)}


def ensemble_config(name: str, program: Served) -> Config:
    """Joins components by tensor names. What none of them makes comes in; what answers or a decoder need goes out."""
    batch, parts = program.max_batch, program.encoders
    made = {p.name: p for c in parts for p in c.outputs}
    inputs = {p.name: p for c in parts for p in c.inputs if p.name not in made}
    used = {p.name for c in program.components for p in c.inputs}
    decoder_takes = {p.name for c in program.components if c.name == program.decoder for p in c.inputs}
    outputs = [p for n, p in made.items() if n in program.output.needs | decoder_takes]
    steps = []
    for part in parts:
        goes_on = [p.name for p in part.outputs if p.name in used | {o.name for o in outputs}]
        steps.append(
            {
                "model_name": f"{name}_{part.name}",
                "model_version": -1,
                "input_map": entries({p.name: p.name for p in part.inputs}),
                "output_map": entries({n: n for n in goes_on}),
            }
        )
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": batch,
        "input": ports(tuple(inputs.values()), batch),
        "output": ports(tuple(outputs), batch),
        "ensemble_scheduling": {"step": steps},
    }


def ports(found: tuple[Port, ...], batch: int) -> list[Config]:
    """Tensors; the batch axis is left out where Triton forms batches, and -1 is an axis of any size.

    Triton wants at least one axis: a tensor of the batch axis alone gets one, and is reshaped for the model.
    """
    rows: list[Config] = []
    for port in found:
        dims = [size if isinstance(size, int) else -1 for size in port.shape][bool(batch) :]
        row: dict[str, Any] = {"name": port.name, "data_type": Word(TYPES[port.dtype]), "dims": dims or [1]}
        rows.append(row if dims else row | {"reshape": {"shape": []}})
    return rows


def warm_up(port: Port, component: ComponentSpec, program: Served, batch: int) -> Config:
    """An input of the shape that the engine is tuned for, else of the largest. Ids are 0: any vocabulary has that."""
    profile = program.profiles.get(component.name, {}).get(port.name)
    largest = [size if isinstance(size, int) else component.max_sizes.get(size, 1) for size in port.shape]
    if isinstance(port.shape[0], str):
        largest[0] = 1  # the batch
    shape = list(profile.opt) if profile else largest
    data = "random_data" if port.dtype == "float32" else "zero_data"
    return {"data_type": Word(TYPES[port.dtype]), "dims": shape[bool(batch) :] or [1], data: Word("true")}


def strings(values: Mapping[str, str]) -> list[Config]:
    return entries({name: {"string_value": value} for name, value in values.items()})


def entries(values: Mapping[str, Any]) -> list[Config]:
    """A protobuf map."""
    return [{"key": key, "value": value} for key, value in values.items()]


def text_format(message: Config, indent: str = "") -> Iterator[str]:
    """Lines of a message in protobuf's text format."""
    for field, value in message.items():
        for item in value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]:
            if isinstance(item, Mapping):
                yield f"{indent}{field} {{"
                yield from text_format(item, indent + "  ")
                yield f"{indent}}}"
            else:
                quoted = isinstance(item, str) and not isinstance(item, Word)
                yield f"{indent}{field}: " + (f'"{item}"' if quoted else str(item))
