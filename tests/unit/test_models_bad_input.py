"""Checkpoints, factories and media that users get wrong: exit code 2 and what to do, or an outcome that is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from edgemm import plugins
from edgemm.cli import build_app
from edgemm.errors import InputError
from edgemm.models import find_family, read_model, whole_program
from edgemm.models._sources import resolve
from edgemm.runtime import audio
from tests import checkpoints

CHECKPOINTS = ("bert", "clip", "resnet", "vit", "wav2vec2")
Spoil = Callable[[Path], object]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: checkpoints.write(name, folder / name) for name in CHECKPOINTS}


def opened(directory: Path) -> Any:
    family = find_family(directory)
    model = read_model(family, directory)
    whole_program(family, model, directory)
    return model


def refused(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        opened(directory)
    assert str(directory) in str(caught.value)
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


def configured(**values: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def weighted(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return spoil


def cast(dtype: torch.dtype) -> Spoil:
    return weighted(lambda w: w.update({k: v.to(dtype) for k, v in w.items() if v.is_floating_point()}))


def first(weights: dict[str, torch.Tensor]) -> str:
    return min(k for k, v in weights.items() if v.is_floating_point() and not k.startswith("pooler"))


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (weighted(lambda w: w.pop(first(w))), "the weights lack"),
        (weighted(lambda w: w.update(stray=torch.zeros(1))), "the model does not, stray (1 tensors)"),
        (weighted(lambda w: w.update({first(w): torch.zeros(7, 5)})), "in another shape"),
        (weighted(lambda w: w[first(w)].view(-1)[0].fill_(torch.nan)), "holds NaN or infinity"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights (model.safetensors)"),
    ],
    ids=["lacking", "left over", "of another shape", "NaN", "absent"],
)
def test_weights_that_are_not_the_models_are_refused(
    name: str, spoil: Spoil, told: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(whole[name], tmp_path / "model")
    spoil(directory)
    assert told in refused(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_float_width_becomes_fp32(dtype: torch.dtype, whole: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(whole["vit"], tmp_path / "model")
    cast(dtype)(directory)
    assert opened(directory).dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("pooler", [True, False])
def test_a_pooler_is_not_missed_and_not_needed(name: str, pooler: bool, whole: dict[str, Path], tmp_path: Path) -> None:
    import transformers as tf

    cls = {"bert": tf.BertModel, "vit": tf.ViTModel}[name]
    config = cls.config_class.from_pretrained(whole[name])
    shutil.copytree(whole[name], tmp_path / "model")
    cls(config, add_pooling_layer=pooler).save_pretrained(tmp_path / "model")
    model = opened(tmp_path / "model")
    assert model.pooler is None
    find_family(tmp_path / "model").save(model, tmp_path / "again", tmp_path / "model")
    for file in (tmp_path / "model").iterdir():  # tokenizer and processor
        if not (tmp_path / "again" / file.name).exists():
            shutil.copy(file, tmp_path / "again")
    assert opened(tmp_path / "again").state_dict().keys() == model.state_dict().keys()


def shard(directory: Path) -> None:
    """The second of two files is not there."""
    names = list(load_file(directory / "model.safetensors"))
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def graph_beside(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model.onnx")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (cast(torch.int8), "is I8"),
        (cast(torch.float8_e4m3fn), "is F8_E4M3"),
        (cast(torch.complex64), "is C64"),
        (configured(quantization_config={"quant_method": "bitsandbytes"}), "'bitsandbytes'"),
        (configured(quantization_config={"quant_method": "nonsense"}), "'nonsense'"),
        (configured(dtype="float99"), "float99"),
        (configured(hidden_size="wide"), "wide"),
        (configured(patch_size=0), "weights and config don't fit"),
        (configured(architectures=["ViTForMaskedImageModeling"]), "known for this model_type: ViTFor"),
        (configured(model_type="swin"), "known: bert, blip, clap, clip"),
        (shard, "model-00002-of-00002.safetensors"),
        (graph_beside, "compress the .onnx file itself"),
    ],
)
def test_a_checkpoint_that_cannot_be_exported_is_refused(
    spoil: Spoil, told: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(whole["vit"], tmp_path / "model")
    spoil(directory)
    assert told in refused(directory)


def test_an_unknown_architecture_shows_the_known_and_the_two_other_ways_in(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "florence2"}))
    error = refused(tmp_path)
    assert "model_type 'florence2' is not known" in error
    assert all(name in error for name in plugins.names("models"))
    assert "edgemm compress model.onnx" in error
    assert "edgemm compress package.module:factory" in error


@pytest.mark.parametrize("model_type", ["vit", "evil"])
def test_code_in_a_checkpoint_is_never_run(model_type: str, whole: dict[str, Path], tmp_path: Path) -> None:
    """A known family is read by transformers' own class; an unknown one is refused, and the error says why."""
    directory = shutil.copytree(whole["vit"], tmp_path / "model")
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoImageProcessor": "evil.Model"}
    configured(model_type=model_type, auto_map=names)(directory)
    if model_type == "vit":
        assert type(opened(directory)).__module__.startswith("transformers.")
    else:
        assert "its own code (auto_map) is not run" in refused(directory)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_weights_that_run_code_are_refused_unread(whole: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(whole["vit"], tmp_path / "model")
    (directory / "model.safetensors").unlink()
    torch.save({"classifier.bias": Evil(tmp_path / "ran")}, directory / "pytorch_model.bin")
    assert "save model.safetensors" in refused(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_a_feature_extractor_that_is_none_is_refused(
    content: str | None, whole: dict[str, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(whole["wav2vec2"], tmp_path / "model")
    path = directory / "preprocessor_config.json"
    path.unlink() if content is None else path.write_text(content)
    assert "cannot read preprocessor_config.json" in refused(directory)


GOOD = "lambda: (torch.nn.Linear(4, 2), {'input': torch.rand(3, 4)})"


def factory(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of its own name with a factory `make` in the current directory -> what compress is given."""
    monkeypatch.chdir(tmp_path)
    name = f"factory_{abs(hash(code)):x}"
    (tmp_path / f"{name}.py").write_text(f"import torch\n\nmake = {code}\n")
    return f"{name}:make"


def test_a_factory_in_half_precision_becomes_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = GOOD.replace("(4, 2)", "(4, 2, dtype=torch.bfloat16)")
    directory = resolve(factory(code, tmp_path, monkeypatch), runs=tmp_path / "runs")
    assert json.loads((directory / "config.json").read_text())["components"][0]["outputs"][0]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("no_such_module:make", "importing no_such_module raised ModuleNotFoundError: No module named"),
        ("no.such.package:make", "importing no.such.package raised ModuleNotFoundError"),
        ("json:make", "json has no function 'make'"),
        ("json:", "json has no function ''"),
        ("json:__doc__", "json has no function '__doc__'"),
        (":make", "importing  raised ValueError"),
    ],
)
def test_a_factory_that_is_not_there_is_named(model: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        resolve(model, runs=tmp_path)
    assert told in str(caught.value)
    assert "package.module:function" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero ("),
        ("lambda: {}['weights']", "raised KeyError: 'weights' ("),
        ("lambda size: None", "raised TypeError: "),
        ("lambda: None", "gave NoneType"),
        ("lambda: torch.nn.Linear(4, 2)", "gave Linear"),
        ("lambda: (torch.nn.Linear(4, 2), torch.rand(3, 4))", "gave tuple"),
        ("lambda: (torch.nn.Linear(4, 2), {})", "gave tuple"),
        (GOOD.replace("torch.rand(3, 4)", "[1.0]"), "input 'input' is list"),
        (GOOD.replace("torch.rand(3, 4)", "torch.rand(3, 4).half()"), "input 'input' is torch.float16"),
        (GOOD.replace("torch.rand(3, 4)", "torch.tensor(1.0)"), "input 'input' is torch.float32[]"),
        (GOOD.replace("torch.rand(3, 4)", "torch.rand(3, 5)"), "raised RuntimeError: mat1 and mat2 shapes"),
        (GOOD.replace("'input'", "'pixels'"), "raised TypeError: "),
        (GOOD.replace("Linear(4, 2)", "LSTM(4, 2)"), "output_1 is tuple"),
        (GOOD.replace("Linear(4, 2)", "Flatten(0)"), "output is torch.float32[12]"),
        (
            GOOD.replace(
                "Linear(4, 2)", "Linear(4, 2).requires_grad_(False).apply(lambda m: m.weight.fill_(torch.nan))"
            ),
            "weight holds NaN",
        ),
    ],
)
def test_a_factory_that_gives_something_else_is_refused(
    code: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = factory(code, tmp_path, monkeypatch)
    with pytest.raises(InputError) as caught:
        resolve(model, runs=tmp_path / "runs")
    assert told in str(caught.value)
    assert "\n  fix: " in str(caught.value)
    if " raised " in told and "Error: " in told and "TypeError" not in told and "mat1" not in told:
        assert f"{model.partition(':')[0]}.py:3)" in str(caught.value)


def evaluate(model: Path, folder: Path, *rows: dict[str, Any]) -> Result:
    """`edgemm evaluate` on a data file of these rows, the first of which is to calibrate on."""
    listed = [{**row, "split": "test" if i else "train"} for i, row in enumerate(rows)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, listed)))
    arguments = ["evaluate", str(model), "--data", str(folder / "rows.jsonl"), "--json"]
    return CliRunner().invoke(build_app(), arguments)


def test_grey_transparent_and_16_bit_images_are_answered(whole: dict[str, Path], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    kinds = [pixels[..., :3], pixels[..., 0], pixels, pixels[..., 1].astype(np.uint16) * 257]
    for i, kind in enumerate(kinds):
        Image.fromarray(kind).save(tmp_path / f"{i}.png")
    result = evaluate(whole["vit"], tmp_path, *({"image": f"{i}.png", "label": "LABEL_0"} for i in range(4)))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["accuracy"]["all"]["n"] == 3


def sound(path: Path, seconds: float, rate: int) -> dict[str, str]:
    """A row of noise that is no other file's."""
    noise = np.random.default_rng(abs(hash(path.name))).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(path, noise, rate)
    return {"audio": path.name, "transcript": "a"}


def test_audio_at_another_rate_is_resampled_and_that_is_said_once(whole: dict[str, Path], tmp_path: Path) -> None:
    audio._say_resampled.cache_clear()
    result = evaluate(whole["wav2vec2"], tmp_path, *(sound(tmp_path / f"{i}.wav", 0.5, 8_000) for i in range(4)))
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("audio at 8000 Hz is resampled to 16000 Hz") == 1


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("wav2vec2", lambda folder: sound(folder / "1.wav", 30.5, 16_000), "1.wav lasts 30.50 s"),
        ("wav2vec2", lambda folder: sound(folder / "1.wav", 0.01, 16_000), "1.wav lasts 0.0100 s"),
        ("wav2vec2", lambda folder: sound(folder / "1.wav", 0, 16_000), "row 2: audio"),
        ("clip", lambda folder: {"image": "0.png", "text": "a " * 40}, "the text has 42 tokens: 'a a"),
        ("clip", lambda folder: {"image": "0.png", "text": " "}, "a sample has no text"),
    ],
    ids=["long audio", "short audio", "empty audio", "long text", "empty text"],
)
def test_a_sample_that_the_model_cannot_take_is_named(
    name: str, row: Callable[[Path], dict[str, str]], told: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "0.png")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "first.png")
    fine = sound(tmp_path / "0.wav", 0.5, 16_000) if name == "wav2vec2" else {"image": "first.png", "text": "a"}
    result = evaluate(whole[name], tmp_path, fine, row(tmp_path))
    assert result.exit_code == 2, result.stderr
    assert told in result.stderr
    assert result.stdout == ""
