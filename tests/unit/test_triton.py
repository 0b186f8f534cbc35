"""A Triton model repository: parsed by Triton's own message types, with tensors that are those of the models."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format
from typer.testing import CliRunner

from edgemm.backends import openvino
from edgemm.cli import build_app
from edgemm.device import device_runner
from edgemm.errors import InputError
from edgemm.runtime.bundle import read_bundle, write_bundle
from edgemm.target import Budgets, Target
from edgemm.triton import Served, component_config, ensemble_config, ports, write_repository
from edgemm.triton import text_format as write_text
from tests import devices


@pytest.fixture(scope="module")
def triton() -> ModuleType:
    """Triton's ModelConfig; `tritonclient.grpc` itself would need grpcio."""
    found = importlib.metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(found))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configs(triton: ModuleType, repository: Path) -> dict[str, Any]:
    """Every model's configuration, parsed, by directory name."""
    return {
        file.parent.name: text_format.Parse(file.read_text(), triton.ModelConfig())
        for file in repository.glob("*/config.pbtxt")
    }


def cpu_bundle(folder: Path, backend: str, *, static: bool, **budgets: float) -> Path:
    """The tiny model for OpenVINO or ONNX Runtime."""
    made = {k: v for k, v in devices.program().items() if k != "profiles"}
    made |= {"backend": backend, "settings": {"threads": 3, "precision": "f32"}}
    files: dict[str, bytes] = {}
    for component in made["components"]:
        if static:
            component["inputs"][0]["shape"][0] = 1  # the output's follows from it, whatever the program calls it
        (folder / "onnx").mkdir(exist_ok=True)
        path = folder / "onnx" / f"{component['name']}.onnx"
        path.write_bytes(devices.graph(component["name"], "fp32").SerializeToString())
        if backend == "openvino":
            shapes = {p["name"]: p["shape"] for p in component["inputs"]}
            openvino.compile_component(
                path, folder, shapes if static else {}, Target(name="box", backend="openvino"), {}
            )
            files |= {f"{path.stem}.{s}": (folder / f"{path.stem}.{s}").read_bytes() for s in ("xml", "bin")}
        else:
            files[path.name] = path.read_bytes()
    target = Target(name="box", backend=backend, budgets=Budgets(**budgets))
    manifest = {
        "model": "my tiny:model",
        "target": "box",
        "program": made,
        "certificate": {},
        "provenance": {"target": target.model_dump(mode="json", by_alias=True)},
    }
    (folder / "cpu.edgemm").write_bytes(write_bundle(manifest, files))
    return folder / "cpu.edgemm"


def test_openvino_in_fixed_shapes(triton: ModuleType, tmp_path: Path) -> None:
    import openvino as ov

    bundle = cpu_bundle(tmp_path, "openvino", static=True)
    models = write_repository(bundle, tmp_path / "r", None, None)
    assert [m.name for m in models] == ["my_tiny_model_encoder", "my_tiny_model_head", "my_tiny_model"]
    found = configs(triton, tmp_path / "r")
    encoder = found["my_tiny_model_encoder"]
    assert (encoder.name, encoder.backend, encoder.max_batch_size) == ("my_tiny_model_encoder", "openvino", 0)
    assert not encoder.HasField("dynamic_batching")
    assert {k: v.string_value for k, v in encoder.parameters.items()} == {
        "INFERENCE_NUM_THREADS": "3",
        "NUM_STREAMS": "1",
    }
    (warm,) = encoder.model_warmup
    assert (list(warm.inputs["x"].dims), warm.inputs["x"].random_data, warm.batch_size) == ([1, 16], True, 1)
    for name in devices.WIDTHS:
        config = found[f"my_tiny_model_{name}"]
        model = ov.Core().read_model(tmp_path / "r" / config.name / "1" / "model.xml")
        for side, ports_ in ((config.input, model.inputs), (config.output, model.outputs)):
            assert [(p.name, list(p.dims)) for p in side] == [(p.any_name, list(p.shape)) for p in ports_]
        assert config.instance_group[0].kind == triton.ModelInstanceGroup.KIND_CPU


