"""Training of the scenes reasoner: what it draws, what it learns by, and that it goes on where it was killed."""

from __future__ import annotations

import csv
import math
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgemm.data import easy_vqa, scenes
from edgemm.data._scene_world import SHAPES
from edgemm.errors import InputError
from edgemm.reasoner import scenes_train as training
from edgemm.reasoner.corpus import UNKNOWN
from edgemm.reasoner.scenes_corpus import WRONG, ScenesCorpus
from edgemm.reasoner.scenes_losses import SUBSETS, balanced, pointed
from edgemm.reasoner.scenes_train import train_scenes
from edgemm.reasoner.scenes_validation import first_is_most
from edgemm.training import TrainScenes
from tests.checkpoints import SCENES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus() -> ScenesCorpus:
    return ScenesCorpus.build(scenes, 60, 20, seed=3)


def recipe(bf16: bool = False, **changes: object) -> TrainScenes:
    sizes: dict[str, object] = {
        "threads": 1,
        "scenes": 64,
        "validation_scenes": 16,
        "scenes_per_batch": 16,
        "questions_per_scene": 2,
        "alignment_epochs": 1,
        "reasoning_epochs": 2,
        "caption_epochs": 0,
        "bf16": bf16,
        "model": SCENES,
    }
    return TrainScenes.model_validate({**sizes, **changes})


def test_pictures_and_sounds_are_the_worlds(corpus: ScenesCorpus) -> None:
    assert corpus.images.shape == (80, 3, 64, 64)
    assert not set(corpus.training) & set(corpus.validation)
    for i in (0, 79):
        assert np.array_equal(corpus.images[i].permute(1, 2, 0).numpy(), scenes.draw(corpus.scenes[i]))
        sound = scenes.tones(corpus.scenes[i])
        assert corpus.lengths[i] == len(sound)
        wave = corpus.waves([i])[0]
        assert wave.shape == (len(sound),)
        assert np.allclose(wave.numpy(), sound, atol=1e-4)


def test_questions_of_a_scene_are_true_of_it_and_hang_on_the_key_alone(corpus: ScenesCorpus) -> None:
    texts, answers, kinds = corpus.questions([4, 9], 7, "a")
    assert len(texts) == len(answers) == len(kinds) == 14
    assert corpus.questions([9], 7, "a")[0] == texts[7:]
    assert corpus.questions([9], 7, "b")[0] != texts[7:]
    known = set()
    for seed in range(500):
        known |= {(q.text, q.answer) for q in scenes.questions(corpus.scenes[4], random.Random(seed))}
    assert {(t, corpus.answers[a]) for t, a in zip(texts[:7], answers[:7], strict=True)} <= known
    assert [corpus.answers[a] for a in corpus.counts([4])] == [str(len(corpus.scenes[4].things))]


def test_wrong_captions_are_wrong(corpus: ScenesCorpus) -> None:
    index = list(range(20))
    for own, wrong in zip(corpus.captions(index), corpus.wrong_captions(index), strict=True):
        assert len(wrong) == WRONG
        assert own not in wrong


def test_words_of_claims_that_hold_are_told_from_others(corpus: ScenesCorpus) -> None:
    i = next(
        i for i in range(60) if len(corpus.scenes[i].things) == 2 and len(corpus.wrong_captions([i, 0])[0]) == WRONG
    )
    said, wrong = (
        corpus.captions([i])[0],
        next(n.text for n in scenes.hard_negatives(corpus.scenes[i]) if n.kind == "relation"),
    )
    texts = [said, wrong]
    held, ids = corpus.holding([i], texts), corpus.encode(texts).ids
    assert held.shape == ids.shape
    names = [[corpus.tokenizer.id_to_token(t) for t in row.tolist()] for row in ids]
    for row, words in zip(held.tolist(), names, strict=True):
        for value, word in zip(row, words, strict=True):
            assert (value == UNKNOWN) == (word in ("[PAD]", "[CLS]", "[SEP]", ";", ",")) or word == "and"
    assert set(held[0].tolist()) == {UNKNOWN, 1.0}
    facts = names[1].index(";")
    assert set(held[1][:facts].tolist()) == {UNKNOWN, 1.0}
    assert set(held[1][facts:].tolist()) == {UNKNOWN, 0.0}


