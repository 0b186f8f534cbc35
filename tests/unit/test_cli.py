"""The command line: the result alone on stdout; exit code 2 and a fix on stderr for what a user gets wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

import edgemm
from edgemm import console, plugins
from edgemm.cli import build_app
from edgemm.recipe import load_recipe
from edgemm.runtime.archive import HEX_DIGITS
from edgemm.runtime.bundle import write_bundle
from edgemm.target import load_target
from edgemm.yaml_files import shipped_files

GROUPS = {"recipes": load_recipe, "targets": load_target}
PICKLES = ("pytorch_model.bin", "model.pt", "weights.pth", "model.pkl", "epoch.ckpt")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments], prog_name="edgemm")


def refused(*arguments: object) -> str:
    """Run a command that must end in exit code 2 with one error on stderr and nothing on stdout -> stderr."""
    result = call(*arguments)
    assert result.exit_code == 2, f"{result.exception!r}\n{result.stderr}"
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert "\n  fix: " in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_version_is_printed_alone() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{edgemm.__version__}\n", "")


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "edgemm"]
    good = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout, good.stderr) == (0, f"{edgemm.__version__}\n", "")
    bad = subprocess.run([*command, "recipes", "show", "bogus"], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: no recipe named 'bogus'\n  fix: ")


def test_bytes_that_are_no_utf8_in_an_argument_are_a_user_error() -> None:
    command = [sys.executable, "-m", "edgemm", "recipes", "show", b"gr\xe9y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "\n  fix: " in done.stderr


def test_tables_show_what_stands_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("t [a]", ("b [c]", "d"), [("pip install 'edgemm[audio]'", "[1, 2]")])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("t [a]", "b [c]", "edgemm[audio]", "[1, 2]"))


@pytest.mark.parametrize("folder", GROUPS)
def test_list_names_what_ships(folder: str) -> None:
    result = call(folder, "list")
    assert (result.exit_code, result.stderr) == (0, "")
    assert all(name in result.stdout for name in shipped_files(folder))


@pytest.mark.parametrize(("folder", "name"), [(f, n) for f in GROUPS for n in shipped_files(f)])
def test_show_prints_a_file_that_means_the_same(folder: str, name: str, tmp_path: Path) -> None:
    result = call(folder, "show", name)
    assert (result.exit_code, result.stderr) == (0, "")
    assert yaml.safe_load(result.stdout)["name"] == name
    shown = tmp_path / "shown.yaml"
    shown.write_text(result.stdout, encoding="utf-8")
    assert GROUPS[folder](str(shown)) == GROUPS[folder](name)


@pytest.mark.parametrize(("folder", "name"), [(f, n) for f in GROUPS for n in shipped_files(f)])
def test_check_says_that_what_ships_is_valid(folder: str, name: str) -> None:
    for given in (name, shipped_files(folder)[name]):
        result = call(folder, "check", given)
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"{given}: valid\n", "")


@pytest.mark.parametrize("folder", GROUPS)
@pytest.mark.parametrize("command", ["show", "check"])
def test_unknown_recipe_or_target_lists_the_known(folder: str, command: str) -> None:
    error = refused(folder, command, "bogus")
    assert "'bogus'" in error
    assert all(name in error for name in shipped_files(folder))


@pytest.mark.parametrize("folder", GROUPS)
@pytest.mark.parametrize("text", ["thread: 5", "schema: 7", "- a", "a: [", "name: [1]", ""])
def test_check_names_what_is_wrong(folder: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert str(path) in refused(folder, "check", path)


def test_check_of_a_recipe_knows_plugins_and_their_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("prune: [{use: attention_head, keep: 0.5}]", encoding="utf-8")
    assert "attention_heads" in refused("recipes", "check", path)
    path.write_text("prune: [{use: attention_heads, keep: 1.5}]", encoding="utf-8")
    assert "1.5" in refused("recipes", "check", path)


def test_check_of_a_target_knows_backends(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("backend: openvin", encoding="utf-8")
    error = refused("targets", "check", path)
    assert "'openvin'" in error
    assert all(name in error for name in plugins.names("backends"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when the pipeline begins."""
    from edgemm import pipeline

    monkeypatch.setattr(pipeline, "load", lambda *_: pytest.fail("the pipeline began"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "bogus"], "'bogus'"),
        (["--recipe", "absent.yaml"], "absent.yaml"),
        (["--target", "bogus"], "'bogus'"),
        (["--target", "x86-openvino", "--target", "absent.yaml"], "absent.yaml"),
        (["--data", "bogus"], "easy_vqa"),
        (["--data", "random:many"], "many"),
        (["--seed", "-1"], "-1"),
        (["--set", "nonsense"], "'nonsense'"),
        (["--set", "=5"], "'=5'"),
        (["--set", "seed="], "None"),
        (["--set", "seed=["], "seed=["),
        (["--set", "seed=2026-13-45"], "2026-13-45"),
        (["--set", "seed=!!bool x"], "!!bool x"),
        (["--set", "nonsense=5"], "nonsense"),
        (["--set", "prune.9.keep=0.5"], "prune.9.keep"),
        (["--set", "prune.0.keep=0"], "keep"),
        (["--set", "prune.0.keep=1.5"], "1.5"),
        (["--set", "prune.0.kep=0.5"], "'keep'"),
        (["--set", "quantize.use=bogus"], "nncf"),
        (["--set", "target.threads=0"], "threads"),
        (["--set", "target.nonsense=1"], "nonsense"),
        (["--set", "target=1"], "target"),
        (["--set", "target.backend=bogus"], "openvino"),
    ],
)
def test_compress_refuses_before_it_begins(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused("compress", *arguments, "-o", tmp_path / "out")
    assert not list(tmp_path.rglob("*-*")), "no artifact is made"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["nonsense"],
        ["compress", "--nonsense"],
        ["compress", "a", "b"],
        ["compress", "--seed", "x"],
        ["run"],
        ["recipes", "nonsense"],
        ["recipes", "show"],
        ["targets", "list", "--nonsense"],
        ["inspect"],
    ],
)
def test_wrong_usage_exits_2_with_usage_on_stderr(arguments: list[str]) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: edgemm" in result.stderr


