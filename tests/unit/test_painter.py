"""The painter: its codes, its decoder against the whole sentence at once, its graphs, its training, its pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
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
from edgemm.recipe import TrainPainter
from edgemm.runtime.pictures import URI, codes_of, png
from edgemm.runtime.query import Query
from edgemm.runtime.session import open_directory

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"width": 32, "text_layers": 1, "layers": 2, "channels": (8, 16), "levels": (3, 2)}


def build(album: Album, **changes: Any) -> Painter:
    torch.manual_seed(0)
    config = PainterConfig(album.tokenizer.get_vocab_size(), **{**SMALL, **changes})
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
    levels, codes = model.pictures.rounded(pixels)
    assert codes.shape == (3, model.config.cells) == (3, 2 * 64)
    assert 0 <= int(codes.min()) <= int(codes.max()) < model.config.codes == 6
    smooth = model.pictures.encoder(pixels).tanh()
    for channel in range(4):
        count = model.config.levels[channel % 2]
        possible = torch.linspace(-1, 1, count)
        nearest = (smooth[:, channel, ..., None] - possible).abs().argmin(-1)
        assert torch.allclose(levels[:, channel], possible[nearest])
        code = codes.view(3, 8, 8, 2)[..., channel // 2]
        assert torch.equal(code // 2 if channel % 2 == 0 else code % 2, nearest)
    assert torch.allclose(model.pictures.picture(codes), model.pictures(pixels).clamp(-1, 1), atol=1e-5)


def test_rounding_lets_gradients_through(album: Album) -> None:
    pictures = PictureCodes(PainterConfig(9, **SMALL))
    pictures(as_pixels(album.images[[0, 1]])).square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in pictures.encoder.parameters())


def test_a_token_that_is_no_code_is_painted_as_the_last(model: Painter) -> None:
    codes = torch.full((1, model.config.cells), model.config.codes - 1)
    assert torch.equal(model.pictures.picture(codes + 5), model.pictures.picture(codes))


def test_written_one_by_one_is_what_the_whole_gives(album: Album, model: Painter) -> None:
    ids, mask = album.said([0, 1, 2, 3])
    assert not bool(mask.all())  # some are padded
    written = model.write(ids, mask)
    begun = torch.cat([torch.full((4, 1), model.config.begin), written[:, :-1]], 1)
    assert torch.equal(model(begun, ids, mask).argmax(-1), written)
    alone = ids[:1, : int(mask[0].sum())]
    assert torch.equal(model.write(alone, torch.ones_like(alone)), written[:1])


def test_codes_share_what_their_levels_have_in_common(model: Painter) -> None:
    embed, config = model.embed, model.config
    zero = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        own = embed(zero + 3, zero) - embed.words.weight[3] - embed.places.weight[0]
        assert torch.allclose(own[0, 0], embed.parts[1] + embed.parts[3 + 1], atol=1e-5)  # 3 = 1 * 2 + 1
        place = embed(zero + config.begin, zero) - embed.words.weight[config.begin] - embed.places.weight[0]
        assert torch.allclose(place, torch.zeros(()), atol=1e-6)


def test_places_are_told_in_the_order_of_the_caption(album: Album, model: Painter) -> None:
    tokens = training.tokens_of(model, album, [0, 1, 2, 3, 4, 5])
    for row, i in zip(tokens, range(6), strict=True):
        scene, said = album.scenes[i], album.captions[i].split("; ")[0]
        places = row[: model.config.places].tolist()
        told = [(x, y) for x, y in zip(places[::2], places[1::2], strict=True) if x != model.config.nowhere]
        assert len(told) == len(scene.things)
        by_place = {(t.x, t.y): t for t in plainest(scene, 64).things}
        names = [by_place[x - model.config.codes, y - model.config.codes].name for x, y in told]
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
    codes = training.tokens_of(model, album, [0, 1])[:, model.config.places :]
    assert torch.equal(codes, model.pictures.rounded(as_pixels(album.plain[[0, 1]]))[1])


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
    assert words == [str(c) for c in model.write(*album.said([0]))[0, model.config.places :].tolist()]
    with pytest.raises(InputError, match="writes no text"):
        list(sessions[1].stream(text=album.captions[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": {"first": 6, "count": 5}}, "is not what a picture has"),
        ({"picture": {"codes": "other", "first": 6, "count": 128}}, "nothing makes the input 'codes'"),
        ({"picture": {"tensor": "other", "first": 6, "count": 128}}, "the answer needs 'other'"),
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


def test_codes_that_a_decoder_left_out_are_the_last_again() -> None:
    spec = {"first": 2, "count": 4}
    assert codes_of([9, 9, 1, 2, 3, 4, 5], spec).tolist() == [[1, 2, 3, 4]]
    assert codes_of([9, 9, 1, 2], spec).tolist() == [[1, 2, 2, 2]]
    assert codes_of([9], spec).tolist() == [[0, 0, 0, 0]]


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
        "validation_scenes": 8,
        "recogniser_scenes": 16,
        "picture_epochs": 1,
        "place_epochs": 1,
        "caption_epochs": 2,
    }
    return TrainPainter.model_validate({**sizes, "bf16": False, "model": SMALL, **changes})


def test_training_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train_painter(scenes, recipe(), 0, tmp_path / "a")
    told = training._Run.told
    calls = []

    def dies(run: Any, part: list[int], *, codes: bool) -> Any:
        calls.append(codes)
        if calls.count(True) == 3:  # in the second epoch of captions
            raise KeyboardInterrupt
        return told(run, part, codes=codes)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "told", dies)
        with pytest.raises(KeyboardInterrupt):
            train_painter(scenes, recipe(), 0, tmp_path / "b")
    again, _ = train_painter(scenes, recipe(), 0, tmp_path / "b")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with (tmp_path / "b" / "log.csv").open() as f:
        assert [(r["stage"], r["epoch"]) for r in csv.DictReader(f)] == [
            ("pictures", "1"),
            ("places", "1"),
            ("captions", "1"),
            ("captions", "2"),
        ]
    assert set(json.loads((tmp_path / "b" / "judged.json").read_text())) == {
        "by_rule",
        "by_recogniser",
        "recogniser_on_drawings",
    }


def test_data_that_draws_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="easy_vqa has no scenes"):
        train_painter(easy_vqa, recipe(), 0, tmp_path)
