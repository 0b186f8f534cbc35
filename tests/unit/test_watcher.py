"""The watcher: resampler and memory against plain references, long videos, its graphs, its training, edgemm watch."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from edgemm.cli import build_app
from edgemm.data import easy_vqa, scenes
from edgemm.errors import InputError
from edgemm.models import _graph, find_family, open_fp32, read_model, reasoner, scenes_watcher, whole_program
from edgemm.models._sources import EMBEDDED
from edgemm.reasoner import watcher_train as training
from edgemm.reasoner.memory import Look, RecurrentMemory, Resampler, known
from edgemm.reasoner.reel import Reel
from edgemm.reasoner.watcher import EVENTS, Watcher, WatcherConfig
from edgemm.reasoner.watcher_train import train_watcher
from edgemm.report.bom import bill_of_materials
from edgemm.runtime.bundle import write_bundle
from edgemm.runtime.program import ComponentSpec
from edgemm.runtime.recurrence import read_chunks
from edgemm.runtime.serving.model import Model
from edgemm.runtime.serving.options import Options
from edgemm.runtime.session import Session, open_directory
from edgemm.runtime.watching import Watch, frames_of
from edgemm.target import Target
from edgemm.training import TrainWatcher
from edgemm.triton import write_repository
from tests.bundles import RECIPE

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "width": 32,
    "text_layers": 1,
    "channels": 8,
    "seeds": 3,
    "window": 2,
    "slots": 5,
    "readers": 1,
}
QUESTION = "is there a red circle at the end?"


@pytest.fixture(scope="module")
def reel() -> Reel:
    return Reel.build(scenes, 20, 6, seed=1)


@pytest.fixture(scope="module")
def model(reel: Reel) -> Watcher:
    torch.manual_seed(0)
    ids = tuple(reel.tokenizer.token_to_id(word) for word in reel.words)
    config = WatcherConfig(reel.answers, reel.words, ids, reel.tokenizer.get_vocab_size(), **SMALL)
    made = Watcher(config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture(scope="module")
def directory(reel: Reel, model: Watcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("watcher")
    (source / "tokenizer.json").write_text(reel.tokenizer.to_str(), encoding="utf-8")
    scenes_watcher.save(model, source / "model", source)
    return source / "model"


@pytest.fixture(scope="module")
def graphs(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    out = tmp_path_factory.mktemp("graphs")
    family = find_family(directory)
    model = read_model(family, directory)
    for component in family.components(model):
        _graph.onnx_export(component, out / f"{component.name}.onnx", 18)
    (out / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    program = whole_program(family, model, directory)
    (out / "program.json").write_text(json.dumps({**program, "backend": "onnxruntime", "settings": {"threads": 1}}))
    return open_directory(out)


@pytest.fixture(scope="module")
def bundle(graphs: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [*(f"{name}.onnx" for name in graphs.components), "tokenizer.json"]
    files = {name: graphs.files[name] for name in names}
    provenance = {
        "engine": "0" * 64,
        "source": "1" * 64,
        "data": "2" * 64,
        "recipe": RECIPE.model_dump(mode="json", by_alias=True),
        "target": Target(name="box", backend="onnxruntime").model_dump(mode="json", by_alias=True),
        "versions": {"edgemm": "3" * 16},
    }
    certificate = {"verdict": "PASS", "accuracy": []}
    named = {"version": 1, "model": "watcher", "target": "box", "certificate": certificate}
    manifest = {**named, "program": graphs.program, "provenance": provenance}
    files["bom.cdx.json"] = bill_of_materials(manifest, files)
    path = tmp_path_factory.mktemp("bundle") / "watcher.edgemm"
    path.write_bytes(write_bundle(manifest, files))
    return path


def video(frames: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (frames, 64, 64, 3), np.uint8))


def test_a_look_is_attention_and_a_step_by_hand() -> None:
    torch.manual_seed(0)
    look, queries, keys = Look(8, 2, 2), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    own = look.attention
    q, k, v = own.q_proj(look.query_norm(queries)), own.k_proj(look.key_norm(keys)), own.v_proj(look.key_norm(keys))
    rows = []
    for n in range(2):
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            heads.append((q[n, :, h] @ k[n, :, h].T / 2).softmax(-1) @ v[n, :, h])
        rows.append(own.o_proj(torch.cat(heads, -1)))
    expected = queries + torch.stack(rows)
    expected = expected + look.fc2(F.gelu(look.fc1(look.ffn_norm(expected))))
    assert torch.allclose(look(queries, keys), expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_latents_are_as_many_whatever_the_length(tokens: int) -> None:
    resampler = Resampler(8, 2, 2, layers=2)
    latents = resampler(torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, tokens, 8), torch.zeros(2, tokens))
    assert latents.shape == (2, 3, 8)
    assert torch.allclose(latents.square().mean(2), torch.ones(2, 3), atol=1e-3)


def test_what_does_not_count_is_not_looked_at() -> None:
    resampler, seeds, tokens = Resampler(8, 2, 2, layers=2), torch.randn(2, 2, 3, 8), torch.randn(2, 6, 8)
    counts = torch.tensor([0.0, -1e4, 0.0, -1e4, -1e4, 0.0]).expand(2, -1)
    kept = counts[0] == 0
    assert torch.allclose(
        resampler(*seeds, tokens, counts), resampler(*seeds, tokens[:, kept], counts[:, kept]), atol=1e-5
    )


def test_the_window_keeps_the_last_chunks_and_slots_take_what_leaves_it_by_a_gate() -> None:
    torch.manual_seed(0)
    memory, first, later = RecurrentMemory(8, 2, 2, slots=4), torch.randn(2, 3, 8), torch.randn(5, 2, 3, 8)
    empty = torch.zeros(2, 2 * 3 + 4, 8)
    once = memory(empty, first)
    assert torch.equal(once, torch.cat([empty[:, :3], first, empty[:, 6:]], 1))  # nothing has left: no slot moves
    full = memory(once, later[0])
    assert torch.equal(full, torch.cat([first, later[0], empty[:, 6:]], 1))
    with torch.no_grad():
        memory.gate.weight.zero_()
        memory.gate.bias.fill_(-50)
        assert torch.allclose(memory(full, later[1]), torch.cat([later[0], later[1], empty[:, 6:]], 1), atol=1e-5)
        memory.gate.bias.fill_(50)
        leaves = first / first.square().mean((1, 2), keepdim=True).sqrt()
        slots = memory.start.expand(2, -1, -1)
        new = memory.norm(memory.look(slots, torch.cat([slots, leaves], 1)))
        after = memory(torch.cat([leaves, full[:, 3:]], 1), later[1])
        assert torch.allclose(memory.parts(after)[1], new, atol=1e-5)


def test_rows_of_nothing_are_not_looked_at() -> None:
    assert known(torch.cat([torch.zeros(1, 2, 8), torch.ones(1, 2, 8)], 1)).tolist() == [
        pytest.approx([-29.9, -29.9, 0, 0], abs=0.1)
    ]


@torch.inference_mode()
def test_one_chunk_by_way_of_the_memory_is_the_unchunked_path(model: Watcher, reel: Reel) -> None:
    """A chunk's tokens and seeds, gathered cell by cell, go through the resampler alone; words look at its latents."""
    frames, config = torch.randn(2, 4, 3, 64, 64), model.config
    encoder, embeddings = model.frame_encoder, model.text_encoder.bert.embeddings.word_embeddings.weight
    grids = encoder.grid(frames.flatten(0, 1)).unflatten(0, (2, 4))
    tokens: list[list[Any]] = [[], []]
    seeds: list[list[Any]] = [[], []]
    names: list[list[Any]] = [[], []]
    counts: list[list[Any]] = [[], []]
    for n in range(2):
        for f in range(4):
            cells = [(float(encoder.there(grids[n, f, :, y, x])), y, x) for y in range(16) for x in range(16)]
            for at, (there, y, x) in enumerate(sorted(cells, reverse=True)[: config.cells]):
                cell = grids[n, f, :, y, x]
                spelled = torch.zeros(config.width)
                for share, word in zip(encoder.what(cell).sigmoid(), config.word_ids, strict=True):
                    spelled += share * encoder.there(cell).sigmoid() * embeddings[word] * 50 / 2**0.5
                token = spelled + model.project(cell) + model.place.weight[16 * y + x] + model.age[f - 4]
                tokens[n].append(token)
                seeds[n] += [token] * (at < config.seeds)
                names[n] += [spelled] * (at < config.seeds)
                counts[n].append(np.log(1 / (1 + np.exp(-there))))
    made = [torch.stack([torch.stack(row) for row in rows]) for rows in (seeds, names, tokens)]
    latents = model.resampler(*made, torch.tensor(counts).float())
    state = model.see(frames)
    window, slots = model.memory.parts(state)
    assert torch.allclose(window[:, -config.latents :], latents, atol=1e-4)
    assert not window[:, : -config.latents].any()
    assert torch.equal(slots, model.memory.start.expand(2, -1, -1))
    ids, mask = reel.encode([QUESTION, QUESTION])
    words = model.text_encoder(ids, mask)
    keys = torch.cat([latents + model.age[-4:].repeat_interleave(config.seeds, 0), slots], 1)
    seen = torch.cat([words[:, :1], words[:, 1:] + words[:, :-1]], 1)
    for reader, mixer in zip(model.readers, model.mixers, strict=True):
        seen = reader(seen, keys)
        seen = mixer(seen, seen)
    assert torch.allclose(model.look(words, mask, state), seen, atol=1e-4)


