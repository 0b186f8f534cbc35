"""Whisper and the vision encoder-decoders at two tiny layers: components, graphs, heads, settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import (
    DeiTConfig,
    DeiTModel,
    GPT2Config,
    GPT2LMHeadModel,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from edgemm.backends import openvino as openvino_backend
from edgemm.errors import InputError
from edgemm.models import Component, Tensor, vision_encoder_decoder, whisper
from edgemm.models._graph import caller, check, onnx_export
from edgemm.models._hidden_units import hidden_units, matrix
from edgemm.plugins import plugin
from edgemm.pruners import padding
from edgemm.runtime import onnxruntime, openvino
from edgemm.runtime.generation import generate
from edgemm.runtime.program import Program
from edgemm.runtime.session import Directory
from edgemm.target import Target

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, POSITIONS, LAYERS, HEADS = 61, 24, 2, 4
START, PAD, EOS = 1, 3, 48
SAMPLES = 4
TARGET = Target(name="box", backend="openvino")
FAMILIES = {
    "whisper": whisper,
    "trocr": vision_encoder_decoder,
    "trocr-small": vision_encoder_decoder,
    "vit-gpt2": vision_encoder_decoder,
}
every_model = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a model by name, with random weights and the files that preprocess."""
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        if not (path := root / name).is_dir():
            torch.manual_seed(0)
            model = speech_model() if name == "whisper" else vision_model(name)
            for parameter in model.parameters():
                if parameter.ndim > 1 and parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            config = model.generation_config
            config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = START, EOS, EOS
            config.max_length = 14
            model.save_pretrained(path)
            processor = (
                WhisperFeatureExtractor(feature_size=8, chunk_length=1)
                if name == "whisper"
                else ViTImageProcessorPil(size={"height": 8, "width": 8})
            )
            processor.save_pretrained(path)
        return path

    return of


def speech_model() -> Any:
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=POSITIONS,
        pad_token_id=EOS,
        bos_token_id=EOS,
        eos_token_id=EOS,
        decoder_start_token_id=START,
    )
    return WhisperForConditionalGeneration(config)


