"""Parts of the scenes reasoner against plain references, and the whole with and without each modality."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.data import scenes as world
from edgemm.models import _graph, find_family, open_fp32, read_model, scenes_reasoner, sizes
from edgemm.reasoner.alignment import info_nce, triplet
from edgemm.reasoner.captioner import BEGIN, END
from edgemm.reasoner.config import ScenesConfig
from edgemm.reasoner.corpus import build_tokenizer
from edgemm.reasoner.encoders import AudioEncoder, ImageEncoder, TextEncoder, grid_signal
from edgemm.reasoner.fusion import Gates, Layer, SparseAttention
from edgemm.reasoner.graph import HeteroGraph
from edgemm.reasoner.model import Attention, attend
from edgemm.reasoner.scenes_corpus import writing
from edgemm.reasoner.scenes_model import ScenesReasoner
from edgemm.reasoner.scenes_validation import best_temperature, least_confidence
from edgemm.runtime.query import Query
from edgemm.runtime.session import open_directory
from tests.checkpoints import FULL_SCENES, SCENES

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ("how many circles are there?", "is there a red circle?")
SUBSETS = [s for n in (1, 2, 3) for s in combinations(("text", "image", "audio"), n)]


def tokenizer() -> Any:
    return build_tokenizer(list(TEXTS), ("no", "yes", "1", "2"))


def build(**changes: Any) -> ScenesReasoner:
    torch.manual_seed(0)
    answers = ("1", "2", "no", "yes")
    config = ScenesConfig(answers=answers, vocab_size=tokenizer().get_vocab_size(), **{**SCENES, **changes})
    model = ScenesReasoner(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> ScenesReasoner:
    return build()


def inputs(scenes: int, questions: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """pixel_values, input_values of so many scenes; input_ids and attention_mask of their questions."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 12, (scenes * questions, 6), generator=rng)
    return {
        "pixel_values": torch.randn(scenes, 3, 64, 64, generator=rng),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_values": torch.randn(scenes, 4000, generator=rng),
    }


def only(made: dict[str, Tensor], subset: tuple[str, ...]) -> dict[str, Tensor]:
    of = {"pixel_values": "image", "input_values": "audio", "input_ids": "text", "attention_mask": "text"}
    return {name: value for name, value in made.items() if of[name] in subset}


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


# Encoders


@torch.inference_mode()
def test_encoders_keep_time_and_place_and_have_one_width(model: ScenesReasoner) -> None:
    config, given = model.config, inputs(2)
    assert model.text_encoder(given["input_ids"], given["attention_mask"]).shape == (2, 6, config.width)
    image = model.image_encoder(given["pixel_values"])
    assert image.shape == (2, config.patches, config.width)
    audio = model.audio_encoder(given["input_values"])
    assert audio.shape == (2, config.frames(4000), config.width)
    pixels = given["pixel_values"].clone()
    pixels[:, :, :4, :4] = 9
    moved = (model.image_encoder(pixels) - image).abs().amax((0, 2)).unflatten(0, (16, 16))
    assert moved[:4, :4].amax() > 10 * moved[12:, 12:].amax()  # the far corner does not see it


@torch.inference_mode()
def test_a_cell_of_the_grid_says_its_row_and_column() -> None:
    signal = grid_signal(8, 192)[0].unflatten(0, (8, 8))
    for step, x in ((1.0, 0), (0.01, 47)):  # the fastest and the slowest wave
        assert torch.allclose(signal[3, :, 96 + x], torch.sin(torch.arange(8) * step), atol=1e-5)
        assert torch.allclose(signal[:, 5, 48 + x], torch.cos(torch.arange(8) * step), atol=1e-5)
    assert torch.equal(signal[2, :, :96], signal[2, :1, :96].expand(8, -1)), "a row's cells share its half"
    assert torch.equal(signal[:, 2, 96:], signal[:1, 2, 96:].expand(8, -1))