def test_chunks_are_seen_one_after_the_other_and_the_last_is_filled_up(model: Watcher) -> None:
    frames = torch.randn(1, 10, 3, 64, 64)
    state = model.empty(1)
    for at in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]):
        state = model.watch(frames[:, at], state)
    assert torch.equal(model.see(frames), state)


def test_padding_of_a_question_counts_for_nothing(model: Watcher, reel: Reel) -> None:
    state = model.see(torch.randn(1, 4, 3, 64, 64))
    ids, mask = reel.encode([QUESTION, "has the red circle just moved onto the blue square?"])
    assert not bool(mask.all())
    both = model.read(model.text_encoder(ids, mask), mask, state.expand(2, -1, -1))
    ids, mask = reel.encode([QUESTION])
    assert torch.allclose(model.read(model.text_encoder(ids, mask), mask, state), both[:1], atol=1e-4)


def test_what_latents_and_names_are_taught_is_what_happens(reel: Reel) -> None:
    for i, clip in enumerate(reel.clips[:6]):
        assert [reel.names[q] for q in reel.named(i)] == [thing.name for thing in clip.things]
        for frame in (7, 15):
            facts = reel.facts(i, frame)
            assert facts[:, 0].tolist() == [float(track[frame] is not None) for track in clip.tracks]
            happened = {(e.subject, e.kind): e.frame for e in clip.events if e.frame <= frame}
            happened |= {
                (e.target, "is moved onto"): e.frame for e in clip.events if e.kind == "onto" and e.frame <= frame
            }
            told = {
                (thing.name, kind): frame - round(8 * float(row[9 + at].expm1()))
                for thing, row in zip(clip.things, facts, strict=True)
                for at, kind in enumerate(EVENTS)
                if row[1 + at]
            }
            assert told == happened
        grid, where = reel.grid(i, 0, 16), reel.where(i, 16)
        assert grid[:, 0].sum() == sum(track[0] is not None for track in clip.tracks)
        for thing, track, cells in zip(clip.things, clip.tracks, where.T.tolist(), strict=True):
            assert cells == [-1 if at is None else 16 * (at[1] // 4) + at[0] // 4 for at in track]
            if cells[0] >= 0:
                assert {w for w, x in zip(reel.words, grid[cells[0], 1:], strict=True) if x} == {
                    thing.colour,
                    thing.shape,
                }


def test_the_last_word_of_a_name_is_of_its_thing(reel: Reel) -> None:
    ids, _ = reel.encode([QUESTION, "has the red circle just moved onto the blue square?"])
    found = [
        (row, reel.tokenizer.id_to_token(int(ids[row, at])), reel.names[q])
        for row, at, q in reel.mentions(ids).tolist()
    ]
    assert found[-2:] == [(1, "circle", "red circle"), (1, "square", "blue square")]
    assert {row for row, *_ in found[:-2]} == {0}


def test_graphs_watch_and_answer_as_the_model(model: Watcher, directory: Path, graphs: Session, reel: Reel) -> None:
    shown = video(10)
    frames = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    ids, mask = reel.encode([QUESTION])
    expected = model(frames, ids, mask)[0].detach().numpy()
    for session in (graphs, open_fp32(scenes_watcher, model, directory)):
        watch = Watch(session)
        watch.see(iter(shown))
        answer = watch.ask(QUESTION)
        assert watch.frames == 10
        assert np.allclose(answer.outputs["logits"], expected, atol=1e-4)
        assert answer.answer == reel.answers[int(expected.argmax())]


@pytest.mark.parametrize("frames", [3, 4, 10])
def test_a_session_takes_a_whole_clip_by_the_same_way(graphs: Session, frames: int) -> None:
    shown, met = video(frames), []
    watch = Watch(graphs)
    watch.see(shown)
    pixels = np.stack(shown).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    clip = {"frames": pixels}
    graphs.observe = lambda name, given: met.append((name, given))
    answer = graphs.run(text=QUESTION, tensors=clip)
    graphs.observe = None
    assert np.array_equal(answer.outputs["logits"], watch.ask(QUESTION).outputs["logits"])
    chunks = [given for name, given in met if name == "watch"]
    assert len(chunks) == -(-frames // 4)
    assert all(given["frames"].shape == (1, 4, 3, 64, 64) for given in chunks)
    assert not chunks[0]["state"].any()


def test_inputs_of_other_lengths_are_refused() -> None:
    def port(name: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "dtype": "float32", "shape": ["batch", *shape]}

    spec = {"name": "watch", "state": ["state", "seen"], "inputs": [port("a", 4), port("b", 4), port("state", 5)]}
    for a, b in ((4, 5), (0, 0)):
        known = {"a": np.zeros((1, a), np.float32), "b": np.zeros((1, b), np.float32)}
        with pytest.raises(InputError, match=f"there are {a} of a, {b} of b"):
            read_chunks(cast(Any, SimpleNamespace(spec=spec)), known)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"state": ["state", "logits"]}, "state and logits are no input and output"),
        ({"state": ["before", "seen"]}, "before and seen are no input and output"),
        ({"outputs": [{"name": "seen", "dtype": "float32", "shape": ["batch", 17, 32]}]}, "of one fixed shape"),
        ({"state": ["frames", "seen"]}, "of one fixed shape"),
    ],
)
def test_a_state_that_does_not_go_round_is_refused(graphs: Session, change: dict[str, Any], told: str) -> None:
    component = {**graphs.program["components"][0], **change}
    with pytest.raises(ValueError, match=told):
        ComponentSpec.model_validate(component)