def vision_model(name: str) -> Any:
    """trocr: learned positions, another encoder width; trocr-small: DeiT, sinusoids; vit-gpt2: a projection."""
    small = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 8, "patch_size": 4}
    decoder = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "decoder_layers": LAYERS,
        "decoder_attention_heads": HEADS,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": PAD,
        "is_decoder": True,
    }
    if name == "trocr":
        encoder = ViTModel(ViTConfig(**small, hidden_size=24, intermediate_size=32, qkv_bias=False))
        text: Any = TrOCRForCausalLM(TrOCRConfig(**decoder, cross_attention_hidden_size=24))
    elif name == "trocr-small":
        encoder = DeiTModel(DeiTConfig(**small, hidden_size=16, intermediate_size=32))
        options = {"use_learned_position_embeddings": False, "scale_embedding": True, "layernorm_embedding": False}
        text = TrOCRForCausalLM(TrOCRConfig(**decoder, **options, activation_function="relu"))
    else:
        encoder = ViTModel(ViTConfig(**small, hidden_size=24, intermediate_size=32), add_pooling_layer=False)
        options = {"is_decoder": True, "add_cross_attention": True, "scale_attn_by_inverse_layer_idx": True}
        sizes = {"n_embd": 16, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
        ids = {"bos_token_id": START, "eos_token_id": EOS}
        text = GPT2LMHeadModel(GPT2Config(**sizes, **options, **ids, vocab_size=VOCABULARY))
    return VisionEncoderDecoderModel(encoder=encoder, decoder=text)


def media(component: Component, samples: int = SAMPLES) -> torch.Tensor:
    """Seeded features or pixels."""
    (port,) = component.inputs
    return 2 * torch.randn(samples, *port.shape[1:], generator=torch.Generator().manual_seed(1))


def ours(family: ModuleType, model: Any, directory: Path, **changes: Any) -> list[list[int]]:
    """The text of each sample, from the components and the validated program."""
    encoder, decoder = family.components(model)
    output = program_of(family, model, directory)["output"] | changes
    encode, decode = caller(encoder, directory), caller(decoder, directory)
    name = encoder.inputs[0].name
    return [
        generate(decode, decoder.spec(), output, encode({name: sample}), output["prompt"])
        for sample in media(encoder).numpy()[:, None]
    ]


def theirs(family: ModuleType, model: Any, **options: Any) -> list[list[int]]:
    """The text of each sample, from transformers, without the prompt, the end and what pads after it."""
    positions = getattr(getattr(model.decoder, "model", None), "decoder", None) if family is not whisper else None
    if positions and not model.config.decoder.use_learned_position_embeddings:
        table = positions.embed_positions  # transformers 5 leaves it on the meta device
        table.weights = table.get_embedding(POSITIONS + PAD + 1, 16, PAD)
    made = []
    for sample in media(family.components(model)[0])[:, None]:
        ids = model.generate(sample, **options)[0].tolist()
        new = ids if family is whisper else ids[1:]
        made.append(new[: new.index(EOS)] if EOS in new else new)
    return made


def program_of(family: ModuleType, model: Any, directory: Path) -> dict[str, Any]:
    """program.json as the runtime reads it."""
    return Program.model_validate(
        {
            "backend": "onnxruntime",
            "settings": {"threads": 1},
            "components": [c.spec() for c in family.components(model)],
            **family.program(model, directory),
        }
    ).model_dump()


@pytest.mark.parametrize("beams", [1, 2, 4])
@every_model
def test_texts_are_those_of_transformers(name, beams, directory):
    family, path = FAMILIES[name], directory(name)
    model = family.load(path)
    made = ours(family, model, path, beams=beams)
    assert made == theirs(family, model, num_beams=beams)
    assert len({tuple(text) for text in made}) > 1


@pytest.mark.parametrize("beams", [1, 4])
@every_model
def test_the_checkpoints_suppressed_ids_are_not_made(name, beams, directory, tmp_path):
    family, plain = FAMILIES[name], directory(name)
    without = ours(family, family.load(plain), plain, beams=beams)
    never = sorted({token for text in without for token in text[1:]})[::2]
    first = sorted({text[0] for text in without})
    changes = {"suppress_tokens": never, "begin_suppress_tokens": first, "num_beams": beams}
    family, model, path = rewritten(name, directory, tmp_path, **changes)
    made = ours(family, model, path)
    assert made == theirs(family, model) != without
    assert not {token for text in made for token in text} & set(never)
    assert not {text[0] for text in made if text} & set(first)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, directory) -> Callable[[str, int], tuple[Component, Any]]:
    """A component of a model, 0 the encoder and 1 the decoder, with the call of its ONNX graph."""

    @cache
    def of(name: str, which: int) -> tuple[Component, Any]:
        out = tmp_path_factory.mktemp(name)
        component = FAMILIES[name].components(FAMILIES[name].load(directory(name)))[which]
        onnx_export(component, out / f"{component.name}.onnx", 18)
        return component, onnxruntime.compile_component(Directory(out), component.spec(), {"threads": 1})

    return of


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["whisper", "vit-gpt2"])
def test_the_encoder_graph_is_the_torch_model(name, batch, graph):
    component, onnx = graph(name, 0)
    same({component.inputs[0].name: media(component, batch).numpy()}, component, onnx)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("past", [1, 2, 9])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", ["whisper", "trocr-small", "vit-gpt2"])
