"""Whole blocks that leave: which, what stays as it is, and that what is left runs everywhere."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.models import Component, find_family, read_model, reasoner
from edgemm.models._blocks import stacks
from edgemm.models._graph import check, onnx_export
from edgemm.models._hidden_units import hidden_units
from edgemm.pruners import attention_heads, layers, neurons
from edgemm.recipe import Recipe
from edgemm.report.schema import Pruning
from edgemm.stages.load import load as load_stage
from edgemm.stages.prune import prune as prune_stage
from tests import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
STACKS = {
    "bert": {"encoder.layer": 2},
    "blip": {
        "vision_model.encoder.layers": 2,
        "text_encoder.encoder.layer": 2,
        "text_decoder.bert.encoder.layer": 2,
    },
    "clip": {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2},
    "layoutlmv3": {"layoutlmv3.encoder.layer": 3},
    "resnet": {},
    "trocr": {"encoder.layers": 3, "decoder.model.decoder.layers": 3},
    "vilt": {"vilt.encoder.layer": 2},
    "vit": {"vit.layers": 2},
    "vit-gpt2": {"encoder.layers": 3, "decoder.transformer.h": 3},
    "wav2vec2": {"wav2vec2.encoder.layers": 2},
    "whisper": {"model.encoder.layers": 3, "model.decoder.layers": 3},
}
BLOCKY = [name for name, found in STACKS.items() if found]


def opened(name: str, directory: Path) -> tuple[ModuleType, Any, Path]:
    """A family's model of seeded weights, and a checkpoint of it."""
    if name in checkpoints.MODELS:
        whole = checkpoints.write(name, directory)
    else:
        checkpoints.bare(name).save_pretrained(whole := directory)
    family = find_family(whole)
    return family, read_model(family, whole), whole


@torch.inference_mode()
def outputs(family: ModuleType, model: Any) -> list[Tensor]:
    """What every component makes of its example."""
    made: list[Tensor] = []
    for component in family.components(model):
        out = component.module(**component.example(2, small=True))
        made += out if isinstance(out, tuple) else (out,)
    return made


def cut(family: ModuleType, model: Any, **options: Any) -> dict[str, Any]:
    return layers.prune(family, model, lambda: outputs(family, model), layers.Options(**options))


def heights(model: Any) -> dict[str, int]:
    return {s.name: len(s.layers) for s in stacks(model)}