def test_what_an_audio_frame_becomes_does_not_hang_on_the_length_of_the_rest(model: ScenesReasoner) -> None:
    """But through attention; with none, silence behind a sound changes nothing of its beginning."""
    extractor = model.audio_encoder.wav2vec2.feature_extractor
    wave = inputs(1)["input_values"]
    frames = extractor(wave)
    assert close(extractor(F.pad(wave, (0, 8000)))[..., : frames.shape[-1] - 1], frames[..., :-1])


@pytest.mark.parametrize("encoder", [TextEncoder, ImageEncoder, AudioEncoder])
def test_encoders_build_at_full_size(encoder: type[nn.Module]) -> None:
    full = ScenesConfig(answers=("a",), **FULL_SCENES)
    parameters = sum(p.numel() for p in encoder(full).parameters())
    low, high = {TextEncoder: (80e6, 110e6), ImageEncoder: (20e6, 30e6), AudioEncoder: (80e6, 100e6)}[encoder]
    assert low < parameters < high


# Attention


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_torchs(masked: bool) -> None:
    query, key, value = (torch.randn(2, 3, n, 8) for n in (4, 6, 6))
    mask = torch.tensor([0.0, 0, 0, 0, -30, -30]).expand(2, 1, 1, 6) if masked else None
    assert close(attend(query, key, value, mask, fused=False), attend(query, key, value, mask, fused=True))


@pytest.mark.parametrize("keys", [1, 7])
def test_top_k_of_all_keys_is_full_attention(keys: int) -> None:
    torch.manual_seed(keys)
    sparse = SparseAttention(32, 4, top_k=keys).eval()
    x, y, mask = torch.randn(2, 5, 32), torch.randn(2, keys, 32), torch.zeros(2, 1, 1, keys)
    whole = Attention(32, 4).eval()
    whole.load_state_dict(sparse.state_dict())
    assert close(sparse(x, y), whole(x, y))
    assert close(sparse(x, y, mask), whole(x, y, mask))


@torch.no_grad()
def test_top_k_attends_to_the_highest_keys_alone() -> None:
    torch.manual_seed(0)
    sparse = SparseAttention(32, 4, top_k=3).eval()
    x, y = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    q, k, v = (p(t).unflatten(-1, (4, 8)) for p, t in ((sparse.q_proj, x), (sparse.k_proj, y), (sparse.v_proj, y)))
    context = torch.zeros(2, 5, 4, 8)
    for b in range(2):
        for t in range(5):
            for h in range(4):
                scores = k[b, :, h] @ q[b, t, h] / 8**0.5
                best = scores.topk(3).indices
                context[b, t, h] = scores[best].softmax(0) @ v[b, best, h]
    assert close(sparse(x, y), sparse.o_proj(context.flatten(2)))


@torch.no_grad()
def test_a_layers_modalities_have_heads_of_their_own_and_count_by_their_gates(model: ScenesReasoner) -> None:
    layer = Layer(model.config, ("image", "audio")).eval()
    x, mask = torch.randn(2, 3, 32), torch.zeros(2, 1, 1, 3)
    keys = {"image": torch.randn(2, 5, 32), "audio": torch.randn(2, 4, 32)}
    gates = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    normed = layer.self_norm(x)
    said = x + layer.self_attention(normed, normed, mask)
    looks = {m: layer.cross[m](layer.cross_norm(said), keys[m]) for m in keys}
    said = said + gates[:, :1, None] * looks["image"] + gates[:, 1:, None] * looks["audio"]
    expected = said + layer.fc2(F.gelu(layer.fc1(layer.ffn_norm(said))))
    assert close(layer(x, mask, keys, gates), expected)
    without = layer(x[1:], mask[1:], {"image": keys["image"][1:]}, gates[1:])
    assert close(without, expected[1:])