def test_names_in_texts_are_where_their_things_are_and_nowhere_when_there_are_none(corpus: ScenesCorpus) -> None:
    i = next(i for i in range(60) if len({(t.colour, t.shape) for t in corpus.scenes[i].things}) == 3)
    by_name = {t.name: t for t in corpus.scenes[i].things}
    texts = [corpus.captions([i])[0], "a big red circle and a small red square; the red circle is above the red square"]
    ids = corpus.encode(texts).ids[None]
    where, cells, places = corpus.mentions([i], ids, 8)
    words = [[corpus.tokenizer.id_to_token(t) for t in row] for row in ids[0].tolist()]
    named = [" ".join(words[k][at - 1 : at + 1]) for _, k, at in where.tolist()]
    for k, text in enumerate(texts):
        assert [name for name, (_, of, _) in zip(named, where.tolist(), strict=True) if of == k] == [
            f"{a} {b}" for a, b in pairwise(text.replace(";", "").replace(",", "").split()) if b in SHAPES
        ]
    for name, row, place in zip(named, cells, places.tolist(), strict=True):
        if name not in by_name:
            assert not row.any()
            assert place == [UNKNOWN, UNKNOWN]
            continue
        thing = by_name[name]
        assert place == [*thing.cell]
        for cell, value in enumerate(row.tolist()):
            away = max(abs(8 * (cell // 8) + 4 - thing.y), abs(8 * (cell % 8) + 4 - thing.x))
            assert value == (1 if away <= 4 else UNKNOWN if away < 13 else 0)


def test_the_grid_says_what_stands_where(corpus: ScenesCorpus) -> None:
    grid = corpus.grid([5], 16)[0].unflatten(0, (16, 16))
    for thing in corpus.scenes[5].things:
        cell = grid[thing.y // 4, thing.x // 4]
        assert {c for c, there in zip(corpus.concepts, cell, strict=True) if there == 1} == {
            thing.colour,
            thing.shape,
            thing.size,
        }
        edge = grid[thing.y // 4, min(15, thing.x // 4 + 2)]
        assert (edge == UNKNOWN).all()
    assert ((grid == 0).all(-1)).sum() > 60
    for scene, coarse in zip(corpus.scenes, corpus.grid(list(range(80)), 8), strict=True):
        said = {
            tuple(sorted(c for c, there in zip(corpus.concepts, cell, strict=True) if there == 1)) for cell in coarse
        }
        assert said - {()} == {tuple(sorted((t.colour, t.shape, t.size))) for t in scene.things}
    named = {w for t in corpus.scenes[5].things for w in (t.colour, t.shape, t.size)}
    holds = corpus.holds([5])[0]
    assert {c for c, there in zip(corpus.concepts, holds, strict=True) if there} == named


def test_balanced_counts_what_is_there_as_much_as_what_is_not() -> None:
    logits, truth = torch.zeros(1, 10), torch.tensor([[1.0, *[0.0] * 8, UNKNOWN]])
    assert float(balanced(logits, truth)) == pytest.approx(math.log(2))
    logits[0, 0], logits[0, 9] = 50, 50
    assert float(balanced(logits, truth)) == pytest.approx(math.log(2) / 2)


def test_pointing_is_cross_entropy_over_cells_and_none_of_them() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0], [1.0, 3.0, 0.0]])
    cells = torch.tensor([[1.0, 0.0, UNKNOWN], [0.0, 0.0, 0.0]])
    nowhere = torch.tensor([[0.0], [2.5]])
    there = -math.log(math.exp(2) / (1 + math.exp(2) + math.exp(0.5)))
    absent = -math.log(math.exp(2.5) / (math.exp(2.5) + math.exp(1) + math.exp(3) + 1))
    assert float(pointed(logits, nowhere, cells)) == pytest.approx((there + absent) / 2, rel=1e-5)


def test_modality_dropout_gives_every_subset() -> None:
    assert len(SUBSETS) == 7
    assert sum(SUBSETS.values()) == pytest.approx(1)


def test_first_is_most_counts_a_tie_as_a_miss() -> None:
    assert first_is_most(torch.tensor([[1.0, 1.0], [2.0, 1.0]])) == 0.5


def test_data_that_draws_no_scenes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="easy_vqa"):
        train_scenes(easy_vqa, recipe(), 0, tmp_path)


def test_sizes_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'wdith'"):
        train_scenes(scenes, recipe(model={"wdith": 32}), 0, tmp_path)


def run(out: Path, *, seed: int = 1, **changes: object) -> dict[str, Tensor]:
    model, corpus = train_scenes(scenes, recipe(**changes), seed, out)  # type: ignore[arg-type]
    assert model.config.min_samples == max(corpus.lengths)  # on a device a sound is as long as beside others here
    return model.state_dict()


def rows(out: Path) -> list[list[str]]:
    """log.csv without the seconds."""
    with (out / "log.csv").open(newline="") as f:
        return [[*row[:2], *row[3:]] for row in csv.reader(f)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_interrupted_and_resumed_ends_at_the_same_bits(tmp_path: Path, bf16: bool) -> None:
    whole = run(tmp_path / "whole", bf16=bf16)
    for stop in ("alignment epoch 1", "reasoning epoch 1", "reasoning epoch 2"):

        def interrupt(message: str, stop: str = stop) -> None:  # the epoch is done, and not yet written
            if message.startswith(stop):
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "log", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / stop, bf16=bf16)
        torch.manual_seed(99)  # a resumed run must not hang on the state of the process
        assert same(run(tmp_path / stop, bf16=bf16), whole), stop
        assert rows(tmp_path / stop) == rows(tmp_path / "whole"), stop
    assert rows(tmp_path / "whole")[0][-5:] == ["colour", "count", "existence", "implication", "relation"]
    assert [row[:2] for row in rows(tmp_path / "whole")[1:]] == [
        ["alignment", "1"],
        ["reasoning", "1"],
        ["reasoning", "2"],
    ]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    run(tmp_path, reasoning_epochs=1)
    for changes in ({"seed": 2}, {"reasoning_epochs": 2}):
        with pytest.raises(InputError, match="another training"):
            run(tmp_path, **{"reasoning_epochs": 1, **changes})
    torch.save({"stage": "perception", "epoch": 0}, tmp_path / "checkpoint.pt")  # of the other reasoner
    with pytest.raises(InputError, match="another training"):
        run(tmp_path, reasoning_epochs=1)


KILLED = """
import os, pathlib, sys, torch
from edgemm.data import scenes
from edgemm.reasoner import scenes_train as training
from edgemm.training import TrainScenes
save = training.torch.save
def kill(state, to):
    if (state["stage"], state["epoch"]) == ("captions", 1):
        os.kill(os.getpid(), 9)
    save(state, to)
training.torch.save = kill
training.train_scenes(scenes, TrainScenes.model_validate_json(sys.argv[1]), 1, pathlib.Path(sys.argv[2]))
"""


def test_after_kill_9_it_goes_on_from_the_last_whole_epoch(tmp_path: Path) -> None:
    """The child has made four epochs and written three."""
    sizes = {"reasoning_epochs": 1, "caption_epochs": 2}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, recipe(**sizes).model_dump_json(), str(tmp_path / "killed")],  # type: ignore[arg-type]
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [row[0] for row in rows(tmp_path / "killed")[1:]] == ["alignment", "reasoning", "captions"]
    assert same(run(tmp_path / "killed", **sizes), run(tmp_path / "whole", **sizes))


