"""The painter: its codes, its decoder against the whole sentence at once, its graphs, its training, its pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edgemm.artifact import write_atomic
from edgemm.data import easy_vqa, scenes
from edgemm.errors import InputError
from edgemm.models import _graph, find_family, open_fp32, read_model, scenes_painter, whole_program
from edgemm.plugins import plugin
from edgemm.reasoner import painter_train as training
from edgemm.reasoner.album import Album, as_told, plainest
from edgemm.reasoner.painter import Painter, PainterConfig, PictureCodes
from edgemm.reasoner.painter_train import train_painter
from edgemm.reasoner.recogniser import Recogniser, as_pixels, train_recogniser
from edgemm.runtime.pictures import URI, png, whole
from edgemm.runtime.query import Query
from edgemm.runtime.session import open_directory
from edgemm.training import TrainPainter

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "width": 32,
    "text_layers": 1,
    "layers": 2,
    "channels": (8, 16),
    "code": 4,
    "levels": 3,
    "hidden": 16,
}


def build(album: Album, **changes: Any) -> Painter:
    torch.manual_seed(0)
    config = PainterConfig(album.tokenizer.get_vocab_size(), album.kinds, 3, **{**SMALL, **changes})
    model = Painter(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def album() -> Album:
    return Album.build(scenes, 40, 10, seed=1)


@pytest.fixture(scope="module")
def model(album: Album) -> Painter:
    return build(album)


@pytest.fixture(scope="module")
def directory(album: Album, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("painter")
    (source / "tokenizer.json").write_text(album.tokenizer.to_str(), encoding="utf-8")
    scenes_painter.save(build(album), source / "model", source)
    return source / "model"


def test_codes_are_the_nearest_levels_and_lead_back_to_them(album: Album, model: Painter) -> None:
    pixels = as_pixels(album.images[[0, 1, 2]])
    values, codes = model.pictures.rounded(pixels)
    assert codes.shape == (3, 64, 4)
    nearest = (model.pictures.encoder(pixels).tanh()[..., None] - torch.tensor([-1.0, 0, 1])).abs().argmin(-1)
    assert torch.equal(codes, nearest.flatten(2).transpose(1, 2))
    assert torch.allclose(values, nearest - 1.0)
    assert torch.allclose(model.pictures.picture(codes), model.pictures(pixels).clamp(-1, 1), atol=1e-5)


def test_rounding_lets_gradients_through(album: Album) -> None:
    pictures = PictureCodes(build(album).config)
    pictures(as_pixels(album.images[[0, 1]])).square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in pictures.encoder.parameters())


def test_codes_hang_on_what_stands_how_far_away(album: Album, model: Painter) -> None:
    """Things moved by a cell move their codes by one; the order of things, and what there isn't, change nothing."""
    config = model.config
    small, big = (scenes.Thing(shape="circle", colour="red", size=size, x=20, y=28) for size in ("small", "big"))

    def grid(*things: Any) -> torch.Tensor:
        return model.filling(torch.tensor([config.plan(things)]))[0].unflatten(0, (8, 8))

    one = grid(small, replace(big, x=44, y=36))
    assert torch.allclose(grid(replace(big, x=44, y=36), small), one, atol=1e-4)
    assert torch.allclose(grid(replace(small, x=28), replace(big, x=52, y=36))[:, 1:], one[:, :-1], atol=1e-4)
    assert torch.allclose(grid(replace(small, y=36), replace(big, x=44, y=44))[1:], one[:-1], atol=1e-4)
    assert not torch.allclose(grid(big, replace(big, x=44, y=36)), one, atol=1e-2)
    beyond = torch.tensor([[config.begin] * config.length])  # no pixel: as if there were nothing
    assert torch.allclose(model.filling(beyond), model.filling(torch.tensor([config.plan([])])))


def test_written_one_by_one_is_what_the_whole_gives(album: Album, model: Painter) -> None:
    ids, mask = album.said([0, 1, 2, 3])
    assert not bool(mask.all())  # some are padded
    written = model.write(ids, mask)
    begun = torch.cat([torch.full((4, 1), model.config.begin), written[:, :-1]], 1)
    assert torch.equal(model(begun, ids, mask).argmax(-1), written)
    alone = ids[:1, : int(mask[0].sum())]
    assert torch.equal(model.write(alone, torch.ones_like(alone)), written[:1])