@pytest.mark.parametrize("command", ["compress", "inspect", "evaluate"])
def test_unknown_model_is_refused(command: str, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "out")] if command == "compress" else []
    error = refused(command, tmp_path / "absent", *out)
    assert str(tmp_path / "absent") in error
    assert "reasoner" in error


def write_config(folder: Path, text: str = '{"model_type": "reasoner"}') -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", ["compress", "inspect", "evaluate"])
def test_model_directory_without_config_is_refused(command: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    out = ["-o", str(tmp_path / "out")] if command == "compress" else []
    error = refused(command, tmp_path / "model", *out)
    assert str(tmp_path / "model") in error
    assert "config.json" in error


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "{}", '{"architectures": ["X"]}', "[" * 100_000])
def test_model_whose_config_says_no_type_is_refused(text: str, tmp_path: Path) -> None:
    assert "config.json" in refused("inspect", write_config(tmp_path / "model", text))


@pytest.mark.parametrize("model_type", ["bogus", "", "../reasoner", "__init__", None, 5, ["reasoner"], {}])
def test_unknown_model_type_lists_the_known(model_type: Any, tmp_path: Path) -> None:
    error = refused("inspect", write_config(tmp_path / "model", json.dumps({"model_type": model_type})))
    assert repr(model_type) in error
    assert all(name in error for name in plugins.names("models"))


def test_model_without_weights_is_refused(tmp_path: Path) -> None:
    assert "model.safetensors" in refused("inspect", write_config(tmp_path / "model"))


