"""Hidden units that leave: neurons of feed-forward blocks, channels of ResNet; what stays, what is repaired."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.models import AttentionBlock, find_family, read_model, reasoner
from edgemm.models._graph import check, onnx_export
from edgemm.models._hidden_units import HiddenUnits, hidden_units, matrix
from edgemm.pruners import attention_heads, neurons
from edgemm.pruners._calibration import grams, repair, rows
from edgemm.reasoner.corpus import build_tokenizer
from edgemm.reasoner.model import Reasoner, ReasonerConfig
from edgemm.recipe import Recipe
from edgemm.report.markdown import pruning_summary
from edgemm.report.schema import Pruning
from edgemm.stages.load import load as load_stage
from edgemm.stages.prune import prune as prune_stage
from tests import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
ANSWERS = ("blue", "circle", "no", "red", "yes")
TOKENIZER = build_tokenizer(["is there a red shape?"], ANSWERS)
SIZES = {**checkpoints.REASONER, "image_depths": (2,)}
CONFIG = ReasonerConfig(answers=ANSWERS, vocab_size=TOKENIZER.get_vocab_size(), image_size=16, **SIZES)
CONVOLUTIONS = [f"image_encoder.resnet.encoder.stages.0.layers.{i}.layer.0" for i in range(2)]
FEED_FORWARD = ["text_encoder.bert.encoder.layer.0", "fusion.layers.0", "fusion.layers.1"]
NAMES = CONVOLUTIONS + FEED_FORWARD
SCORES = pytest.mark.parametrize("score", ["magnitude", "activation"])


def tiny() -> Reasoner:
    """Random weights, biases and running statistics, wide enough that every unit counts in the logits."""
    return copy.deepcopy(made())


@cache
def made() -> Reasoner:
    torch.manual_seed(0)
    model = Reasoner(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


@torch.inference_mode()
def logits(model: Reasoner, rows: int = 4) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, CONFIG.vocab_size, (rows, 7), generator=rng)
    return model(torch.randn(rows, 3, 16, 16, generator=rng), ids, torch.ones_like(ids))


def blocks(model: nn.Module) -> dict[str, HiddenUnits]:
    return {b.name: b for b in hidden_units(model)}


def cut(model: Reasoner, **options: Any) -> dict[str, tuple[list[float], list[int]]]:
    return neurons.prune(reasoner, model, lambda: logits(model), neurons.Options(**options))


def cut_heads(model: Reasoner, **options: Any) -> dict[str, tuple[list[float], list[int]]]:
    return attention_heads.prune(reasoner, model, lambda: logits(model), attention_heads.Options(**options))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def silence(block: HiddenUnits, units: list[int]) -> None:
    """Zero what reads `units`."""
    matrix(block.reads).unflatten(1, (block.units, block.per))[:, units] = 0


def test_every_block_is_found() -> None:
    assert [(b.name, b.units, b.per) for b in hidden_units(tiny())] == [
        *((name, 16, 9) for name in CONVOLUTIONS),
        *((name, 64, 1) for name in FEED_FORWARD),
    ]


@SCORES
@pytest.mark.parametrize("repaired", [False, True])
def test_keep_1_changes_no_bit(score: str, repaired: bool) -> None:
    model = tiny()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    changes = cut(model, keep=1, score=score, repair=repaired)
    assert [heads for _, heads in changes.values()] == [list(range(n)) for n in (16, 16, 64, 64, 64)]
    cut_heads(model, keep=1, repair=repaired)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@SCORES
@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_unit_that_nothing_reads_is_the_one_cut_and_is_not_missed(name: str, score: str, repaired: bool) -> None:
    model = tiny()
    silence(blocks(model)[name], [5])
    before = logits(model)
    changes = cut(model, keep=223 / 224, score=score, repair=repaired)
    left = {n: units for n, (_, units) in changes.items() if len(units) < len(changes[n][0])}
    assert left == {name: [u for u in range(len(changes[name][0])) if u != 5]}
    assert changes[name][0][5] == 0
    assert (logits(model) - before).abs().max() < 1e-6


def test_a_pruned_unit_is_a_silenced_unit() -> None:
    silenced, pruned = tiny(), tiny()
    for i, (a, b) in enumerate(zip(hidden_units(silenced), hidden_units(pruned), strict=True)):
        kept = list(range(i % 3, a.units, 3))
        silence(a, [u for u in range(a.units) if u not in kept])
        b.keep(kept[::-1])
        assert b.units == len(kept)
    assert (logits(pruned) - logits(silenced)).abs().max() < 1e-4
    assert (logits(pruned) - logits(tiny())).abs().max() > 0.1


@SCORES
@pytest.mark.parametrize("keep", [0.001, 0.3, 0.75])
def test_shapes_really_shrink(score: str, keep: float) -> None:
    model = tiny()
    before = {name: (b.makes, b.reads) for name, b in blocks(model).items()}
    changes = cut(model, keep=keep, score=score)
    assert sum(len(units) for _, units in changes.values()) == max(len(NAMES), round(keep * 224))
    for name, block in blocks(model).items():
        scores, units = changes[name]
        n = len(units)
        assert (block.makes, block.reads) == before[name] and 1 <= n <= len(scores)
        kernel = (3, 3) if name in CONVOLUTIONS else ()
        width = 16 if name in CONVOLUTIONS else 32
        assert block.makes.weight.shape == (n, 64 if name == CONVOLUTIONS[0] else width, *kernel)
        assert block.reads.weight.shape == (width, n, *kernel)
        if kernel:
            assert (block.makes.out_channels, block.norm.num_features, block.reads.in_channels) == (n, n, n)
            assert {len(t) for t in block.norm.state_dict().values() if t.ndim} == {n}
        else:
            assert (block.makes.out_features, len(block.makes.bias), block.reads.in_features) == (n, n, n)
    assert logits(model).isfinite().all()


def test_only_the_blocks_asked_for_are_touched() -> None:
    model = tiny()
    assert list(cut(model, keep=0.5, layers=("fusion.*",))) == FEED_FORWARD[1:]
    left = {name: b.units for name, b in blocks(model).items()}
    assert sum(left.pop(name) for name in FEED_FORWARD[1:]) == 64
    assert left == {CONVOLUTIONS[0]: 16, CONVOLUTIONS[1]: 16, FEED_FORWARD[0]: 64}


@pytest.mark.parametrize("multiple", [1, 8, 16, 100])
def test_blocks_are_filled_up_to_a_multiple_by_the_best_that_would_go(multiple: int) -> None:
    model, plain = tiny(), cut(tiny(), keep=0.4)
    changes = cut(model, keep=0.4, multiple=multiple)
    for name, (scores, units) in changes.items():
        assert len(units) == min(len(scores), -(-len(plain[name][1]) // multiple) * multiple)
        assert units == sorted(sorted(range(len(scores)), key=lambda u: -scores[u])[: len(units)])
    assert {name: b.units for name, b in blocks(model).items()} == {n: len(u) for n, (_, u) in changes.items()}
    assert logits(model).isfinite().all()


HEADS = {"keep": 0.5}
UNITS = {"keep": 0.4}


def test_the_order_of_pruners_does_not_change_shapes() -> None:
    one, other = tiny(), tiny()
    cut_heads(one, **HEADS), cut(one, **UNITS)
    cut(other, **UNITS), cut_heads(other, **HEADS)
    assert shapes(one) == shapes(other) != shapes(tiny())
    assert torch.equal(logits(one), logits(other))


def test_the_order_of_pruners_that_look_at_data_does_not_change_how_much_goes() -> None:
    one, other = tiny(), tiny()
    cut_heads(one, **HEADS, score="attention", repair=True), cut(one, **UNITS, score="activation", repair=True)
    cut(other, **UNITS, score="activation", repair=True), cut_heads(other, **HEADS, score="attention", repair=True)
    for model in (one, other):
        assert sum(b.heads for b in reasoner.attentions(model)) == 10
        assert sum(b.units for b in hidden_units(model)) == round(0.4 * 224)
        assert logits(model).isfinite().all()


# Scores, against plain loops


def test_magnitude_is_the_plain_loop() -> None:
    model = tiny()
    found = neurons.magnitude(hidden_units(model))
    layer = model.fusion.layers[1]
    for unit in (0, 17, 63):
        made_ = math.sqrt(sum(w**2 for w in layer.fc1.weight[unit].tolist()) + layer.fc1.bias[unit].item() ** 2)
        read = math.sqrt(sum(w**2 for w in layer.fc2.weight[:, unit].tolist()))
        assert found["fusion.layers.1"][unit] == pytest.approx(made_ * read, rel=1e-5)
    first, second = model.image_encoder.resnet.encoder.stages[0].layers[1].layer
    for unit in (0, 15):
        norm = first.normalization
        gain = abs(norm.weight[unit].item()) / math.sqrt(norm.running_var[unit].item() + norm.eps)
        made_ = math.sqrt(sum(w**2 for w in first.convolution.weight[unit].flatten().tolist()))
        read = math.sqrt(sum(w**2 for w in second.convolution.weight[:, unit].flatten().tolist()))
        assert found[CONVOLUTIONS[1]][unit] == pytest.approx(made_ * gain * read, rel=1e-5)


def test_activation_is_the_plain_loop() -> None:
    model = tiny()
    seen: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    handles = [
        b.reads.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0]))
        for name, b in blocks(model).items()
    ]
    logits(model, 3), logits(model, 2)
    for handle in handles:
        handle.remove()
    found = neurons.activation(hidden_units(model), lambda: [logits(model, 3), logits(model, 2)])
    for name, block in blocks(model).items():
        for unit in (0, 9):
            values = [v for x in seen[name] for v in (x[:, unit] if block.norm else x[..., unit]).flatten().tolist()]
            mean = sum(map(abs, values)) / len(values)
            read = block.reads.weight[:, unit].detach().norm().item()
            assert found[name][unit] == pytest.approx(mean * read, rel=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Repair


def readers(model: Reasoner) -> dict[str, tuple[nn.Module, int]]:
    found = {b.name: (b.reads, b.per) for b in hidden_units(model)}
    return found | {b.name: (b.linears[3], b.head_dim) for b in reasoner.attentions(model)}


@pytest.mark.parametrize(
    "name", [CONVOLUTIONS[1], *FEED_FORWARD[:2], "fusion.layers.0.cross_attention", "fusion.layers.1.self_attention"]
)
def test_repair_is_least_squares(name: str) -> None:
    """numpy.linalg.lstsq, of the whole output from the columns that stay and, where there is one, the bias."""
    model = tiny()
    module, per = readers(model)[name]
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(rows(module, args[0]).double()))
    logits(model, 60)
    handle.remove()
    x = torch.cat(seen).numpy()
    weight = matrix(module).double().numpy().copy()
    kept = [u for u in range(weight.shape[1] // per) if u % 2]
    columns = [u * per + i for u in kept for i in range(per)]
    bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().numpy().copy()
    ones = np.ones((len(x), 0 if module.bias is None else 1))
    known, wanted = np.hstack([x[:, columns], ones]), x @ weight.T + bias
    expected, *_ = np.linalg.lstsq(known, wanted, rcond=None)
    repair(module, kept, per, grams({"it": module}, lambda: logits(model, 60))["it"], ridge=1e-12)
    got = matrix(module)[:, columns].double().numpy()
    if module.bias is not None:
        got = np.hstack([got, module.bias.detach().double().numpy()[:, None]])
    error, best, whole = (
        np.linalg.norm(known @ solution.T - wanted)
        for solution in (got, expected.T, np.hstack([weight[:, columns], bias[:, None][:, : ones.shape[1]]]))
    )
    assert error <= best * (1 + 1e-4)
    assert best < 0.9 * whole
    np.testing.assert_allclose(known @ got.T, known @ expected, atol=0.01 * np.abs(wanted).max())


def test_a_large_ridge_changes_next_to_nothing() -> None:
    model = tiny()
    module, _ = readers(model)["fusion.layers.0"]
    before = module.weight.detach().clone()
    gram = grams({"it": module}, lambda: logits(model))["it"]
    repair(module, [1, 2], 1, gram, ridge=1e9)
    assert (module.weight - before).abs().max() < 1e-6


def test_repair_of_a_dead_block_is_finite() -> None:
    model = tiny()
    module, _ = readers(model)["fusion.layers.0"]
    model.fusion.layers[0].fc1.weight.data.zero_(), model.fusion.layers[0].fc1.bias.data.zero_()
    cut(model, keep=0.5, repair=True, layers=("fusion.layers.0",))
    assert module.weight.isfinite().all() and logits(model).isfinite().all()


@pytest.fixture(scope="module")
def real() -> tuple[Reasoner, Any, Any]:
    """The shipped model, 48 questions to calibrate on and 48 about other pictures to judge by."""
    from edgemm.data.easy_vqa import samples
    from edgemm.models import open_fp32
    from edgemm.models._sources import EMBEDDED

    directory = EMBEDDED["reasoner"]
    train = samples("train")
    calibration, held = train[:: len(train) // 48][:48], train[400 :: len(train) // 48][:48]
    assert not {s.image for s in calibration} & {s.image for s in held}

    def outputs(model: Reasoner, part: Any) -> Any:
        return open_fp32(reasoner, model, directory).outputs([s.query for s in part])["logits"]

    return (
        reasoner.load(directory),
        lambda model: outputs(model, calibration),
        lambda model: outputs(model, held),
    )


@pytest.mark.parametrize(
    ("pruner", "options"),
    [
        (neurons, {"keep": 0.5, "layers": ("image_encoder.*",), "score": "activation"}),
        (neurons, {"keep": 0.3, "layers": ("fusion.*", "text_encoder.*"), "score": "activation"}),
        (attention_heads, {"keep": 0.35, "score": "attention"}),
    ],
    ids=["channels", "neurons", "heads"],
)
def test_repair_brings_the_logits_of_the_shipped_model_nearer(real: Any, pruner: Any, options: Any) -> None:
    whole, calibrate, judge = real
    wanted = judge(whole)
    errors = []
    for repaired in (False, True):
        model = copy.deepcopy(whole)
        run = lambda model=model: calibrate(model)  # noqa: E731
        pruner.prune(reasoner, model, run, pruner.Options(**options, repair=repaired))
        errors.append(float(np.sqrt(np.mean((judge(model) - wanted) ** 2))))
    assert errors[1] < 0.8 * errors[0]


# On disk, and as graphs: every family


def family_names() -> list[str]:
    return list(checkpoints.MODELS)


def halved(family: Any, model: Any) -> tuple[list[AttentionBlock], list[HiddenUnits]]:
    """Another number of heads and units leaves each layer."""
    heads = [b for b in family.attentions(model) if b.q]
    units = hidden_units(model)
    for i, block in enumerate(heads):
        block.keep([0, 2] if i % 2 else [3])
    for i, hidden in enumerate(units):
        hidden.keep(list(range(i % 2, hidden.units, 2 + i % 3)))
    return heads, units


@pytest.mark.parametrize("name", family_names())
def test_a_pruned_checkpoint_keeps_its_shapes_and_runs_everywhere(name: str, tmp_path: Path) -> None:
    """Saved, read again, exported: torch, ONNX Runtime and OpenVINO agree."""
    whole = checkpoints.write(name, tmp_path / "whole")
    family = find_family(whole)
    model = read_model(family, whole)
    before = sum(p.numel() for p in model.parameters())
    _, units = halved(family, model)
    assert units
    family.save(model, tmp_path / "pruned", whole)
    again = read_model(family, tmp_path / "pruned")
    assert shapes(again) == shapes(model)
    assert sum(p.numel() for p in again.parameters()) < before
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    for component in family.components(again):
        path = tmp_path / f"{component.name}.onnx"
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


@pytest.mark.parametrize("repaired", [False, True])
def test_a_pruned_reasoner_is_the_same_on_disk(repaired: bool, tmp_path: Path) -> None:
    model = tiny()
    cut(model, keep=0.4, score="activation", repair=repaired)
    cut_heads(model, keep=0.5, score="attention", repair=repaired)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    reasoner.save(model, tmp_path / "model", tmp_path)
    loaded = read_model(find_family(tmp_path / "model"), tmp_path / "model")
    assert shapes(loaded) == shapes(model)
    assert torch.equal(logits(loaded), logits(model))


def test_the_stage_reports_every_block_and_counts_through_two_passes(tiny_model: Path, tmp_path: Path) -> None:
    prunes = [
        {"use": "neurons", "keep": 0.5, "score": "activation", "repair": True, "layers": ["fusion.*"]},
        {"use": "attention_heads", "keep": 0.5, "repair": True},
        {"use": "neurons", "keep": 0.5, "multiple": 8},
    ]
    values = {"data": "easy_vqa", "calibration": 16, "prune": prunes, "verify": {"limit": 20}}
    recipe = Recipe.model_validate({"name": "two", "model": str(tiny_model), **values})
    source = load_stage(recipe, tmp_path)
    artifact = prune_stage(source, recipe, tmp_path)
    report = Pruning.model_validate(artifact.json("pruning.json"))
    left = read_model(reasoner, artifact.path / "model")
    before, after = hidden_units(read_model(reasoner, tiny_model)), hidden_units(left)
    rows_ = [(h.name, h.units_before, h.units_after) for h in report.hidden]
    assert rows_ == [(b.name, b.units, a.units) for b, a in zip(before, after, strict=True)]
    assert sum(a.units for a in after) < 0.75 * sum(b.units for b in before)
    assert all(a.units % 8 == 0 or a.units == b.units for b, a in zip(before, after, strict=True))
    assert [x.heads_after for x in report.layers] == [b.heads for b in reasoner.attentions(left)]
    assert report.macs_after < report.macs_before and report.parameters_after < report.parameters_before
    (row,) = (r for r in pruning_summary(report) if r.name == "hidden units")
    assert row.before == f"{sum(b.units for b in before)} units"


# Bad input


@pytest.mark.parametrize("keep", [0, -0.5, 1.0001, math.nan, "half", None])
def test_keep_outside_0_to_1_is_refused(keep: Any) -> None:
    with pytest.raises(InputError, match="keep"):
        plugins.options("pruners", "neurons", {"keep": keep}, "recipe: prune.0")


@pytest.mark.parametrize("values", [{}, {"keep": 0.5, "score": "attention"}, {"keep": 0.5, "layers": []}])
def test_other_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        neurons.Options.model_validate(values)


def test_a_pattern_that_matches_nothing_is_named_and_nothing_is_cut() -> None:
    model = tiny()
    with pytest.raises(InputError) as caught:
        cut(model, keep=0.5, layers=("fusion.*", "decoder.*"))
    assert "'decoder.*'" in str(caught.value) and all(name in str(caught.value) for name in NAMES)
    assert shapes(model) == shapes(tiny())


def test_a_model_without_such_layers_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neurons: the model has no layer"):
        neurons.prune(reasoner, nn.Linear(2, 2), lambda: None, neurons.Options(keep=0.5))
    directory = checkpoints.write("resnet", tmp_path)
    family = find_family(directory)
    with pytest.raises(InputError, match="attention_heads: the model has no layer"):
        attention_heads.prune(family, read_model(family, directory), lambda: None, attention_heads.Options(keep=0.5))


def test_layers_whose_heads_cannot_leave_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.bare("vit-gpt2").save_pretrained(tmp_path)
    family = find_family(tmp_path)
    model = read_model(family, tmp_path)
    whole = [b.name for b in family.attentions(model) if not b.q]
    assert whole
    attention_heads.prune(family, model, lambda: None, attention_heads.Options(keep=0.5))
    logged = capsys.readouterr().err
    assert all(name in logged for name in whole)
    with pytest.raises(InputError, match=r"decoder\.\*\.attn"):
        attention_heads.prune(
            family, model, lambda: None, attention_heads.Options(keep=0.5, layers=("decoder.*.attn",))
        )


@pytest.mark.parametrize("options", [{"score": "activation"}, {"repair": True}])
def test_blocks_that_the_data_never_reached_are_named(options: dict[str, Any]) -> None:
    model = tiny()
    only_text = lambda: model.text_encoder(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3))  # noqa: E731
    with pytest.raises(InputError, match=r"never reached .*fusion\.layers\.1"):
        neurons.prune(reasoner, model, only_text, neurons.Options(keep=0.5, **options))
    assert shapes(model) == shapes(tiny())