def test_the_decoder_graph_is_the_torch_model(name, batch, past, tokens, graph):
    component, onnx = graph(name, 1)
    sizes = {"batch": batch, "past": past, "tokens": tokens, "total": past + tokens}
    rng = np.random.default_rng(0)
    inputs: dict[str, Any] = {
        port.name: rng.standard_normal([sizes.get(n, n) for n in port.shape], np.float32)
        for port in component.inputs
        if port.dtype == "float32"
    }
    inputs["decoder_input_ids"] = rng.integers(0, VOCABULARY, (batch, tokens))
    inputs["position_ids"] = np.tile(np.arange(past - 1, past - 1 + tokens), (batch, 1))
    inputs["decoder_attention_mask"] = np.ones((batch, past + tokens), np.int64)
    inputs["decoder_attention_mask"][:, 0] = 0
    made = same(inputs, component, onnx)
    assert made["present_key_1"].shape == (batch, HEADS, past + tokens, 16 // HEADS)
    for tensor in (n for n in inputs if n.startswith("past")):
        inputs[tensor] = inputs[tensor] + 100 * (np.arange(past)[:, None] == 0).astype(np.float32)
    assert np.array_equal(onnx(inputs)["logits"], made["logits"])  # the masked slot is not seen


def same(inputs: dict[str, Any], component: Component, onnx: Any) -> dict[str, Any]:
    """What ONNX Runtime makes, once it is what torch makes to 1e-4 of the largest value."""
    expected, got = caller(component, Path())(inputs), onnx(inputs)
    assert expected.keys() == got.keys() == {port.name for port in component.outputs}
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert np.abs(got[name] - value).max() <= 1e-4 * np.abs(value).max(), name
    return got


@every_model
def test_a_text_in_pieces_is_the_text_at_once(name, directory):
    encoder, decoder = FAMILIES[name].components(FAMILIES[name].load(directory(name)))
    call = caller(decoder, Path())
    known = caller(encoder, Path())({encoder.inputs[0].name: media(encoder, 1).numpy()})
    ids = np.array([[START, 9, 30, 4, 11, 52]])

    def run(pieces: list[int]) -> Any:
        tensors = dict(known)
        for port in decoder.inputs:
            if port.name.startswith("past"):
                tensors[port.name] = np.zeros((1, port.shape[1], 1, port.shape[3]), np.float32)
        at = 0
        for size in pieces:
            tensors["decoder_input_ids"] = ids[:, at : at + size]
            tensors["position_ids"] = np.arange(at, at + size)[None]
            at += size
            tensors["decoder_attention_mask"] = np.array([[0] + [1] * at])
            made = call(tensors)
            tensors |= {n.replace("present", "past"): v for n, v in made.items() if n != "logits"}
        return made["logits"]

    whole = run([6])
    for pieces in ([1] * 6, [3, 1, 2]):
        np.testing.assert_allclose(run(pieces), whole, rtol=1e-4, atol=1e-5)


@every_model
def test_every_attention_layer_is_listed(name, directory):
    blocks = FAMILIES[name].attentions(FAMILIES[name].load(directory(name)))
    media_name = "audio" if name == "whisper" else "image"
    links = [(b.kind, b.queries, b.keys) for b in blocks]
    assert links[:LAYERS] == [("self", media_name, media_name)] * LAYERS
    assert links[LAYERS:] == [("self", "text", "text"), ("cross", "text", media_name)] * LAYERS
    assert all(b.heads == HEADS for b in blocks)
    prunable = [b.q is not None for b in blocks]
    assert prunable == [True] * LAYERS + [name != "vit-gpt2"] * 2 * LAYERS


@every_model
def test_removed_heads_are_gone_from_the_files_and_the_cache(name, directory, tmp_path):
    family, source = FAMILIES[name], directory(name)
    model, silenced = family.load(source), family.load(source)
    whole = ours(family, model, source)
    for i, (block, same) in enumerate(zip(family.attentions(model), family.attentions(silenced), strict=True)):
        if block.q is not None:
            kept = [0, 2, 3] if i % 2 else [1]
            block.keep(kept)
            columns = torch.ones(HEADS, block.head_dim)
            columns[kept] = 0
            same.o.weight.data[:, columns.flatten() == 1] = 0
    assert len(hidden_units(model)) == 2 * LAYERS
    for i, (hidden, full) in enumerate(zip(hidden_units(model), hidden_units(silenced), strict=True)):
        hidden.keep(list(range(i % 2, full.units, 2)))
        matrix(full.reads)[:, (i + 1) % 2 :: 2] = 0
    family.save(model, tmp_path, source)
    again = family.load(tmp_path)
    assert [h.units for h in hidden_units(again)] == [h.units // 2 for h in hidden_units(family.load(source))]
    left = [b.heads for b in family.attentions(again) if b.q is not None]
    assert left == [[1, 3][i % 2] for i in range(len(left))]
    encoder, decoder = family.components(again)
    shapes = {p.name: p.shape for p in (*decoder.inputs, *encoder.outputs)}
    own, cross = (1, 3) if name != "vit-gpt2" else (HEADS, HEADS)
    for i in range(LAYERS):
        assert shapes[f"past_key_{i}"][1] == shapes[f"past_value_{i}"][1] == own
        assert shapes[f"cross_key_{i}"][1] == shapes[f"cross_value_{i}"][1] == cross
    made = ours(family, again, tmp_path)
    assert made == ours(family, model, source) == theirs(family, silenced) != whole


@every_model
def test_what_the_settings_leave_open(name, directory, tmp_path):
    """transformers' 20 new tokens for an image; for speech as many as there are positions."""
    family, model, path = rewritten(
        name, directory, tmp_path, max_length=None, suppress_tokens=[5, 6], begin_suppress_tokens=None
    )
    output = program_of(family, model, path)["output"]
    assert output["prompt"] == (START,)
    assert output["eos"] == (EOS,)
    assert (output["beams"], output["length_penalty"]) == (1, 1.0)
    assert (output["suppress"], output["suppress_first"]) == ((5, 6), ())
    assert output["max_new_tokens"] == (POSITIONS - 1 if name == "whisper" else 20)


@every_model
def test_what_the_settings_say(name, directory, tmp_path):
    changes = {"num_beams": 3, "length_penalty": 0.5, "eos_token_id": [EOS, 2], "max_new_tokens": 4}
    family, model, path = rewritten(name, directory, tmp_path, **changes)
    output = program_of(family, model, path)["output"]
    assert (output["beams"], output["length_penalty"]) == (3, 0.5)
    assert output["eos"] == (EOS, 2)
    assert output["max_new_tokens"] == 4


def rewritten(name: str, directory: Callable[[str], Path], out: Path, **changes: Any) -> tuple[ModuleType, Any, Path]:
    """A model whose generation_config.json differs; None removes a key."""
    shutil.copytree(directory(name), out, dirs_exist_ok=True)
    file = out / "generation_config.json"
    values = json.loads(file.read_text()) | {"_from_model_config": None} | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return FAMILIES[name], FAMILIES[name].load(out), out


def test_without_generation_config_json_config_json_holds(directory, tmp_path):
    shutil.copytree(directory("trocr"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    ids = {"decoder_start_token_id": 9, "eos_token_id": 4, "max_length": 6}
    (tmp_path / "config.json").write_text(json.dumps(config | ids))
    output = vision_encoder_decoder.program(vision_encoder_decoder.load(tmp_path), tmp_path)["output"]
    assert (output["prompt"], output["eos"], output["max_new_tokens"]) == ([9], [4], 5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3"),
        ({"do_sample": True}, "do_sample = True"),
        ({"early_stopping": True}, "early_stopping = True"),
        ({"repetition_penalty": 1.2}, "repetition_penalty = 1.2"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"max_length": "long"}, "max_length = 'long'"),
        ({"decoder_start_token_id": None, "bos_token_id": None}, "no decoder_start_token_id"),
    ],
)
def test_settings_that_the_runtime_does_not_do_are_refused(changes, named, directory, tmp_path):
    path = directory("trocr")
    model = vision_encoder_decoder.load(path)
    values = json.loads((path / "generation_config.json").read_text()) | changes
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=named):
        vision_encoder_decoder.program(model, tmp_path)


def test_neutral_settings_are_taken(directory, tmp_path):
    neutral = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "early_stopping": False}
    family, model, path = rewritten("vit-gpt2", directory, tmp_path, **neutral)
    assert family.program(model, path)["output"]["beams"] == 1