def test_chunks_of_two_sizes_are_refused(graphs: Session) -> None:
    component = graphs.program["components"][0]
    frames, state = component["inputs"]
    for shape in (["batch", 5], ["batch"], ["batch", "chunk"]):
        times = {"name": "times", "dtype": "float32", "shape": shape}
        with pytest.raises(ValueError, match="no chunks of one fixed size"):
            ComponentSpec.model_validate({**component, "inputs": [frames, times, state]})


def test_the_scenes_to_watch_are_those_that_are_written() -> None:
    rows = scenes.watched("train")
    assert len(rows) == 300
    drawn = list(islice(scenes.clips("train", 0), 2))
    rng = random.Random("clip questions train 0")
    assert [(r.text, r.label) for r in rows[:6]] == [
        (q.text, q.answer) for clip in drawn for q in scenes.clip_questions(clip, rng)
    ]
    pixels = (rows[3].tensors["frames"] + 1) * 127.5
    assert np.array_equal(pixels.round().astype(np.uint8).transpose(0, 2, 3, 1), scenes.frames(drawn[1]))
    assert [r.group for r in rows[:6]] == ["train-clip-00000"] * 3 + ["train-clip-00001"] * 3


def test_seen_in_parts_is_seen_at_once(graphs: Session) -> None:
    shown, whole, parts = video(12), Watch(graphs), Watch(graphs)
    whole.see(shown)
    parts.see(shown[:4])
    parts.ask(QUESTION)
    parts.see(shown[4:])
    assert np.array_equal(whole.state, parts.state)


