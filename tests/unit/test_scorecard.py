"""The scorecard: each figure held to one counted by hand from single answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from edgemm import scorecard
from edgemm.cli import build_app
from edgemm.data import easy_vqa, scenes
from edgemm.errors import InputError
from edgemm.inspection import opened
from edgemm.models import scenes_reasoner
from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.scenes_corpus import ScenesCorpus
from edgemm.reasoner.scenes_model import ScenesReasoner
from edgemm.runtime.query import Query
from edgemm.scorecard import Row, markdown, shown
from tests.checkpoints import SCENES

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 12


def call(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, as `edgemm train` writes it."""
    out = tmp_path_factory.mktemp("trained")
    corpus = ScenesCorpus.build(scenes, 40, 8, seed=0)
    (out / "tokenizer.json").write_text(corpus.tokenizer.to_str())
    torch.manual_seed(0)
    sizes = {"answers": corpus.answers, "vocab_size": corpus.tokenizer.get_vocab_size()}
    model = ScenesReasoner(ScenesConfig(**sizes, **SCENES)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.config = replace(model.config, exits=(0.3, 0.3))
    scenes_reasoner.save(model, out / "model", out)
    return out / "model"


def rows(trained: Path, task: str) -> dict[str, Row]:
    with opened(str(trained), task) as session:
        return {row.name: row for row in scorecard.scorecard(task, session, scenes, COUNT)}


def test_answers_are_counted_by_kind_level_and_subset(trained: Path) -> None:
    found = rows(trained, "answer")
    with opened(str(trained)) as session:
        asked = [(s, q) for s in shown(scenes, COUNT) for q in s.questions]
        right = [session.run(image=s.query.image, text=q.text).answer == q.answer for s, q in asked]
        counts = [session.run(audio=s.query.audio).answer == str(len(s.scene.things)) for s in shown(scenes, COUNT)]
        session.exits = {}
        last = [session.run(image=s.query.image, text=q.text).answer == q.answer for s, q in asked]
    assert found["questions"] == Row("answer", "questions", len(asked), pytest.approx(np.mean(right)))
    for kind in {q.kind for _, q in asked}:
        of_kind = [r for r, (_, q) in zip(right, asked, strict=True) if q.kind == kind]
        assert found[kind] == Row("answer", kind, len(of_kind), pytest.approx(np.mean(of_kind)))
    assert found["level 3 alone"].value == pytest.approx(np.mean(last))
    assert found["given audio"] == Row("answer", "given audio", COUNT, pytest.approx(np.mean(counts)))
    assert sum(name.startswith("given ") for name in found) == 7
    assert 0 <= found["questions that reach level 3"].value <= found["questions that reach level 2"].value <= 1
    assert found["ms a question, mean"].value > 0


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_recall_is_that_of_a_plain_sort(trained: Path, modality: str) -> None:
    found, told = rows(trained, f"find_{modality}"), shown(scenes, COUNT)
    with opened(str(trained), f"find_{modality}") as session:
        pairs = [Query(text=s.caption, **{modality: getattr(s.query, modality)}) for s in told]
        outputs = session.outputs(pairs)
    scores = outputs["text"] @ outputs[modality].T
    for name, table in ((f"text to {modality}", scores), (f"{modality} to text", scores.T)):
        ranks = [int((row > row[i]).sum()) for i, row in enumerate(table)]
        for k in scorecard.KS:
            assert found[f"{name}, recall@{k}"].value == pytest.approx(np.mean([r < k for r in ranks]))
    assert found["hard negatives, by similarity"].n == sum(bool(s.wrong) for s in told)
    assert ("hard negatives, by matching" in found) == (modality == "image")


def test_captions_of_a_model_that_knows_nothing_are_not_true(trained: Path) -> None:
    found = rows(trained, "caption")
    assert found["true"].value == found["word for word"].value == 0
    assert 0 <= found["BLEU-4"].value < 0.5


def test_macro_f1_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    said, truth = (rng.choice(["yes", "no", "circle"], 50) for _ in range(2))
    assert scorecard.macro_f1(said, truth) == pytest.approx(f1_score(truth, said, average="macro"))


def test_every_task_is_in_the_card_that_the_command_writes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scorecard.shown
    monkeypatch.setattr(scorecard, "shown", lambda world, _count: whole(world, COUNT))
    card = tmp_path / "card.md"
    figures = json.loads(call("evaluate", trained, "--card", card, "--json").stdout)["figures"]
    assert {f["task"] for f in figures} == set(scorecard.TASKS)
    lines = card.read_text().splitlines()
    assert len(lines) == 2 + len(figures)
    assert f"| caption | true | {COUNT} | 0.0000 |" in lines
    assert "recall@10" in call("evaluate", trained, "--card", card).stdout


def test_a_card_of_a_model_of_one_task_is_refused(tmp_path: Path) -> None:
    refused = call("evaluate", "reasoner", "--card", tmp_path / "card.md")
    assert refused.exit_code == 2
    assert "has not the tasks of a card" in refused.stderr
    assert not (tmp_path / "card.md").exists()


@pytest.mark.parametrize(("model", "task"), [("reasoner", "caption"), ("scenes", "paint")])
def test_tasks_that_a_model_does_not_have_are_refused(trained: Path, tmp_path: Path, model: str, task: str) -> None:
    given = trained if model == "scenes" else model
    refused = call("compress", given, "--data", "scenes", "--set", f"task={task}", "-o", tmp_path / "out")
    assert refused.exit_code == 2, refused.stderr
    assert f"has no task '{task}'" in refused.stderr


def test_data_that_draws_no_scenes_is_refused() -> None:
    with pytest.raises(InputError, match="easy_vqa has no asked"):
        shown(easy_vqa)


def test_the_table_is_markdown() -> None:
    made: list[Any] = [Row("model", "questions", 3, 1 / 3)]
    assert markdown(made, "scenes").splitlines()[-1] == "| model | questions | 3 | 0.3333 |"