LANGUAGES = {"<|en|>": 20, "<|fr|>": 21}
TASKS = {"translate": 22, "transcribe": 23}
MULTILINGUAL = {"lang_to_id": LANGUAGES, "task_to_id": TASKS, "is_multilingual": True, "no_timestamps_token_id": 60}


@pytest.mark.parametrize(
    ("settings", "asked", "prompt"),
    [
        ({}, {}, [START]),
        ({"no_timestamps_token_id": 60}, {}, [START, 60]),
        ({"no_timestamps_token_id": 60, "forced_decoder_ids": [[1, 60]]}, {}, [START, 60]),
        (MULTILINGUAL, {"language": "en"}, [START, 20, 23, 60]),
        (MULTILINGUAL | {"forced_decoder_ids": [[1, None], [2, 23]]}, {"language": "en"}, [START, 20, 23, 60]),
        (MULTILINGUAL | {"forced_decoder_ids": [[1, 21], [2, 22], [3, 60]]}, {}, [START, 21, 22, 60]),
        (MULTILINGUAL | {"language": "french"}, {}, [START, 21, 23, 60]),
        (MULTILINGUAL | {"language": "<|fr|>", "task": "translate"}, {}, [START, 21, 22, 60]),
        (MULTILINGUAL | {"language": "fr", "forced_decoder_ids": [[1, 20], [2, 22]]}, {}, [START, 21, 23, 60]),
        ({"forced_decoder_ids": [[1, None], [2, 23]]}, {}, [START, 23]),
    ],
)
def test_the_prompt_of_whisper_is_that_of_transformers(settings, asked, prompt, directory, tmp_path):
    """`asked`: what transformers must be told to do what this does by itself."""
    family, model, path = rewritten("whisper", directory, tmp_path, **settings)
    output = program_of(family, model, path)["output"]
    assert list(output["prompt"]) == prompt
    assert output["max_new_tokens"] == min(14, POSITIONS - len(prompt))
    features = media(whisper.components(model)[0], 1)
    told = model.generate(features, **asked, return_dict_in_generate=True, force_unique_generate_call=True)
    ids = told["sequences"][0].tolist()
    assert ids[: len(prompt)] == prompt
    made = ours(family, model, path)[0]
    assert ids[len(prompt) :][: len(made)] == made


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (MULTILINGUAL | {"language": "klingon"}, "language = 'klingon'\n  fix: known: <|en|>, <|fr|>"),
        (MULTILINGUAL | {"task": "sing"}, "task = 'sing'\n  fix: known: translate, transcribe"),
        ({"return_timestamps": True, "no_timestamps_token_id": 60}, "return_timestamps = True"),
    ],
)
def test_a_prompt_that_whisper_does_not_know_is_refused(settings, named, directory, tmp_path):
    family, model, path = rewritten("whisper", directory, tmp_path, **settings)
    with pytest.raises(InputError) as error:
        family.program(model, path)
    assert named in str(error.value)