@pytest.mark.parametrize("name", PICKLES)
def test_model_whose_weights_are_a_pickle_is_refused_unread(name: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model")
    marker = tmp_path / "ran"
    # GLOBAL posix.system, the command, TUPLE1, REDUCE, STOP
    (folder / name).write_bytes(b"cposix\nsystem\n(V touch " + str(marker).encode() + b"\ntR.")
    error = refused("compress", folder, "-o", tmp_path / "out")
    assert name in error
    assert "pickle" in error
    assert "safetensors" in error
    assert not marker.exists()


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A whole model directory to spoil."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_model_without_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("inspect", model)


@pytest.mark.parametrize("content", ["", "{}", "not JSON", '{"version": "1.0"}'])
def test_model_whose_tokenizer_is_none_is_refused(content: str, model: Path) -> None:
    (model / "tokenizer.json").write_text(content, encoding="utf-8")
    assert str(model) in refused("evaluate", model)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"\x80\x04not safetensors",
        lambda content: content[: len(content) // 2],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:8] + b"[" * (len(content) - 8),
    ],
    ids=["empty", "garbage", "half", "huge header", "deep header"],
)
def test_model_whose_weights_are_broken_is_refused(spoil: Callable[[bytes], bytes], model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(spoil(weights.read_bytes()))
    assert str(model) in refused("inspect", model)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 64},
        {"width": "wide"},
        {"width": None},
        {"heads": 0},
        {"heads": 3},
        {"fusion_layers": 3},
        {"vocab_size": -1},
        {"answers": 5},
        {"image_channels": []},
        {"pruned_heads": 5},
        {"pruned_heads": {"fusion.layers.0.cross_attention": 99}},
    ],
    ids=json.dumps,
)
def test_model_whose_config_does_not_fit_its_weights_is_refused(changes: dict[str, Any], model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_config(model, json.dumps({**config, **changes}))
    assert str(model) in refused("inspect", model)


@pytest.mark.parametrize("below", ["out", "a/b"])
def test_output_below_a_regular_file_is_refused(below: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert str(tmp_path / "file") in refused("compress", model, "-o", tmp_path / "file" / below)


def test_output_that_is_a_regular_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert str(tmp_path / "file") in refused("compress", model, "-o", tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


MANIFEST: dict[str, Any] = {
    "model": "brightness",
    "target": "box",
    "certificate": {"verdict": "PASS", "accuracy": []},
    "provenance": {},
}
PROGRAM: dict[str, Any] = {
    "components": [
        {
            "name": "fusion",
            "inputs": [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 4, 4]}],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
            "max_sizes": {"batch": 16},
        }
    ],
    "image": {"tensor": "pixel_values", "size": [4, 4], "resample": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
    "text": {"ids": "input_ids", "mask": "attention_mask", "tokenizer": "tokenizer.json", "max_tokens": 8},
    "output": {"tensor": "logits", "labels": ["light", "dark"]},
    "backend": "onnxruntime",
    "settings": {"threads": 1},
}


@pytest.fixture(scope="session")
def brightness(tiny_model: Path) -> dict[str, bytes]:
    """The files of a model that tells light images from dark ones: logits are the mean and its opposite."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixel_values"], ["mean"], axes=[1, 2, 3], keepdims=1),
            helper.make_node("Flatten", ["mean"], ["light"]),
            helper.make_node("Neg", ["light"], ["dark"]),
            helper.make_node("Concat", ["light", "dark"], ["logits"], axis=1),
        ],
        "brightness",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return {"fusion.onnx": model.SerializeToString(), "tokenizer.json": (tiny_model / "tokenizer.json").read_bytes()}


@pytest.fixture
def bundle(brightness: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "m.edgemm"
    path.write_bytes(write_bundle({**MANIFEST, "program": PROGRAM}, brightness))
    return path


def picture(folder: Path, value: int = 255) -> Path:
    path = folder / f"{value}.png"
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("value", "answer"), [(255, "light"), (0, "dark")])
def test_run_prints_the_answer_alone(value: int, answer: str, bundle: Path, tmp_path: Path) -> None:
    result = call("run", bundle, "--image", picture(tmp_path, value), "--text", "is it red?")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{answer}\n", "")


def test_run_prints_one_json_document(bundle: Path, tmp_path: Path) -> None:
    result = call("run", bundle, "--image", picture(tmp_path), "--text", "is it red?", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["answer"] == "light"
    assert document["probability"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)


def test_inspect_prints_one_json_document_about_a_bundle(bundle: Path) -> None:
    result = call("inspect", bundle, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["certificate"] == MANIFEST["certificate"]
    assert [c["name"] for c in document["components"]] == ["fusion"]
    assert set(document["files"]) == {"fusion.onnx", "tokenizer.json"}


@pytest.mark.parametrize("text", ["", "   ", "is " * 50])
def test_run_refuses_a_text_that_the_model_cannot_take(text: str, bundle: Path, tmp_path: Path) -> None:
    assert "text" in refused("run", bundle, "--image", picture(tmp_path), "--text", text)


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_run_refuses_an_image_that_is_absent_or_broken(content: bytes | None, bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    if content is not None:
        image.write_bytes(content)
    assert str(image) in refused("run", bundle, "--image", image, "--text", "is it red?")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"x" * 1000,
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        lambda content: content[:-HEX_DIGITS] + b"0" * HEX_DIGITS,
    ],
    ids=["empty", "garbage", "last byte", "half", "one bit", "seal"],
)
@pytest.mark.parametrize("command", ["run", "inspect", "evaluate", "verify"])
def test_broken_bundle_is_refused(command: str, spoil: Callable[[bytes], bytes], bundle: Path, tmp_path: Path) -> None:
    bundle.write_bytes(spoil(bundle.read_bytes()))
    more = ["--image", str(picture(tmp_path)), "--text", "is it red?"] if command == "run" else []
    assert str(bundle) in refused(command, bundle, *more)


@pytest.mark.parametrize("command", ["run", "inspect", "evaluate", "verify"])
def test_absent_bundle_is_refused(command: str, tmp_path: Path) -> None:
    more = ["--image", str(picture(tmp_path)), "--text", "is it red?"] if command == "run" else []
    assert "absent.edgemm" in refused(command, tmp_path / "absent.edgemm", *more)


@pytest.mark.parametrize(
    "program",
    [
        {},
        {**PROGRAM, "components": 5},
        {**PROGRAM, "components": [{"name": "fusion"}]},
        {**PROGRAM, "backend": "bogus"},
        {**PROGRAM, "backend": "measure"},
        {**PROGRAM, "backend": ".."},
        {**PROGRAM, "settings": {}},
        {**PROGRAM, "text": {**PROGRAM["text"], "tokenizer": "absent.json"}},
        {**PROGRAM, "image": {**PROGRAM["image"], "resample": "bogus"}},
        {**PROGRAM, "output": {"tensor": "logits", "labels": []}},
    ],
    ids=["empty", "components", "ports", "backend", "module", "parent", "settings", "tokenizer", "resample", "labels"],
)
def test_sealed_bundle_with_a_program_that_cannot_be_run_is_refused(
    program: dict[str, Any], brightness: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "m.edgemm"
    path.write_bytes(write_bundle({**MANIFEST, "program": program}, brightness))
    assert str(path) in refused("run", path, "--image", picture(tmp_path), "--text", "is it red?")


def test_sealed_bundle_without_provenance_is_refused_by_verify(bundle: Path) -> None:
    assert str(bundle) in refused("verify", bundle)