def test_a_long_video_leaves_a_memory_of_the_same_size_and_no_overflow(model: Watcher) -> None:
    torch.manual_seed(0)
    state, tokens = model.empty(1), torch.randn(7, 1, 4, 8, model.config.channels) * 3
    cells = torch.randint(256, (7, 1, 4, 8))
    largest = []
    with torch.inference_mode():
        for chunk in range(2500):  # 10,000 frames
            state = model.remember(tokens[chunk % 7], cells[chunk % 7], state)
            largest.append(float(state.abs().max()))
    assert state.shape == (1, model.config.rows, model.config.width)
    assert max(largest[-100:]) <= 2 * max(largest[:100])


def test_edgemm_watch_answers_each_question_as_the_session_does(bundle: Path, graphs: Session, tmp_path: Path) -> None:
    clip = scenes.frames(next(scenes.clips("test", 0)))
    (tmp_path / "clip.png").write_bytes(scenes.png(clip.reshape(-1, 64, 3)))
    watch, other = Watch(graphs), "is there a blue square at the end?"
    watch.see(clip)
    asked = ["--text", QUESTION, "--text", other]
    shown = CliRunner().invoke(build_app(), ["watch", str(bundle), str(tmp_path / "clip.png"), *asked, "--json"])
    assert shown.exit_code == 0, shown.output
    expected = [{"text": text, **watch.ask(text).as_json("labels")} for text in (QUESTION, other)]
    assert json.loads(shown.stdout) == {"frames": 16, "answers": expected}
    told = CliRunner().invoke(build_app(), ["watch", str(bundle), str(tmp_path / "none.png"), "--text", QUESTION])
    assert told.exit_code == 2
    told = CliRunner().invoke(build_app(), ["watch", str(bundle), str(tmp_path / "clip.png")])
    assert told.exit_code == 2