def test_media_become_the_tensors_of_the_encoder(directory):
    for name, family in FAMILIES.items():
        program = program_of(family, family.load(directory(name)), directory(name))
        spec = program["audio"] if name == "whisper" else program["image"]
        assert spec["tensor"] == program["components"][0]["inputs"][0]["name"]
    audio = whisper.program(whisper.load(directory("whisper")), directory("whisper"))["audio"]
    assert audio == {
        "tensor": "input_features",
        "sampling_rate": 16000,
        "seconds": 1,
        "pad": "silence",
        "mel": {"n_fft": 400, "hop_length": 160, "n_mels": 8, "fmax": 8000.0},
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"feature_size": 80, "chunk_length": 1}, "80 mels x 100 frames\n  fix: the model takes 8 x 100"),
        ({"feature_size": 8, "chunk_length": 30}, "8 mels x 3000 frames\n  fix: the model takes 8 x 100"),
        ({"feature_size": 8, "chunk_length": 1, "dither": 0.1}, "dither = 0.1"),
        (None, "no preprocessor_config.json"),
    ],
)
def test_a_feature_extractor_that_is_not_the_models_is_refused(options, named, directory, tmp_path):
    model = whisper.load(directory("whisper"))
    shutil.copytree(directory("whisper"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").unlink()
    if options:
        WhisperFeatureExtractor(**options).save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        whisper.program(model, tmp_path)
    assert named in str(error.value)


@pytest.mark.parametrize(("part", "known"), [("encoder", "deit, vit"), ("decoder", "gpt2, trocr")])
@pytest.mark.parametrize("found", ["swin", None])
def test_a_part_that_is_not_known_is_refused(part, known, found, directory, tmp_path):
    config = json.loads((directory("trocr") / "config.json").read_text())
    config[part] = {"model_type": found} if found else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        vision_encoder_decoder.load(tmp_path)
    assert f"{part} model_type {found!r} is not known\n  fix: known {part}s: {known};" in str(error.value)


def test_a_checkpoint_without_a_head_for_text_is_refused(directory, tmp_path):
    config = json.loads((directory("whisper") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["WhisperForAudioClassification"]}))
    with pytest.raises(InputError, match="'WhisperForAudioClassification' is not known"):
        whisper.load(tmp_path)


@pytest.mark.parametrize("beams", [1, 4])
@every_model
def test_openvino_keeps_the_cache_and_makes_the_same_texts(name, beams, directory, tmp_path):
    """The cache is the engine's own: a new sample begins with an empty one, and beams change places in it."""
    family, path = FAMILIES[name], directory(name)
    model = family.load(path)
    encoder, decoder = family.components(model)
    output = program_of(family, model, path)["output"] | {"beams": beams}
    onnx_export(decoder, tmp_path / "decoder.onnx", 18)
    openvino_backend.compile_component(tmp_path / "decoder.onnx", tmp_path, {}, TARGET, dict(output["cache"]))
    assert (tmp_path / "decoder.xml").read_text().count('type="Assign"') == 2 * LAYERS
    settings = {"threads": 1, "precision": "f32"}
    decode = openvino.compile_component(Directory(tmp_path), decoder.spec(), settings)
    encode = caller(encoder, path)
    made = [
        generate(decode, decoder.spec(), output, encode({encoder.inputs[0].name: sample}), output["prompt"])
        for sample in media(encoder).numpy()[:, None]
    ]
    assert made == ours(family, model, path, beams=beams)


def merged(directory: Callable[[str], Path], stride: int) -> tuple[Any, Component, Component]:
    """A Whisper whose positions after the 20th are all alike, its encoder, and the one with merged padding."""
    model = whisper.load(directory("whisper"))
    positions = model.model.encoder.embed_positions.weight
    positions.data[20:] = positions.data[20]
    plain = whisper.components(model)[0]
    whisper.merge_padding(model, stride, 0.1)
    return model, plain, whisper.components(model)[0]


def port_shape(port: Tensor, sizes: dict[str, int]) -> list[int]:
    return [sizes[axis] if isinstance(axis, str) else axis for axis in port.shape]


def silent(frames: int) -> torch.Tensor:
    """Features [2,M,100] that are silence from frame `frames` on."""
    features = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(2))
    features[:, :, frames:] = -1.5
    return features