def test_openvino_that_forms_batches_may_pad_them(triton: ModuleType, tmp_path: Path) -> None:
    bundle = cpu_bundle(tmp_path, "openvino", static=False, max_p50_ms=20)
    write_repository(bundle, tmp_path / "r", None, None)
    config = configs(triton, tmp_path / "r")["my_tiny_model_head"]
    assert (config.max_batch_size, list(config.input[0].dims)) == (16, [32])
    assert config.parameters["ENABLE_BATCH_PADDING"].string_value == "YES"
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert (list(config.model_warmup[0].inputs["h"].dims), config.model_warmup[0].batch_size) == ([32], 1)


def test_onnxruntime(triton: ModuleType, tmp_path: Path) -> None:
    bundle = cpu_bundle(tmp_path, "onnxruntime", static=False)
    write_repository(bundle, tmp_path / "r", None, None)
    config = configs(triton, tmp_path / "r")["my_tiny_model_head"]
    assert (config.platform, config.parameters["intra_op_thread_count"].string_value) == ("onnxruntime_onnx", "3")
    assert config.HasField("dynamic_batching")
    assert (tmp_path / "r/my_tiny_model_head/1/model.onnx").read_bytes() == read_bundle(bundle).files["head.onnx"]


def test_the_ensemble_joins_components_by_tensor_names(triton: ModuleType, tmp_path: Path) -> None:
    write_repository(cpu_bundle(tmp_path, "openvino", static=True), tmp_path / "r", None, None)
    ensemble = configs(triton, tmp_path / "r")["my_tiny_model"]
    assert ensemble.platform == "ensemble"
    assert ([p.name for p in ensemble.input], [p.name for p in ensemble.output]) == (["x"], ["logits"])
    steps = [(s.model_name, dict(s.input_map), dict(s.output_map)) for s in ensemble.ensemble_scheduling.step]
    assert steps == [
        ("my_tiny_model_encoder", {"x": "x"}, {"h": "h"}),
        ("my_tiny_model_head", {"h": "h"}, {"logits": "logits"}),
    ]
    assert (tmp_path / "r/my_tiny_model/1").is_dir() and not list((tmp_path / "r/my_tiny_model/1").iterdir())


def test_a_second_time_is_another_version(tmp_path: Path) -> None:
    bundle = cpu_bundle(tmp_path, "onnxruntime", static=False)
    for version in (1, 2):
        for model in write_repository(bundle, tmp_path / "r", None, None):
            assert sorted(p.name for p in model.iterdir()) == [*map(str, range(1, version + 1)), "config.pbtxt"]


PORT = {"dtype": "float32", "shape": ["batch", "tokens"]}
SPEECH = {
    "backend": "openvino",
    "settings": {"threads": 1},
    "components": [
        {
            "name": "encoder",
            "inputs": [{"name": "mel", "dtype": "float32", "shape": ["batch", 80, 3000]}],
            "outputs": [{"name": "states", "dtype": "float32", "shape": ["batch", 1500, 384]}],
            "max_sizes": {"batch": 8},
        },
        {
            "name": "cross_cache",
            "inputs": [{"name": "states", "dtype": "float32", "shape": ["batch", 1500, 384]}],
            "outputs": [{"name": "cross_key", **PORT}, {"name": "unused", **PORT}],
            "max_sizes": {"batch": 8},
        },
        {
            "name": "decoder",
            "inputs": [
                {"name": "decoder_input_ids", "dtype": "int64", "shape": ["batch", "tokens"]},
                {"name": "past", **PORT},
                {"name": "cross_key", **PORT},
            ],
            "outputs": [{"name": "logits", **PORT}, {"name": "present", **PORT}],
            "max_sizes": {"batch": 8, "tokens": 448},
        },
    ],
    "output": {
        "kind": "generation",
        "cache": [["past", "present"]],
        "prompt": [1],
        "eos": [2],
        "max_new_tokens": 8,
    },
}