def test_plans_tell_of_things_in_the_order_of_the_caption(album: Album, model: Painter) -> None:
    config = model.config
    for i, said in enumerate(album.captions[:6]):
        plan = config.plan(album.told[i])
        assert len(plan) == config.length == 15
        told = [plan[k : k + 5] for k in range(0, 15, 5) if plan[k] != config.nowhere]
        by_place = {(t.x, t.y): t for t in plainest(album.scenes[i], 64).things}
        assert len(told) == len(by_place)
        names = []
        for *kinds, x, y in told:
            words = [album.kinds[k - config.nowhere - 1] for k in kinds]
            thing = by_place[x, y]
            assert words == [thing.size, thing.colour, thing.shape]
            names.append(f"{words[0]} {thing.name}")
        assert [said.index(n) for n in names] == sorted(said.index(n) for n in names)


def test_the_plainest_scene_is_one_of_which_the_same_can_be_said(album: Album, model: Painter) -> None:
    for scene, plain, said in zip(album.scenes, album.plain, album.captions, strict=True):
        moved = plainest(scene, 64)
        assert moved.meaning == scene.meaning
        for places in ({t.x for t in moved.things}, {t.y for t in moved.things}):
            assert places == [{32}, {11, 53}, {11, 32, 53}][len(places) - 1]
        assert np.array_equal(plain, scenes.draw(moved))
        assert scenes.is_true(said, scenes.seen(plain))
    lone = [plainest(s, 64).things for s in album.scenes if len(s.things) == 1]
    assert {t.cell for (t,) in lone} == {(1, 1)}
    codes = training.codes_of(model, album)
    assert torch.equal(codes[:2], model.pictures.rounded(as_pixels(album.plain[[0, 1]]))[1])


def test_words_are_of_the_things_that_they_name(album: Album) -> None:
    for i, said in enumerate(album.captions):
        tokens = album.tokenizer.encode(said).tokens
        for k, thing in enumerate(as_told(album.scenes[i], said)):
            words = [t for t, m in zip(tokens, album.mentions[i].tolist(), strict=False) if m == k]
            assert words == thing.name.split() * said.count(thing.name)
    unsaid = album.mentions.masked_select(album.ids == 0)
    assert unsaid.numel() > 0
    assert bool((unsaid == -1).all())


def test_held_out_captions_are_of_the_test_split(album: Album) -> None:
    assert album.scenes[-10:] == [s for s, _ in zip(scenes.scenes("test", 1), range(10), strict=False)]
    assert not {s.told for s in album.scenes[:-10]} & {s.told for s in album.scenes[-10:]}


def test_drawings_are_judged_true_and_others_not(album: Album) -> None:
    right = album.images[album.validation]
    assert training.share_true(album, right) == 1.0
    assert training.share_true(album, np.roll(right, 1, 0)) == 0.0