@pytest.mark.parametrize("stride", [2, 3, 16, 1000])
@torch.inference_mode()
def test_merging_positions_that_are_alike_changes_nothing(stride, directory):
    """Proportional attention over one of m equal keys, with weight m, is attention over all of them."""
    model, plain, short = merged(directory, stride)
    features = silent(40)
    whole, (*part, bias) = plain.module(features), short.module(features[:, :, :48])
    for before, after in zip(whole, part, strict=True):
        assert after.shape[2] == bias.shape[3] == 24 + (50 - 24) // stride + 1
        torch.testing.assert_close(after[:, :, :20], before[:, :, :20], rtol=1e-4, atol=1e-4)
    decoder = whisper.components(model)[1]
    cross = [port.name for port in decoder.inputs if port.name.startswith("cross_")]
    made = {
        port.name: torch.zeros(port_shape(port, {"batch": 2, "past": 1}))
        for port in decoder.inputs
        if "past" in port.name
    }
    made |= {"decoder_input_ids": torch.tensor([[3], [5]]), "position_ids": torch.zeros(2, 1, dtype=torch.int64)}
    made |= {"decoder_attention_mask": torch.tensor([[0, 1], [0, 1]])}
    logits, *_ = decoder.module(**made, **dict(zip(cross, [*whole, torch.zeros(2, 1, 1, 50)], strict=True)))
    shorter, *_ = decoder.module(**made, **dict(zip(cross, [*part, bias], strict=True)))
    torch.testing.assert_close(shorter, logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_merging_where_nothing_is_padded_changes_nothing(directory):
    _, plain, short = merged(directory, 16)
    features = silent(100)
    *made, _ = short.module(features)
    for before, after in zip(plain.module(features), made, strict=True):
        torch.testing.assert_close(after[:, :, :50], before, rtol=1e-4, atol=1e-4)


def test_merged_padding_travels_with_the_checkpoint_and_its_graph(directory, tmp_path):
    source, out = directory("whisper"), tmp_path / "model"
    model = whisper.load(source)
    padding.prune(whisper, model, lambda: None, padding.Options(stride=4, tail=0.1))
    whisper.save(model, out, source)
    again = whisper.load(out)
    assert program_of(whisper, again, out)["audio"]["tail"] == 0.1
    for component in whisper.components(again):
        path = tmp_path / f"{component.name}.onnx"
        onnx_export(component, path, 18)
        check(component, path, 1e-4)


def test_merging_padding_that_a_model_has_not_is_refused():
    with pytest.raises(InputError, match="padding: vit does not pad its input"):
        padding.prune(plugin("models", "vit"), None, lambda: None, padding.Options())
    for bad in ({"stride": 1}, {"tail": 0.0}, {"keep": 1}):
        with pytest.raises(ValidationError):
            padding.Options(**bad)