# Gates


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["dynamic", "static"])
def test_gates_are_a_distribution_over_what_is_there(fusion: str) -> None:
    gates = Gates(build(fusion=fusion).config)
    for parameter in gates.parameters():
        nn.init.normal_(parameter)
    question, keys = torch.randn(4, 3, 32), {"image": torch.randn(2, 5, 32), "audio": torch.randn(2, 4, 32)}
    both = gates(question, keys, torch.ones(4, 2))
    assert close(both.sum(1), torch.ones(4))
    assert (both.std(0) > 1e-3).all() == (fusion == "dynamic")
    alone = gates(question, {"audio": keys["audio"]}, torch.tensor([[0.0, 1.0]]).expand(4, -1))
    assert close(alone, torch.tensor([[0.0, 1.0]]).expand(4, -1))
    assert (gates(question, {}, torch.zeros(4, 2)) == 0).all()


# The graph


@torch.no_grad()
@pytest.mark.parametrize("questions", [1, 2])
def test_message_passing_is_a_dense_loop_over_nodes_and_edges(questions: int) -> None:
    config = ScenesConfig(answers=("a",), vocab_size=9, **{**SCENES, "image_size": 12})
    torch.manual_seed(0)
    graph, side = HeteroGraph(config), 3
    words, mask = torch.randn(2 * questions, 4, 32), torch.ones(2 * questions, 4, dtype=torch.int64)
    mask[0, 3:] = 0
    keys, present = {"image": torch.randn(2, 9, 32), "audio": torch.randn(2, 5, 32)}, torch.ones(2, 2)
    made_words, made_keys = graph(words, mask, keys, present)
    for b in range(len(words)):
        scene = b // questions
        nodes = [("text", i, words[b, i]) for i in range(4) if mask[b, i]]
        nodes += [(m, i, x) for m in keys for i, x in enumerate(keys[m][scene])]
        for kind, i, x in nodes:
            normed = graph.norm[kind](x)
            message = graph.own[kind](normed)
            near, across = [], {}
            for other, j, y in nodes:
                sent = graph.norm[other](y)
                if kind == other:
                    (row, column), (other_row, other_column) = divmod(i, side), divmod(j, side)
                    away = abs(row - other_row) + abs(column - other_column) if kind == "image" else abs(i - j)
                    near += [sent] if away == 1 else []
                elif (cosine := float(F.cosine_similarity(normed, sent, dim=0))) > config.graph_threshold:
                    across.setdefault(other, []).append((cosine, sent))
            if near:
                message = message + graph.near[kind](torch.stack(near).mean(0))
            for other, edges in across.items():
                if f"{other}_{kind}" in graph.across:
                    total = sum(c * s for c, s in edges) / sum(c for c, _ in edges)
                    message = message + graph.across[f"{other}_{kind}"](total)
            expected = x + F.gelu(message)
            assert close(made_words[b, i] if kind == "text" else made_keys[kind][scene, i], expected), (kind, i)


# Losses


def test_info_nce_is_cross_entropy_by_hand() -> None:
    torch.manual_seed(0)
    text, image, hard = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((4, 8), (4, 8), (4, 2, 8)))
    scale = torch.tensor(5.0)
    expected = 0.0
    for i in range(4):
        to_image = torch.stack([(scale * text[i] @ image[j]).exp() for j in range(4)])
        to_text = torch.stack([(scale * image[i] @ t).exp() for t in (*text, *hard[i])])
        expected = expected - float((to_image[i] / to_image.sum()).log() + (to_text[i] / to_text.sum()).log()) / 8
    assert float(info_nce(text, image, scale, hard)) == pytest.approx(expected, rel=1e-5)


def test_info_nce_leaves_out_what_would_be_as_right() -> None:
    torch.manual_seed(0)
    text, image, scale = (
        F.normalize(torch.randn(3, 8), dim=-1),
        F.normalize(torch.randn(3, 8), dim=-1),
        torch.tensor(5.0),
    )
    same = torch.eye(3, dtype=torch.bool)
    assert torch.equal(info_nce(text, image, scale, same=same), info_nce(text, image, scale))
    same[0, 1] = same[1, 0] = True
    logits = scale * text @ image.T
    rows = [logits[0, [0, 2]].log_softmax(0)[0], logits[1, [1, 2]].log_softmax(0)[0], logits[2].log_softmax(0)[2]]
    columns = [logits[[0, 2], 0].log_softmax(0)[0], logits[[1, 2], 1].log_softmax(0)[0], logits[:, 2].log_softmax(0)[2]]
    assert float(info_nce(text, image, scale, same=same)) == pytest.approx(
        -float(sum(rows) + sum(columns)) / 6, rel=1e-5
    )