def test_frozen_encoders_stay_as_they_were_and_others_learn(tmp_path: Path) -> None:
    seen: dict[str, dict[str, Tensor]] = {}
    write = training.torch.save

    def keep(state: dict[str, object], to: object) -> None:
        losses = state["losses"]
        assert isinstance(losses, dict)
        seen[f"{state['stage']} {state['epoch']}"] = {n: t.clone() for n, t in losses.items()}
        write(state, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.torch, "save", keep)
        run(tmp_path, unfreeze=["audio"], caption_epochs=2)
    before, after = seen["alignment 0"], seen["reasoning 1"]
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    for name, frozen in (("image_encoder", True), ("text_encoder", True), ("audio_encoder", False), ("levels", False)):
        assert any(n.startswith(f"model.{name}") for n in changed) != frozen, name
    before, after = seen["captions 0"], seen["captions 1"]
    assert {n.split(".")[1] for n in before if not torch.equal(before[n], after[n])} == {"captioner"}


def test_it_stops_when_it_gets_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = training.Figures(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, {})
    monkeypatch.setattr(training, "validate", lambda model, corpus: figures)
    run(tmp_path, reasoning_epochs=9, patience=2)
    assert len(rows(tmp_path)) == 1 + 1 + 3


def test_loss_falls(tmp_path: Path) -> None:
    run(tmp_path, alignment_epochs=25, reasoning_epochs=25, patience=25, learning_rate=3e-3)
    for stage in ("alignment", "reasoning"):
        losses = [float(row[2]) for row in rows(tmp_path) if row[0] == stage]
        assert len(losses) == 25
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_every_parameter_is_learned(tmp_path: Path, corpus: ScenesCorpus) -> None:
    """A part that no loss reaches would be dead weight."""
    del tmp_path
    from edgemm.reasoner.config import ScenesConfig
    from edgemm.reasoner.scenes_losses import Losses
    from edgemm.reasoner.scenes_model import ScenesReasoner

    torch.manual_seed(0)
    config = ScenesConfig(answers=corpus.answers, vocab_size=corpus.tokenizer.get_vocab_size(), **SCENES)
    model = ScenesReasoner(config)
    losses = Losses(model, corpus, recipe())
    index = list(range(8))
    keys = {"image": model.image_encoder(corpus.pixels(index)), "audio": model.audio_encoder(corpus.waves(index))}
    rng = random.Random(0)
    total = losses.alignment(index, keys, rng)
    for step in range(40):  # enough for every subset
        total = total + losses.reasoning(index, keys, str(step), rng)
    total.backward()
    unlearned = [n for n, p in losses.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in unlearned if "k_proj.bias" not in n and "key.bias" not in n] == []
    assert isinstance(model, nn.Module)
