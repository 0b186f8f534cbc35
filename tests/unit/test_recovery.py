"""Recovery: what it learns from, that it learns, that a killed run ends in the same bytes, and what it refuses."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgemm.artifact import Artifact
from edgemm.errors import InputError
from edgemm.models import find_family, read_model, reasoner
from edgemm.recipe import Recipe
from edgemm.recovery import Watched, _Lesson, check, distance, rate
from edgemm.stages.load import load
from edgemm.stages.prune import prune
from tests.unit.test_attention_heads import QUESTIONS, TOKENIZER, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = """
import sys, torch
from pathlib import Path
from edgemm.recipe import Recipe
from edgemm.stages.load import load
from edgemm.stages.prune import prune
torch.set_num_threads(1)
recipe = Recipe.model_validate_json(sys.argv[1])
prune(load(recipe, Path(sys.argv[2])), recipe, Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny model and forty images of noise, two questions each."""
    folder = tmp_path_factory.mktemp("recovery")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    reasoner.save(tiny(), folder / "model", folder)
    rng = np.random.default_rng(0)
    lines = ["id,image,text,label,split"]
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        part = "train" if i < 32 else "test"
        lines += [f"{i}-{q},{i}.png,{text},yes,{part}" for q, text in enumerate(QUESTIONS)]
    (folder / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Recipe.model_validate(
        {
            "schema": 1,
            "name": "tiny",
            "model": str(folder / "model"),
            "data": str(folder / "data.csv"),
            "calibration": 8,
            "prune": [{"use": "attention_heads", "keep": 0.5}, {"use": "key_tokens", "keep": 8}],
            "recover": {"samples": 64, "steps": 40, "batch": 8, "every": 5, "patience": 40, "learning_rate": 0.01},
        }
    )


def changed(recipe: Recipe, **options: Any) -> Recipe:
    assert recipe.recover
    return recipe.model_copy(update={"recover": recipe.recover.model_copy(update=options)})


def weights(artifact: Artifact) -> bytes:
    return (artifact.path / "model" / "model.safetensors").read_bytes()


def lesson(recipe: Recipe, source: Artifact) -> _Lesson:
    from edgemm.data import split
    from edgemm.models import open_fp32

    family = find_family(source.path / "model")
    session = open_fp32(family, read_model(family, source.path / "model"), source.path / "model")
    samples, _ = split(recipe.model_copy(update={"calibration": 1000}), lambda: source.json("program.json"))
    assert recipe.recover
    return _Lesson(session, samples, recipe.recover, recipe.seed)


@pytest.fixture(scope="module")
def recovered(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, Artifact]:
    """(FP32, pruned, recovered)."""
    runs = tmp_path_factory.mktemp("runs")
    source = load(recipe, runs)
    pruned = prune(source, recipe.model_copy(update={"recover": None}), runs)
    return source, pruned, prune(source, recipe, runs)


def test_it_comes_nearer_to_the_fp32_model(recipe: Recipe, recovered: tuple[Artifact, Artifact, Artifact]) -> None:
    source, pruned, made = recovered
    models = [Watched(reasoner, read_model(reasoner, a.path / "model")) for a in recovered]
    fp32, before, after = (lesson(recipe, source).judge(model, models[0]) for model in models)
    assert fp32 == pytest.approx(0, abs=1e-6)
    assert after < 0.7 * before
    assert made.json("pruning.json") == pruned.json("pruning.json")
    assert made.json("program.json") == pruned.json("program.json")
    assert {b.heads for b in reasoner.attentions(read_model(reasoner, made.path / "model"))} != {4}
    assert not list(made.path.parent.glob("recover-*")), "the checkpoint is no longer needed"


def test_what_is_held_back_and_the_test_split_are_not_learned(
    recipe: Recipe, recovered: tuple[Artifact, Artifact, Artifact]
) -> None:
    found = lesson(recipe, recovered[0])
    learned = {found.samples[i].group for batch in found.order() for i in batch}
    assert learned
    assert len(found.held_back) == 3
    assert not learned & found.held_back
    assert len(learned | found.held_back) == 32
    assert all(len({len(found.samples[i].text.split()) for i in batch}) == 1 for batch in found.order())


@pytest.mark.parametrize("kill_after", [1, 3])
def test_killed_run_goes_on_to_the_same_bytes(
    recipe: Recipe, recovered: tuple[Artifact, Artifact, Artifact], kill_after: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", RUN, recipe.model_dump_json(by_alias=True), str(tmp_path)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        assert run.stderr
        for line in run.stderr:
            if line.startswith(f"recover step {5 * (kill_after + 1)}/"):
                break
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("recover-*/checkpoint.pt"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "recover goes on at step" in done.stderr
    source = load(recipe, tmp_path)
    assert weights(prune(source, recipe, tmp_path)) == weights(recovered[2])


def test_it_stops_when_nothing_gets_better_and_keeps_the_best(
    recipe: Recipe, recovered: tuple[Artifact, Artifact, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load(recipe, tmp_path)
    harmful = changed(recipe, learning_rate=50.0, patience=2)
    made = prune(source, harmful, tmp_path)
    assert capsys.readouterr().err.count("samples held back") == 3  # at the start, and twice no better
    before = read_model(reasoner, recovered[1].path / "model").state_dict()
    after = read_model(reasoner, made.path / "model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "kind", "graph", "message"),
    [
        ({"prune": ()}, "labels", False, "nothing was pruned"),
        ({"data": "random:8"}, "labels", False, "can't learn from random:8"),
        ({}, "generation", False, "a model learns that writes text"),
        ({}, "transcript", False, "a model learns that writes text"),
        ({}, "labels", True, "came as a graph"),
    ],
)
def test_what_it_can_not_do_is_refused(
    recipe: Recipe, changes: dict[str, Any], kind: str, graph: bool, message: str
) -> None:
    check(recipe, "labels", True)
    with pytest.raises(InputError, match=message):
        check(recipe.model_copy(update=changes), kind, not graph)


def test_distance_of_each_kind_of_output() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.5, 0.5], [3.0, -1.0]])
    labels = {"kind": "labels", "tensor": "logits", "activation": "softmax"}
    expected = 0.0
    for student, teacher in zip(a.tolist(), b.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (teacher, student))
        expected += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / 2
    assert distance({"logits": a}, {"logits": b}, labels).item() == pytest.approx(expected, rel=1e-5)
    yes_or_no = distance({"logits": a}, {"logits": b}, {**labels, "activation": "sigmoid"})
    assert yes_or_no > distance({"logits": b}, {"logits": b}, {**labels, "activation": "sigmoid"})

    embeddings = {"kind": "embeddings", "tensors": {"image": "image_embeds", "text": "text_embeds"}}
    made = {"image_embeds": a, "text_embeds": b}
    assert distance(made, {"image_embeds": 3 * a, "text_embeds": b}, embeddings).item() == pytest.approx(0, abs=1e-6)
    assert distance(made, {"image_embeds": -a, "text_embeds": b}, embeddings).item() == pytest.approx(1)

    features = {"kind": "features", "tensors": ["x"]}
    assert distance({"x": 2 * a}, {"x": a}, features).item() == pytest.approx(1)
    with pytest.raises(InputError, match=r"x has shape \[2, 1\] where FP32's has \[2, 2\]"):
        distance({"x": a[:, :1]}, {"x": a}, features)


def test_learning_rate_goes_up_and_down() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] > 0.99
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 1e-3