def test_every_component_exports_and_paints_the_same(directory: Path, album: Album, tmp_path: Path) -> None:
    family = find_family(directory)
    model = read_model(family, directory)
    program = whole_program(family, model, directory)
    for component in family.components(model):
        _graph.onnx_export(component, tmp_path / f"{component.name}.onnx", 18)
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    settings = {"backend": "onnxruntime", "settings": {"threads": 1}}
    (tmp_path / "program.json").write_text(json.dumps({**program, **settings}))
    sessions = open_fp32(family, model, directory), open_directory(tmp_path)
    for i in (0, 7):
        ids, mask = album.said([i])
        expected = model.paint(ids, mask)[0].numpy()
        for session in sessions:
            answer = session.run(text=album.captions[i])
            assert answer.answer is not None
            assert answer.answer.startswith(URI)
            with Image.open(io.BytesIO(base64.b64decode(answer.answer.removeprefix(URI)))) as image:
                assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1
            assert answer.outputs["picture"].shape == (3, 64, 64)
    made = sessions[1].outputs([Query(text=album.captions[i]) for i in (0, 7)])
    assert np.array_equal(made["picture"][1], expected)
    words = made["text"][0].split()
    assert words == [str(c) for c in model.write(*album.said([0]))[0].tolist()]
    with pytest.raises(InputError, match="writes no text"):
        list(sessions[1].stream(text=album.captions[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": {"ids": "plan", "count": 5}}, "is not what a picture has"),
        ({"picture": {"ids": "other", "count": 15}}, "nothing makes the input 'plan'"),
        ({"picture": {"ids": "plan", "tensor": "other", "count": 15}}, "the answer needs 'other'"),
    ],
)
def test_programs_whose_picture_is_wrong_are_refused(directory: Path, change: dict[str, Any], message: str) -> None:
    family = find_family(directory)
    model = read_model(family, directory)
    program = whole_program(family, model, directory)
    program["output"] |= change
    (directory.parent / "program.json").write_text(
        json.dumps({**program, "backend": "onnxruntime", "settings": {"threads": 1}})
    )
    with pytest.raises(InputError, match=message):
        open_directory(directory.parent)


def test_pictures_are_held_to_their_captions(album: Album) -> None:
    captions = [album.captions[i] for i in album.validation]
    pictures = album.images[album.validation].copy()
    pictures[3] = pictures[4]
    outputs = {"text": np.array(["1 2"] * len(captions)), "picture": pictures}
    judged = plugin("metrics", "true_pictures").values(outputs, outputs, captions)
    assert judged.tolist() == [float(i != 3) for i in range(len(captions))]
    with pytest.raises(InputError, match="'a dog' names nothing that a scene has"):
        plugin("metrics", "true_pictures").values(outputs, outputs, [*captions[:-1], "a dog"])


def test_ids_that_a_decoder_left_out_are_the_last_again() -> None:
    assert whole([1, 2, 3, 4, 5], 4).tolist() == [[1, 2, 3, 4]]
    assert whole([1, 2], 4).tolist() == [[1, 2, 2, 2]]
    assert whole([], 4).tolist() == [[0, 0, 0, 0]]


def test_a_png_holds_the_picture(tmp_path: Path) -> None:
    picture = np.linspace(-1.2, 1.2, 3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    write_atomic(tmp_path / "p.png", png(picture))
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image).transpose(2, 0, 1)
    assert np.abs(pixels / 127.5 - 1 - picture.clip(-1, 1)).max() <= 0.5 / 127.5 + 1e-6


def test_the_recogniser_says_what_it_was_taught() -> None:
    drawn = [s for s, _ in zip(scenes.scenes("train", 5), range(60), strict=False)]
    recogniser = train_recogniser(scenes, drawn, 1, seed=0)
    assert isinstance(recogniser, Recogniser)
    logits = recogniser(as_pixels(scenes.draw(drawn[0])[None]))
    assert logits.shape == (1, 9, 1 + sum(map(len, recogniser.kinds)))
    with torch.no_grad():  # of a head that says one thing: a big red circle everywhere
        recogniser.head.weight.zero_()
        recogniser.head.bias.fill_(-1)
        names = [n for kind in recogniser.kinds for n in kind]
        for word in ("circle", "red", "big"):
            recogniser.head.bias[1 + names.index(word)] = 1
    things = recogniser.recognise(scenes, scenes.draw(drawn[0]))
    assert len(things) == 9
    assert {(t.size, t.name) for t in things} == {("big", "red circle")}
    assert [t.cell for t in things] == [(c, r) for r in range(3) for c in range(3)]


def recipe(**changes: Any) -> TrainPainter:
    sizes = {
        "scenes": 24,
        "code_batch": 12,
        "validation_scenes": 8,
        "recogniser_scenes": 16,
        "picture_epochs": 1,
        "plan_epochs": 1,
        "code_epochs": 2,
    }
    return TrainPainter.model_validate({**sizes, "bf16": False, "model": SMALL, **changes})


def test_training_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train_painter(scenes, recipe(), 0, tmp_path / "a")
    filled = training._Run.filled
    calls = []

    def dies(run: Any, part: list[int]) -> Any:
        calls.append(part)
        if len(calls) == 4:  # in the second epoch of codes
            raise KeyboardInterrupt
        return filled(run, part)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "filled", dies)
        with pytest.raises(KeyboardInterrupt):
            train_painter(scenes, recipe(), 0, tmp_path / "b")
    again, _ = train_painter(scenes, recipe(), 0, tmp_path / "b")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with (tmp_path / "b" / "log.csv").open() as f:
        assert [(r["stage"], r["epoch"]) for r in csv.DictReader(f)] == [
            ("pictures", "1"),
            ("plans", "1"),
            ("codes", "1"),
            ("codes", "2"),
        ]
    assert set(json.loads((tmp_path / "b" / "judged.json").read_text())) == {
        "by_rule",
        "by_recogniser",
        "recogniser_on_drawings",
    }


def test_data_that_draws_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="easy_vqa has no scenes"):
        train_painter(easy_vqa, recipe(), 0, tmp_path)