def test_triplet_asks_of_the_hardest_negative_alone() -> None:
    anchor, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6]])
    negatives = torch.tensor([[[0.0, 1.0], [0.7, 0.714]]])
    assert float(triplet(anchor, positive, negatives)) == pytest.approx(0.2 + 0.7 - 0.8)
    assert float(triplet(anchor, positive, negatives[:, :1])) == 0


def test_the_best_temperature_undoes_a_scale() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4000, 5) * 2
    answers = torch.multinomial(logits.softmax(1), 1)[:, 0]
    assert best_temperature(logits * 4, answers) == pytest.approx(4, rel=0.1)


# The whole


@torch.inference_mode()
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_any_modalities_are_a_valid_input_and_absent_encoders_are_not_run(
    model: ScenesReasoner, subset: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for name in ("text", "image", "audio"):
        encoder = getattr(model, f"{name}_encoder")
        monkeypatch.setattr(
            encoder, "forward", lambda *a, n=name, f=encoder.forward, **k: (ran.append(n), f(*a, **k))[1]
        )
    logits = model(**only(inputs(2), subset))
    assert logits.shape == (2, 4)
    assert logits.isfinite().all()
    assert sorted(ran) == sorted(subset)


@torch.inference_mode()
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_components_in_a_row_are_the_model(model: ScenesReasoner, subset: tuple[str, ...]) -> None:
    known: dict[str, Tensor] = dict(only(inputs(2), subset))
    ran = []
    for component in scenes_reasoner.components(model):
        names = [p.name for p in component.inputs]
        if set(names) <= known.keys() and not {p.name for p in component.outputs} <= known.keys():
            ran.append(component.name)
            out = component.module(**{n: known[n] for n in names})  # type: ignore[operator]
            known |= zip([p.name for p in component.outputs], out if isinstance(out, tuple) else (out,), strict=True)
    looked_at = [m for m in subset if m != "text"]
    assert [n for n in ran if n.startswith("level_1")] == ["_".join(["level_1_text", *looked_at])]
    assert [n for n in ran if n.startswith("given")] == ["_".join(["given", *(looked_at or ["text"])])]
    assert any(n.startswith("unasked") for n in ran) == ("text" not in subset)
    assert close(known["logits"], model(**only(inputs(2), subset)))


@torch.inference_mode()
def test_questions_of_a_scene_together_are_as_one_by_one(model: ScenesReasoner) -> None:
    given = inputs(2, questions=3)
    together = model(**given)
    for i, row in enumerate(together):
        one = {n: v[i : i + 1] if len(v) == 6 else v[i // 3 : i // 3 + 1] for n, v in given.items()}
        assert close(row, model(**one)[0])


@torch.inference_mode()
def test_each_modality_matters(model: ScenesReasoner) -> None:
    given, other = inputs(1), inputs(1, seed=1)
    answer = model(**given)
    for name in ("pixel_values", "input_ids", "input_values"):
        assert (model(**{**given, name: other[name]}) - answer).abs().max() > 1e-5


@pytest.mark.parametrize("top_k", [0, 1, 16])
def test_the_shortest_sound_has_a_frame_for_each_key_that_is_looked_at(top_k: int) -> None:
    config = ScenesConfig(answers=("a",), vocab_size=9, top_k=top_k)
    assert config.min_samples >= 1_600
    assert config.frames(config.min_samples) >= max(1, top_k)
    assert config.min_samples == 1_600 or config.frames(config.min_samples - 1) < top_k


def test_config_survives_json(model: ScenesReasoner) -> None:
    assert ScenesConfig.from_dict(json.loads(json.dumps({"left": {}, **model.config.to_dict()}))) == model.config


def test_a_text_holds_as_little_as_its_least_true_word(model: ScenesReasoner) -> None:
    words, mask = torch.randn(3, 5, SCENES["width"]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    with torch.no_grad():
        logits = model.match(words, mask)
        for row, said, there in zip(logits, words, mask, strict=True):
            odds = [math.exp(-float(model.match.word(word))) for word, one in zip(said, there, strict=True) if one]
            assert row.tolist() == pytest.approx([0, -math.log(sum(odds) / len(odds))], abs=1e-4)


# As a model family


VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "both-static-top_k": {"alignment": ("attention", "graph"), "fusion": "static", "top_k": 2},
    "slots": {"alignment": ()},
}


@pytest.mark.parametrize("task", ["find_image", "find_audio"])
def test_captions_and_what_they_tell_of_are_compared_in_onnx_runtime(task: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_str())
    model = build(task=task)
    for component in scenes_reasoner.components(model):
        path = tmp_path / f"{component.name}.onnx"
        _graph.onnx_export(component, path, 18)
        _graph.check(component, path, 1e-4)
    torch_session = open_fp32(scenes_reasoner, model, tmp_path)
    program = {**torch_session.program, "backend": "onnxruntime", "settings": {"threads": 1}}
    (tmp_path / "program.json").write_text(json.dumps(program))
    modality = task.removeprefix("find_")
    drawn = [s for s, _ in zip(world.scenes("train", 0), range(3), strict=False)]
    media = {"image": lambda s: world.png(world.draw(s)), "audio": lambda s: world.wav(world.tones(s))}[modality]
    queries = [Query(text=text, **{modality: media(s)}) for s in drawn for text in TEXTS]
    expected, got = torch_session.outputs(queries), open_directory(tmp_path).outputs(queries)
    assert expected.keys() == {"text", modality}
    for name, rows in expected.items():
        np.testing.assert_allclose(got[name], rows, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    found = torch_session.answer(queries[0])
    assert (found.probability is None) == (modality == "audio")


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    (source / "tokenizer.json").write_text(tokenizer().to_str())
    scenes_reasoner.save(build(**request.param), source / "model", source)
    return source / "model"


def test_saved_and_read_again_it_is_the_same(directory: Path, model: ScenesReasoner) -> None:
    again = read_model(find_family(directory), directory)
    assert again.config.width == model.config.width
    assert sizes(scenes_reasoner, again)[0] > 0


def test_heads_and_units_that_leave_stay_away_when_it_is_read_again(directory: Path, tmp_path: Path) -> None:
    from edgemm.models._hidden_units import hidden_units

    model = scenes_reasoner.load(directory)
    for block in scenes_reasoner.attentions(model):
        block.keep([0] if block.kind == "self" else [])
    for hidden in hidden_units(model):
        hidden.keep([0, 1])
    scenes_reasoner.save(model, tmp_path, directory)
    again = scenes_reasoner.load(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(**inputs(2)), model(**inputs(2)))


@pytest.mark.parametrize(
    ("task", "run"),
    [
        ("answer", {"text_encoder", "image_encoder", "audio_encoder", "levels"}),
        ("find_image", {"text_encoder", "image_encoder", "levels"}),
        ("find_audio", {"text_encoder", "audio_encoder"}),
        ("caption", {"image_encoder", "captioner"}),
    ],
)
def test_passes_find_the_units_that_the_task_runs(task: str, run: set[str]) -> None:
    from edgemm.models._hidden_units import that_run

    found = {hidden.name for hidden in that_run(scenes_reasoner, build(task=task))}
    assert {name.partition(".")[0] for name in found} == run
    assert ("levels.0.slots" in found) == (task == "answer")


def test_pruned_for_one_task_it_loads_for_another(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_str())
    model = build()
    for block in scenes_reasoner.attentions(model):
        block.keep([0])
    scenes_reasoner.save(model, tmp_path / "model", tmp_path)
    scenes_reasoner.for_task(tmp_path / "model", "caption", tmp_path / "caption")
    again = scenes_reasoner.load(tmp_path / "caption")
    assert again.config.task == "caption"
    assert again.level(0).layers[0].self_attention.heads == 1


def test_every_component_exports_and_is_the_same_in_onnx_runtime(directory: Path, tmp_path: Path) -> None:
    """`check` runs one row and three, at the largest sizes and at small ones; then each subset goes all the way."""
    model = scenes_reasoner.load(directory)
    whole_way = model.config.alignment == ("attention",)
    for component in scenes_reasoner.components(model):
        if not whole_way and not component.name.startswith("level"):
            continue  # as in the others
        path = tmp_path / f"{component.name}.onnx"
        _graph.onnx_export(component, path, 18)
        _graph.check(component, path, 1e-4)
    if not whole_way:
        return
    torch_session = open_fp32(scenes_reasoner, model, directory)
    program = {**torch_session.program, "backend": "onnxruntime", "settings": {"threads": 1}}
    (tmp_path / "program.json").write_text(json.dumps(program))
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    onnx_session = open_directory(tmp_path)
    scene = next(world.scenes("train", 0))
    media: dict[str, Any] = {
        "text": TEXTS[0],
        "image": world.png(world.draw(scene)),
        "audio": world.wav(world.tones(scene)),
    }
    queries = [Query(**{m: media[m] for m in subset}) for subset in SUBSETS]
    expected, got = torch_session.outputs(queries)["logits"], onnx_session.outputs(queries)["logits"]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert len({tuple(np.round(row, 3)) for row in expected}) == len(SUBSETS)
    whole = onnx_session.infer(onnx_session.tensors(queries[-1]))["logits"]
    np.testing.assert_allclose(whole[0], got[-1], atol=1e-4)


def test_no_question_has_more_tokens_than_graphs_of_questions_take() -> None:
    asked = {q.text for s in islice(world.scenes("test", 0), 100) for q in world.questions(s, random.Random(0))}
    words = build_tokenizer(sorted(asked), ("yes",))
    longest = max(len(words.encode(text).ids) for text in asked)
    assert longest <= ScenesConfig(answers=("yes",), vocab_size=9).question_tokens


def test_captions_in_onnx_runtime_are_those_that_torch_writes_a_word_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(writing(tokenizer()).to_str())
    model = build(task="caption", caption_layers=2)
    for component in scenes_reasoner.components(model):
        path = tmp_path / f"{component.name}.onnx"
        _graph.onnx_export(component, path, 18)
        _graph.check(component, path, 1e-4)
    program = {**open_fp32(scenes_reasoner, model, tmp_path).program, "backend": "onnxruntime"}
    (tmp_path / "program.json").write_text(json.dumps({**program, "settings": {"threads": 1}}))
    session = open_directory(tmp_path)
    drawn = [s for s, _ in zip(world.scenes("train", 0), range(3), strict=False)]
    queries = [Query(image=world.png(world.draw(s))) for s in drawn]
    pixels = torch.from_numpy(np.concatenate([session.tensors(q)["pixel_values"] for q in queries]))
    with torch.inference_mode():
        written = model.captioner.write(model.image_encoder(pixels))
    assert session.outputs(queries)["text"].tolist() == [session.media.tokenizer.decode(ids) for ids in written]


@torch.inference_mode()
def test_a_caption_word_by_word_is_the_caption_at_once(model: ScenesReasoner) -> None:
    tokens = model.image_encoder(inputs(2)["pixel_values"])
    for row, ids in enumerate(model.captioner.write(tokens)):
        whole = torch.tensor([[BEGIN, *ids][: model.config.max_tokens]])
        best = model.captioner(whole, tokens[row : row + 1])[0].argmax(-1).tolist()
        assert best[: len(ids)] == ids
        assert len(ids) == model.config.max_tokens - 1 or best[-1] == END


def answers_of(directory: Path, program: dict[str, Any], exits: list[dict[str, Any]]) -> tuple[Any, list[str]]:
    """Logits of two questions on two pictures, with these exits, and the components that ran on what joins them."""
    model = scenes_reasoner.load(directory)
    session = open_fp32(scenes_reasoner, model, directory)
    session.exits = {e["tensor"]: e["confidence"] for e in exits}
    ran: list[str] = []
    session.observe = lambda name, tensors: ran.append(f"{name} {len(next(iter(tensors.values())))}")
    drawn = [s for s, _ in zip(world.scenes("train", 0), range(2), strict=False)]
    queries = [Query(text=text, image=world.png(world.draw(s))) for s, text in zip(drawn, TEXTS, strict=True)]
    assert program["output"]["exits"] == []
    return session.outputs(queries)["logits"], [r for r in ran if r.startswith("level")]


def test_sure_rows_leave_early_and_the_others_go_on(directory: Path) -> None:
    model = scenes_reasoner.load(directory)
    program = scenes_reasoner.program(model, directory)
    whole, ran = answers_of(directory, program, [])
    assert ran == ["level_1_text_image 2", "level_2 2", "level_3 2"]
    early, ran = answers_of(directory, program, [{"tensor": "exit_1", "confidence": 1e-6}])
    assert ran == ["level_1_text_image 2"]
    confidence = torch.from_numpy(early).softmax(1).amax(1)
    between = [{"tensor": "exit_1", "confidence": float(confidence.mean())}]
    mixed, ran = answers_of(directory, program, between)
    assert ran == ["level_1_text_image 2", "level_2 1", "level_3 1"]
    sure = int(confidence.argmax())
    np.testing.assert_allclose(mixed[sure], early[sure], atol=1e-6)
    np.testing.assert_allclose(mixed[1 - sure], whole[1 - sure], atol=1e-5)


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_of_the_graphs_for_subsets_only_that_of_what_is_there_is_loaded(
    model: ScenesReasoner, subset: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_str())
    session = open_fp32(scenes_reasoner, model, tmp_path)
    session.components.load(set(subset))
    names = {name for name, component in session.components.items() if component.loaded}
    looked_at = [m for m in subset if m != "text"]
    assert {n for n in names if n.startswith("level_1")} == {"_".join(["level_1_text", *looked_at])}
    assert {n for n in names if n.startswith("given")} == {"_".join(["given", *(looked_at or ["text"])])}
    assert len([n for n in names if n.startswith("unasked")]) == ("text" not in subset)
    assert {n for n in names if n.endswith("_encoder")} == {f"{m}_encoder" for m in subset}


def test_exits_that_may_never_be_taken_are_not_in_the_program() -> None:
    for exits, expected in (((0.7, 2.0), [("exit_1", 0.7)]), ((2.0, 1.0), [("exit_2", 1.0)])):
        found = scenes_reasoner.program(build(exits=exits), Path())["output"]["exits"]
        assert [(e["tensor"], e["confidence"]) for e in found] == expected


def test_the_least_confidence_costs_no_more_than_it_may() -> None:
    answers = torch.zeros(4, dtype=torch.int64)
    last = torch.tensor([[9.0, 0.0]] * 4)
    early = torch.tensor([[9.0, 0.0], [7.0, 0.0], [0.0, 5.0], [3.0, 0.0]])  # the third is wrong
    confidences = early.softmax(1).amax(1)
    assert least_confidence(early, last, answers, 0.0) == pytest.approx(float(confidences[1]))
    assert least_confidence(early, last, answers, 0.25) == pytest.approx(float(confidences[3]))
    assert least_confidence(-early, last, answers, 0.0) == 2.0


def test_what_only_joins_has_no_weights_of_its_own(model: ScenesReasoner) -> None:
    joins = {c.name: sum(p.numel() for p in c.module.parameters()) for c in scenes_reasoner.components(model)}  # type: ignore[union-attr]
    assert {n: size for n, size in joins.items() if n.startswith("given")} == dict.fromkeys(
        ("given_image_audio", "given_image", "given_audio", "given_text"), 0
    )
    assert {joins[f"unasked_{m}"] for m in ("image", "audio")} == {model.config.width}