def runs_everywhere(component: Component, directory: Path) -> None:
    """torch, ONNX's checker, ONNX Runtime and OpenVINO agree."""
    path = directory / f"{component.name}.onnx"
    onnx_export(component, path, 18)
    check(component, path, 1e-4)
    example = component.example(2, small=True)
    with torch.inference_mode():
        out = component.module(**example)
    compiled = ov.Core().compile_model(ov.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = compiled({name: tensor.numpy() for name, tensor in example.items()})
    for port, value in zip(component.outputs, out if isinstance(out, tuple) else (out,), strict=True):
        error = np.abs(got[port.name] - value.numpy()).max() / max(np.abs(value.numpy()).max(), 1e-6)
        assert error < 1e-3, (component.name, port.name)


@pytest.mark.parametrize("name", STACKS)
def test_every_stack_is_found(name: str, tmp_path: Path) -> None:
    _, model, _ = opened(name, tmp_path)
    assert heights(model) == STACKS[name]


def test_only_the_innermost_lists_are_stacks() -> None:
    """Swin's stages are lists of blocks in a list: between stages the shape changes."""
    import transformers as tf

    audio = tf.ClapAudioConfig(depths=[2, 1], num_attention_heads=[2, 4], patch_embeds_hidden_size=16, spec_size=64)
    assert heights(tf.ClapAudioModel(audio)) == {f"audio_encoder.layers.{i}.blocks": n for i, n in enumerate((2, 1))}


@pytest.mark.parametrize("name", BLOCKY)
@pytest.mark.parametrize("options", [{"keep": 1}, {"drop": 0}], ids=str)
def test_keep_1_changes_no_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    family, model, _ = opened(name, tmp_path)
    before, state = outputs(family, model), copy.deepcopy(model.state_dict())
    assert cut(family, model, **options) == {}
    assert all(torch.equal(a, b) for a, b in zip(outputs(family, model), before, strict=True))
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def silence(block: Any) -> None:
    """Make a pre-norm block pass its states on: nothing is added to them."""
    for name, parameter in block.named_parameters():
        if any(part in name for part in ("out_proj", "o_proj", "fc2", "c_proj", "output_dense")):
            torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("name", ["clip", "vit", "vit-gpt2", "whisper"])
@torch.inference_mode()
def test_a_block_that_adds_nothing_is_the_one_cut_and_is_not_missed(name: str, tmp_path: Path) -> None:
    family, model, _ = opened(name, tmp_path)
    stack = stacks(model)[-1]
    silence(stack.layers[1])
    last = {"clip": 0, "vit": 0}.get(name, -1)  # the component that holds the stack
    whole = family.components(model)[last]
    example = whole.example(2, small=True)
    before = whole.module(**example)
    gone, stay = stack.layers[1], [b for i, b in enumerate(stack.layers) if i != 1]
    changes = cut(family, model, drop=1)
    assert list(stack.layers) == stay and gone not in stack.layers
    assert changes and all(n.startswith(f"{stack.name}.1.") or n == f"{stack.name}.1" for n in changes)
    part = family.components(model)[last]
    old = {port.name: port.name.replace("_1", "_2") for port in part.inputs}  # the third block's cache is the second's
    after = part.module(**{new: example[name] for new, name in old.items()})
    first = [out[0] if isinstance(out, tuple) else out for out in (before, after)]
    assert (first[0] - first[1]).abs().max() < 1e-6


def test_influence_is_the_plain_cosine(tmp_path: Path) -> None:
    family, model, _ = opened("vit", tmp_path)
    (stack,) = stacks(model)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in stack.layers:
        block.register_forward_hook(lambda _m, i, o: seen.append((i[0], o if torch.is_tensor(o) else o[0])))
    outputs(family, model)
    blocks = [layers.Block(f"b{i}", stack, i) for i in range(2)]
    found = layers.influence(blocks, lambda: outputs(family, model))
    for i, (x, y) in enumerate(seen[:2]):
        rows = [(a.double(), b.double()) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
        plain = [1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in rows]
        assert found[f"b{i}"] == pytest.approx(sum(plain) / len(plain), rel=1e-4)


@pytest.mark.parametrize("name", BLOCKY)
def test_what_is_left_is_the_same_on_disk_and_runs_everywhere(name: str, tmp_path: Path) -> None:
    family, model, whole = opened(name, tmp_path / "whole")
    before = sum(p.numel() for p in model.parameters())
    stack = stacks(model)[-1]
    if name == "layoutlmv3":  # heads too, of another number in each block: their columns of the bias go with them
        for i, block in enumerate(family.attentions(model)):
            block.keep([i, 3])
    cut(family, model, drop=1, layers=(f"{stack.name}.*",))
    assert heights(model) == {**STACKS[name], stack.name: STACKS[name][stack.name] - 1}
    family.save(model, tmp_path / "pruned", whole)
    again = read_model(family, tmp_path / "pruned")
    assert sum(p.numel() for p in again.parameters()) < before
    assert all(torch.equal(a, b) for a, b in zip(outputs(family, again), outputs(family, model), strict=True))
    for component in family.components(again):
        runs_everywhere(component, tmp_path)


def test_a_decoders_cache_is_as_long_as_its_stack(tmp_path: Path) -> None:
    family, model, whole = opened("blip", tmp_path)
    cut(family, model, drop=1, layers=("text_decoder.*",))
    assert len(family.program(model, whole)["output"]["cache"]) == 2
    (decoder,) = (c for c in family.components(model) if c.name == "decoder")
    assert [p.name for p in decoder.outputs] == ["logits", "present_key_0", "present_value_0"]


@pytest.mark.parametrize("keep, left", [(0.01, 2), (0.5, 2), (0.75, 3)])
def test_every_stack_keeps_a_block(keep: float, left: int, tmp_path: Path) -> None:
    family, model, _ = opened("clip", tmp_path)
    cut(family, model, keep=keep)
    assert sum(heights(model).values()) == left and min(heights(model).values()) >= 1


def test_the_order_of_pruners_does_not_change_shapes(tmp_path: Path) -> None:
    family, one, whole = opened("clip", tmp_path)
    other = read_model(family, whole)
    heads, units = attention_heads.Options(keep=0.5), neurons.Options(keep=0.5)
    run = lambda: None  # noqa: E731
    cut(family, one, drop=1, layers=("vision_model.*",))
    attention_heads.prune(family, one, run, heads), neurons.prune(family, one, run, units)
    neurons.prune(family, other, run, units), attention_heads.prune(family, other, run, heads)
    cut(family, other, drop=1, layers=("vision_model.*",))
    assert heights(one) == heights(other)
    for found in (lambda m: [b.heads for b in family.attentions(m)], lambda m: [h.units for h in hidden_units(m)]):
        assert len(found(one)) == len(found(other)) == 3


def test_the_stage_reports_layers_by_the_names_that_they_had(tiny_model: Path, tmp_path: Path) -> None:
    prunes = [
        {"use": "layers", "drop": 1, "layers": ["fusion.*.0"]},
        {"use": "attention_heads", "keep": 0.5, "layers": ["fusion.layers.0.*"]},
        {"use": "neurons", "keep": 0.5, "layers": ["fusion.layers.0"]},
    ]
    values = {"data": "easy_vqa", "calibration": 8, "prune": prunes, "verify": {"limit": 20}}
    recipe = Recipe.model_validate({"name": "two", "model": str(tiny_model), **values})
    artifact = prune_stage(load_stage(recipe, tmp_path), recipe, tmp_path)
    report = Pruning.model_validate(artifact.json("pruning.json"))
    left = read_model(reasoner, artifact.path / "model")
    assert heights(left) == {"text_encoder.bert.encoder.layer": 1, "fusion.layers": 1}
    heads = {x.name: x.heads_after for x in report.layers if x.kind != "self" or "fusion" in x.name}
    assert heads.pop("fusion.layers.0.self_attention") == heads.pop("fusion.layers.0.cross_attention") == 0
    assert sum(heads.values()) == 4 and set(heads) == {f"fusion.layers.1.{k}_attention" for k in ("self", "cross")}
    units = {u.name: (u.units_before, u.units_after) for u in report.hidden if u.name.startswith("fusion")}
    assert units == {"fusion.layers.0": (64, 0), "fusion.layers.1": (64, 32)}
    assert report.macs_after < report.macs_before


# Bad input


@pytest.mark.parametrize("values", [{"keep": 0}, {"keep": 1.1}, {"keep": math.nan}, {"drop": -1}, {"keep": "half"}])
def test_keep_outside_0_to_1_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        plugins.options("pruners", "layers", values, "recipe: prune.0")


@pytest.mark.parametrize("values", [{}, {"keep": 0.5, "drop": 1}])
def test_one_of_keep_and_drop_is_to_be_given(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give one of keep"):
        plugins.options("pruners", "layers", values, "recipe: prune.0")


def test_more_blocks_than_can_go_are_refused(tmp_path: Path) -> None:
    family, model, _ = opened("clip", tmp_path)
    with pytest.raises(InputError, match="drop = 3: of 4 blocks at most 2 can go"):
        cut(family, model, drop=3)
    assert heights(model) == STACKS["clip"]


def test_a_pattern_that_matches_no_block_is_named(tmp_path: Path) -> None:
    family, model, _ = opened("clip", tmp_path)
    with pytest.raises(InputError, match=r"'fusion\.\*'.*\n.*vision_model\.encoder\.layers\.1"):
        cut(family, model, drop=1, layers=("fusion.*",))


def test_models_without_blocks_are_refused(tmp_path: Path) -> None:
    family, model, _ = opened("resnet", tmp_path)
    with pytest.raises(InputError, match="layers: the model has no layer"):
        cut(family, model, drop=1)


def test_a_model_that_reads_all_its_layers_is_refused() -> None:
    import transformers as tf

    from edgemm.models import wav2vec2

    small = {**checkpoints.TINY, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16}
    config = tf.Wav2Vec2Config(**small, num_conv_pos_embedding_groups=2, use_weighted_layer_sum=True)
    with pytest.raises(InputError, match="use_weighted_layer_sum"):
        cut(wav2vec2, tf.Wav2Vec2ForSequenceClassification(config).eval(), drop=1)


def test_blocks_that_the_data_never_reached_are_named(tmp_path: Path) -> None:
    family, model, _ = opened("clip", tmp_path)
    image = family.components(model)[0]
    run = lambda: image.module(**image.example(1))  # noqa: E731
    with pytest.raises(InputError, match=r"never reached text_model\.encoder\.layers\.0"):
        layers.prune(family, model, run, layers.Options(drop=1))
    assert heights(model) == STACKS["clip"]