def test_a_decoder_is_served_beside_the_ensemble(triton: ModuleType) -> None:
    program = Served.model_validate(SPEECH)
    text = "\n".join(write_text(ensemble_config("speech", program)))
    ensemble = text_format.Parse(text, triton.ModelConfig())
    assert ([p.name for p in ensemble.input], [p.name for p in ensemble.output]) == (["mel"], ["cross_key"])
    assert [s.model_name for s in ensemble.ensemble_scheduling.step] == ["speech_encoder", "speech_cross_cache"]
    assert dict(ensemble.ensemble_scheduling.step[1].output_map) == {"cross_key": "cross_key"}, "unused goes nowhere"
    decoder = "\n".join(write_text(component_config("d", program.components[2], program, devices.TARGET)))
    parsed = text_format.Parse(decoder, triton.ModelConfig())
    assert not parsed.model_warmup and parsed.HasField("dynamic_batching")
    assert [(p.data_type, list(p.dims)) for p in parsed.input[:2]] == [
        (triton.TYPE_INT64, [-1]),
        (triton.TYPE_FP32, [-1]),
    ]


def test_a_tensor_of_the_batch_axis_alone_is_reshaped(triton: ModuleType) -> None:
    components = [{**SPEECH["components"][0], "outputs": [{"name": "score", "dtype": "float32", "shape": ["batch"]}]}]
    output = {"kind": "features", "tensors": ["score"]}
    program = Served.model_validate({**SPEECH, "components": components, "output": output})
    written = "\n".join(write_text({"output": ports(program.components[0].outputs, 4)}))
    (port,) = text_format.Parse(written, triton.ModelConfig()).output
    assert list(port.dims) == [1] and port.HasField("reshape") and not port.reshape.shape


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny.edgemm and what device_runner.py made of it: device-report.json, cache/."""
    folder = tmp_path_factory.mktemp("measured")
    bundle = devices.bundle(folder)
    fake = Path(__file__).parents[1] / "tensorrt_fake"
    command = [sys.executable, device_runner.__file__, str(bundle), "--cache", str(folder / "cache")]
    subprocess.run(
        [*command, "--report", str(folder / "device-report.json")],
        env={**os.environ, "PYTHONPATH": str(fake), "FAKE_TENSORRT": "{}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    return folder


def test_engines_of_a_device(triton: ModuleType, measured: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        build_app(),
        [
            *("package", str(measured / "tiny.edgemm"), "--format", "triton", "-o", str(tmp_path)),
            *("--device-report", str(measured / "device-report.json"), "--engines", str(measured / "cache")),
        ],
    )
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "tiny_encoder") in result.stdout
    config = configs(triton, tmp_path)["tiny_encoder"]
    assert (config.platform, config.max_batch_size, list(config.input[0].dims)) == ("tensorrt_plan", 4, [16])
    assert config.instance_group[0].kind == triton.ModelInstanceGroup.KIND_GPU
    report = json.loads((measured / "device-report.json").read_text())
    shipped = report["components"][0]["candidates"][report["components"][0]["shipped"]]["engine"]["file"]
    assert (tmp_path / "tiny_encoder/1/model.plan").read_bytes() == (measured / "cache" / shipped).read_bytes()


def test_what_cannot_be_served_is_refused(measured: Path, tmp_path: Path) -> None:
    bundle, report = measured / "tiny.edgemm", measured / "device-report.json"
    with pytest.raises(InputError, match="built on the device"):
        write_repository(bundle, tmp_path / "r", None, None)
    with pytest.raises(InputError, match="is not the engine of encoder"):
        write_repository(bundle, tmp_path / "r", report, tmp_path)
    content = read_bundle(bundle)
    manifest = {k: v for k, v in content.manifest.items() if k not in ("schema", "files")}
    other = tmp_path / "other.edgemm"
    other.write_bytes(write_bundle({**manifest, "model": "other"}, content.files))
    with pytest.raises(InputError, match="is of another bundle"):
        write_repository(other, tmp_path / "r", report, measured / "cache")
    rtx = {**manifest, "program": {**manifest["program"], "backend": "tensorrt_rtx"}}
    other.write_bytes(write_bundle(rtx, content.files))
    with pytest.raises(InputError, match="Triton does not run"):
        write_repository(other, tmp_path / "r", None, None)
    assert not (tmp_path / "r").exists()
