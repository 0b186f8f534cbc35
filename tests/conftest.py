"""What several suites need: a small model, the command line as a user runs it, the main job run once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NO_TIMED_GATE = ("--set", "target.budgets.min_speedup=null")  # the clock decides no test
Run = Callable[..., subprocess.CompletedProcess[str]]
WITHOUT_TOOLCHAIN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "onnx", "onnxruntime", "nncf", "safetensors"}:
            raise ImportError(f"{name} is not on the device")
sys.meta_path.insert(0, Blocked())
from edgemm.cli import main
main()
"""


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled graphs are kept for this run of the tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEMM_CACHE", str(tmp_path_factory.mktemp("cache") / "edgemm"))
        yield


@pytest.fixture(scope="session")
def edgemm() -> Run:
    """Run `edgemm ARGS` in a process of its own; stdout and stderr as text."""

    def run(*args: str | Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgemm", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def device() -> Run:
    """Run `edgemm ARGS` where the toolchain can't be imported."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_TOOLCHAIN, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread, for models too small to share."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reasoner of 0.1 M parameters with seeded random weights, in a directory that `compress` takes."""
    import torch

    from edgemm.data.easy_vqa import samples
    from edgemm.models import reasoner
    from edgemm.reasoner.corpus import build_tokenizer
    from edgemm.reasoner.model import Reasoner, ReasonerConfig
    from tests.checkpoints import REASONER

    train = samples("train")
    answers = tuple(sorted({s.label for s in train}))
    tokenizer = build_tokenizer(sorted({s.text for s in train}), answers)
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer.save(str(directory.parent / "tokenizer.json"))
    torch.manual_seed(0)
    config = ReasonerConfig(
        answers=answers,
        vocab_size=tokenizer.get_vocab_size(),
        **REASONER,
    )
    reasoner.save(Reasoner(config).eval(), directory, directory.parent)
    return directory


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage at its smallest; random weights can't be held to a tight margin."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        "schema: 1\n"
        "data: easy_vqa\n"
        "calibration: 16\n"
        "prune: [{use: attention_heads, keep: 0.5, score: attention}]\n"
        "quantize: {use: nncf}\n"
        "verify: {limit: 200, rounds: 4, resamples: 1000, metrics: [{use: accuracy, margin: 0.9}]}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenVINO without budgets."""
    path = tmp_path_factory.mktemp("target") / "box.yaml"
    path.write_text("schema: 1\nbackend: openvino\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def main_job(edgemm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory where `edgemm compress reasoner --target x86-openvino -o out` ran; it has out/."""
    where = tmp_path_factory.mktemp("main_job")
    arguments = ("compress", "reasoner", "--target", "x86-openvino", "-o", where / "out", "--json")
    done = edgemm(*arguments, *NO_TIMED_GATE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((where / "out" / "report.json").read_text())
    return where


@pytest.fixture(scope="session")
def report(main_job: Path) -> dict[str, Any]:
    return json.loads((main_job / "out" / "report.json").read_text())


@pytest.fixture(scope="session")
def bundle(main_job: Path) -> Path:
    return main_job / "out" / "x86-openvino" / "reasoner-x86-openvino.edgemm"