def test_what_watches_is_neither_served_nor_made_an_ensemble(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="watches, which is not served"):
        Model(bundle, Options())
    with pytest.raises(InputError, match="has a memory"):
        write_repository(bundle, tmp_path / "r", None, None)


def test_a_model_that_does_not_watch_is_refused() -> None:
    session = open_fp32(reasoner, read_model(reasoner, EMBEDDED["reasoner"]), EMBEDDED["reasoner"])
    with pytest.raises(InputError, match="watches no video"):
        Watch(session)


def test_what_is_no_video_is_refused(graphs: Session, directory: Path, tmp_path: Path) -> None:
    watch = Watch(graphs)
    with pytest.raises(InputError, match="nothing was seen yet"):
        watch.ask(QUESTION)
    with pytest.raises(InputError, match=r"a frame is uint8\[32, 32, 3\]"):
        watch.see([np.zeros((32, 32, 3), np.uint8)])
    with pytest.raises(InputError, match="has no images"):
        list(frames_of(tmp_path, 64))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png can't be read"):
        list(frames_of(tmp_path, 64))


def test_frames_of_a_directory_come_in_the_order_of_names_and_of_one_size(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        Image.new("RGB", (64, 64) if i else (20, 30), (i, i, i)).save(tmp_path / f"{i:03}.png")
    made = list(frames_of(tmp_path, 64))
    assert [int(f.mean()) for f in made] == [0, 1, 2]
    assert all(f.shape == (64, 64, 3) for f in made)


def test_frames_stand_one_below_the_other_in_the_files_of_clips(tmp_path: Path) -> None:
    clip = scenes.frames(next(scenes.clips("test", 0)))
    (tmp_path / "clip.png").write_bytes(scenes.png(clip.reshape(-1, 64, 3)))
    assert np.array_equal(np.stack(list(frames_of(tmp_path / "clip.png", 64))), clip)
    assert next(iter(frames_of(tmp_path / "clip.png", 32))).shape == (32, 32, 3)
    Image.new("RGB", (64, 100)).save(tmp_path / "odd.png")
    with pytest.raises(InputError, match="100 rows of pixels, 64 wide, are no square frames"):
        list(frames_of(tmp_path / "odd.png", 64))
    with pytest.raises(InputError, match=r"absent\.png can't be read"):
        list(frames_of(tmp_path / "absent.png", 64))


def recipe(**changes: Any) -> TrainWatcher:
    sizes = {
        "clips": 8,
        "validation_clips": 4,
        "frame_epochs": 1,
        "thing_epochs": 1,
        "clip_epochs": 2,
        "clip_batch": 4,
        "windows": (1, 2),
    }
    return TrainWatcher.model_validate({**sizes, "bf16": False, "model": SMALL, **changes})


def test_training_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train_watcher(scenes, recipe(), 0, tmp_path / "a")
    answered = training._Run.answered
    calls = []

    def dies(run: Any, part: list[int], *given: Any) -> Any:
        calls.append(part)
        if len(calls) == 3:  # in the second epoch of clips
            raise KeyboardInterrupt
        return answered(run, part, *given)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "answered", dies)
        with pytest.raises(KeyboardInterrupt):
            train_watcher(scenes, recipe(), 0, tmp_path / "b")
    again, _ = train_watcher(scenes, recipe(), 0, tmp_path / "b")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_is_asked_by_a_frame_is_what_the_clip_has_shown_by_then() -> None:
    for clip in islice(scenes.clips("train", 3), 40):
        asked = {q.text: q.answer for q in scenes.questions_by(clip, 15)}
        for question in scenes.clip_questions(clip, random.Random(0)):
            assert asked[question.text] == question.answer
        guest, change = clip.things[0], next(e for e in clip.events if e.kind in ("appears", "vanishes"))
        for frame in range(16):
            by_then = {q.text: q.answer for q in scenes.questions_by(clip, frame)}
            there = (frame >= change.frame) == (change.kind == "appears")
            assert by_then[f"is there a {guest.name} at the end?"] == ("yes" if there else "no")
            others = [e for e in clip.events if e is not change and e.frame <= frame]
            assert sum(" before " in text for text in by_then) == (len(others) if change.frame <= frame else 0)


def test_questions_hang_on_the_key_alone(reel: Reel) -> None:
    assert reel.questions(3, "a") == reel.questions(3, "a")
    assert reel.questions(3, "a") == scenes.clip_questions(reel.clips[3], random.Random("1 a 3"))


def test_data_without_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="easy_vqa has no clips"):
        train_watcher(easy_vqa, recipe(), 0, tmp_path)
