"""Recipes and targets: what ships is valid, and what a user writes wrong is named with its value and a fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from edgemm import host, plugins
from edgemm.errors import InputError
from edgemm.recipe import Recipe, check_plugins, load_recipe
from edgemm.target import Target, load_target
from edgemm.yaml_files import override, shipped_files

GOOD: dict[str, Any] = {
    "schema": 1,
    "prune": [{"use": "attention_heads", "keep": 0.5}],
    "quantize": {"use": "nncf"},
    "verify": {"metrics": [{"use": "accuracy", "margin": 0.01}]},
}
PRUNE: dict[str, Any] = {"use": "attention_heads", "keep": 0.5}


def written(folder: Path, values: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def refused(call: Any, *given: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*given)
    assert caught.value.exit_code == 2
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


def recipe_error(folder: Path, values: Any, overrides: dict[str, Any] | None = None) -> str:
    """The message for a recipe file, which names the file; plug-ins are checked as `recipes check` does."""
    path = written(folder, values)

    def load_and_check() -> None:
        check_plugins(load_recipe(path, overrides))

    return refused(load_and_check)


def test_there_are_recipes_and_targets() -> None:
    assert "reasoner" in shipped_files("recipes")
    assert "x86-openvino" in shipped_files("targets")


@pytest.mark.parametrize("name", shipped_files("recipes"))
def test_shipped_recipe_is_valid_and_its_plugins_take_its_options(name: str) -> None:
    recipe = load_recipe(name)
    check_plugins(recipe)
    assert recipe.name == name
    assert recipe.description
    assert load_recipe(str(shipped_files("recipes")[name])) == recipe


@pytest.mark.parametrize("name", shipped_files("targets"))
def test_shipped_target_is_valid_and_its_backend_exists(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.description
    assert target.backend in plugins.names("backends")
    assert load_target(str(shipped_files("targets")[name])) == target


def test_name_comes_from_the_file_unless_it_says_one(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, GOOD)).name == "mine"
    assert load_recipe(written(tmp_path, {**GOOD, "name": "other"})).name == "other"


def test_everything_has_a_default(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "schema: 1\n"))
    check_plugins(recipe)
    assert (recipe.model, recipe.prune, recipe.quantize) == ("reasoner", (), None)


@pytest.mark.parametrize(
    ("path", "value", "near"),
    [
        ("callibration", 300, "calibration"),
        ("verify.limits", 5, "limit"),
        ("verify.metrics.0.margins", 0.5, "margin"),
        ("prune.0.layer", "x*", "layers"),
        ("prune.0.Keep", 0.25, "keep"),
        ("quantize.smoothquant", 0.5, "smooth_quant"),
        ("export.opsets", 17, "opset"),
        ("train.learning_rates", 1.5, "learning_rate"),
        ("targets", "box", None),
    ],
)
def test_unknown_key_is_named_with_its_value_and_a_near_name(
    path: str, value: Any, near: str | None, tmp_path: Path
) -> None:
    message = recipe_error(tmp_path, override(yaml.safe_load(yaml.safe_dump(GOOD)), {path: value}, "test"))
    assert path.rpartition(".")[2] in message
    assert repr(value) in message
    if near is not None:
        assert f"did you mean {near!r}?" in message
    assert "known: " in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 2),
        ("schema", "one"),
        ("name", 5),
        ("model", ["reasoner"]),
        ("seed", "abc"),
        ("seed", -1),
        ("seed", 0.5),
        ("calibration", 0),
        ("calibration", None),
        ("prune", "attention_heads"),
        ("prune.0", "attention_heads"),
        ("quantize", "nncf"),
        ("quantize", {}),
        ("verify", []),
        ("verify.metrics", {"use": "accuracy"}),
        ("verify.metrics.0", "accuracy"),
        ("verify.metrics.0.margin", 0),
        ("verify.metrics.0.margin", 1),
        ("verify.metrics.0.margin", float("nan")),
        ("verify.rounds", 3),
        ("verify.resamples", 10),
        ("verify.limit", 0),
        ("export.opset", 17),
        ("export.opset", 21),
        ("export.tolerance", 0),
        ("export.tolerance", "loose"),
        ("train.threads", 0),
        ("train.bf16", "perhaps"),
    ],
)
def test_wrong_type_or_value_is_named(path: str, value: Any, tmp_path: Path) -> None:
    message = recipe_error(tmp_path, override(yaml.safe_load(yaml.safe_dump(GOOD)), {path: value}, "test"))
    assert path in message
    assert repr(value) in message
    assert str(tmp_path / "mine.yaml") in message


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, float("nan"), float("inf"), "half", None, [0.5]])
def test_share_to_keep_outside_of_0_to_1_is_named(keep: Any, tmp_path: Path) -> None:
    message = recipe_error(tmp_path, {**GOOD, "prune": [PRUNE, {**PRUNE, "keep": keep}]})
    assert repr(keep) in message
    assert "keep" in message
    assert "prune.1" in message


def test_pass_without_its_share_or_its_name_is_refused(tmp_path: Path) -> None:
    assert "keep" in recipe_error(tmp_path, {**GOOD, "prune": [{"use": "attention_heads"}]})
    assert "prune.0.use" in recipe_error(tmp_path, {**GOOD, "prune": [{"keep": 0.5}]})


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("prune.0.use", "pruners"),
        ("quantize.use", "quantizers"),
        ("verify.metrics.0.use", "metrics"),
    ],
)
@pytest.mark.parametrize("name", ["bogus", "", "../recipe", "__init__", "os", "Attention_Heads"])
def test_unknown_plugin_is_refused_and_the_known_are_listed(path: str, group: str, name: str, tmp_path: Path) -> None:
    message = recipe_error(tmp_path, override(yaml.safe_load(yaml.safe_dump(GOOD)), {path: name}, "test"))
    assert repr(name) in message
    assert all(known in message for known in plugins.names(group))


@pytest.mark.parametrize("key", [1, None, True, 2.5])
def test_key_that_is_no_text_is_refused(key: Any, tmp_path: Path) -> None:
    assert str(key) in recipe_error(tmp_path, {**GOOD, key: 1})
    assert str(key) in recipe_error(tmp_path, {**GOOD, "prune": [{**PRUNE, key: 1}]})


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        ({"seed": 7}, "seed", 7),
        ({"prune.0.keep": 0.25}, "prune.0.keep", 0.25),
        ({"prune.-1.keep": 0.25}, "prune.0.keep", 0.25),
        ({"verify.metrics.0.margin": 0.5}, "verify.metrics.0.margin", 0.5),
        ({"export.opset": 20}, "export.opset", 20),
        ({"export": {"opset": 20}, "export.tolerance": 0.5}, "export.opset", 20),
        ({"quantize": None}, "quantize", None),
        ({"prune": []}, "prune", ()),
    ],
)
def test_override_sets_one_field(overrides: dict[str, Any], path: str, expected: Any, tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD), overrides)
    check_plugins(recipe)
    node: Any = recipe
    for part in path.split("."):
        if isinstance(node, tuple):
            node = node[int(part)]
        else:
            node = getattr(node, part) if part in type(node).model_fields else node.values[part]
    assert node == expected
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8")) == GOOD


@pytest.mark.parametrize(
    "path",
    ["prune.5.keep", "prune.first.keep", "prune..keep", "schema.x", "prune.0.use.x", "prune.0.keep.x.y", "name.0.x"],
)
def test_override_of_a_place_that_is_not_there_is_refused(path: str, tmp_path: Path) -> None:
    message = recipe_error(tmp_path, {**GOOD, "name": "mine"}, {path: 0.75})
    assert f"--set {path}=0.75" in message


@pytest.mark.parametrize("path", ["nonsense", "verify.nonsense", "prune.0.nonsense", "a.b.c", ".", "seed.", ".seed"])
def test_override_of_an_unknown_key_is_refused(path: str, tmp_path: Path) -> None:
    assert "0.75" in recipe_error(tmp_path, GOOD, {path: 0.75})


@pytest.mark.parametrize(("path", "value"), [("seed", "x"), ("prune.0.keep", 2), ("quantize.preset", "fast")])
def test_override_is_validated_like_the_file(path: str, value: Any, tmp_path: Path) -> None:
    assert repr(value) in recipe_error(tmp_path, GOOD, {path: value})


@pytest.mark.parametrize("load", [load_recipe, load_target])
@pytest.mark.parametrize("name", ["bogus", "", "reasoner.json", "REASONER"])
def test_unknown_name_lists_the_known(load: Any, name: str) -> None:
    folder = "recipes" if load is load_recipe else "targets"
    message = refused(load, name)
    assert repr(name) in message
    assert all(known in message for known in shipped_files(folder))


@pytest.mark.parametrize("load", [load_recipe, load_target])
def test_file_that_cannot_be_read_is_named(load: Any, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("description: é\n".encode("latin-1"))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for name in ("absent.yaml", "folder.yaml", "latin.yaml", "file/x.yaml"):
        assert str(tmp_path / name) in refused(load, str(tmp_path / name))


@pytest.mark.parametrize("load", [load_recipe, load_target])
@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "\t- x", "a: 'x", "%", "&a *b", "!!python/object:os.system {}", "\0"]
)
def test_file_that_is_not_yaml_is_named(load: Any, text: str, tmp_path: Path) -> None:
    assert "mine.yaml is not YAML" in refused(load, written(tmp_path, text))


@pytest.mark.parametrize("load", [load_recipe, load_target])
@pytest.mark.parametrize(
    "text",
    ["seed: 2026-13-45", "seed: 0x_", "seed: !!bool x", "seed: !!int x", "seed: !!timestamp x", "seed: " + "[" * 5000],
)
def test_yaml_whose_values_cannot_be_built_is_named(load: Any, text: str, tmp_path: Path) -> None:
    """The reader of YAML leaves these to Python: ValueError, KeyError, AttributeError, RecursionError."""
    assert "mine.yaml" in refused(load, written(tmp_path, text))


@pytest.mark.parametrize("load", [load_recipe, load_target])
@pytest.mark.parametrize(("text", "kind"), [("- schema: 1", "list"), ("", "NoneType"), ("7", "int"), ("text", "str")])
def test_file_that_holds_no_keys_is_refused(load: Any, text: str, kind: str, tmp_path: Path) -> None:
    message = refused(load, written(tmp_path, text))
    assert "mine.yaml" in message
    assert kind in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 2),
        ("threads", 0),
        ("threads", "all"),
        ("precision", "int8"),
        ("backend", None),
        ("budgets.min_speedup", 0),
        ("budgets.max_p50_ms", -5),
        ("budgets.max_size_ratio", "small"),
        ("budgets.max_memory", 5),
        ("thread", 2),
    ],
)
def test_wrong_target_is_named(path: str, value: Any, tmp_path: Path) -> None:
    values = override({"schema": 1, "backend": "openvino"}, {path: value}, "test")
    message = refused(load_target, written(tmp_path, values))
    assert path in message
    assert repr(value) in message


def test_target_without_backend_is_refused(tmp_path: Path) -> None:
    assert "backend" in refused(load_target, written(tmp_path, "schema: 1"))


def test_target_override_sets_one_field() -> None:
    target = load_target("x86-openvino", {"threads": 1, "budgets.max_p50_ms": 5})
    assert (target.threads, target.budgets.max_p50_ms) == (1, 5)
    assert "budgets.speed" in refused(load_target, "x86-openvino", {"budgets.speed": 5})


@pytest.mark.parametrize("path", ["seed", "prune", "verify.rounds", "export.opset", "quantize.use"])
def test_recipe_is_frozen(path: str) -> None:
    node: Any = load_recipe("reasoner")
    *parents, last = path.split(".")
    for part in parents:
        node = getattr(node, part)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(node, last, 5)


def test_target_is_frozen() -> None:
    target = load_target("x86-openvino")
    with pytest.raises(ValidationError, match="frozen"):
        target.threads = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        target.budgets.min_speedup = 5  # type: ignore[misc]


@pytest.mark.parametrize("name", shipped_files("recipes"))
def test_recipe_survives_its_own_json(name: str) -> None:
    """A bundle carries the recipe as JSON and reads it back for `edgemm verify`."""
    recipe = load_recipe(name)
    again = Recipe.model_validate(recipe.model_dump(mode="json", by_alias=True))
    assert again == recipe
    check_plugins(again)


@pytest.mark.parametrize("name", shipped_files("targets"))
def test_target_survives_its_own_json(name: str) -> None:
    target = load_target(name)
    assert Target.model_validate(target.model_dump(mode="json", by_alias=True)) == target


RTX = {"schema": 1, "backend": "tensorrt_rtx", "sm": [86], "precision": "f16", "precisions": ["int8", "fp16"]}
ORIN = {**RTX, "backend": "tensorrt", "compile": "on-device", "sm": [87], "tensorrt": "10.3"}


@pytest.mark.parametrize(
    ("values", "change", "reason"),
    [
        (RTX, {"sm": [86, 87]}, "sm = 87: TensorRT-RTX compiles for 75, 80, 86, 89, 120, 121, and no Jetson is one"),
        (RTX, {"sm": []}, "no GPU is named"),
        (RTX, {"compile": "on-device"}, "TensorRT-RTX builds ahead of time"),
        (RTX, {"precision": "bf16"}, "precision = bf16: TensorRT graphs have an FP16 base"),
        (RTX, {"precisions": ["int8"]}, "FP16 is what INT8 must beat"),
        (RTX, {"precisions": ["fp8", "fp16"], "sm": [89]}, "edgemm makes INT8 and FP16 graphs, and no FP8"),
        (ORIN, {"precisions": ["fp8", "fp16"]}, r"sm 87 \(Jetson Orin\) has no FP8 units"),
        (ORIN, {"sparsity": "2:4"}, "sparsity = 2:4 with INT8: TensorRT picks no sparse kernels for graphs with Q/DQ"),
        (RTX, {"sparsity": "2:4", "precisions": ["fp16"]}, "TensorRT-RTX takes the flag and does nothing"),
        (ORIN, {"sparsity": "2:4", "precisions": ["fp16"], "sm": [72]}, "sm 72 has no sparse tensor cores"),
        (ORIN, {"tensorrt": "8.6"}, "tensorrt = 8.6: strongly typed INT8 graphs need TensorRT 10"),
        (ORIN, {"shapes": {"batch": [1, 8, 4]}}, r"shapes.batch = \[1, 8, 4\] is not min <= opt <= max"),
        ({"schema": 1, "backend": "openvino"}, {"sm": [87]}, "sm means nothing to backend openvino"),
        ({"schema": 1, "backend": "openvino"}, {"isa": "sse2"}, "isa = 'sse2': Input should be 'amx', 'avx512_vnni'"),
        (RTX, {"isa": "avx2"}, "isa = avx2: a TensorRT target multiplies on the GPU"),
    ],
)
def test_target_that_cannot_be_is_refused_with_the_reason(
    values: dict[str, Any], change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert load_target(str(written(tmp_path, values))).backend == values["backend"]
    message = refused(load_target, written(tmp_path, {**values, **change}))
    assert re.search(reason, message), message
    assert "fix: " in message


@pytest.mark.parametrize("name", [n for n in shipped_files("targets") if not n.startswith("x86")])
def test_shipped_tensorrt_target_makes_int8_and_fp16(name: str) -> None:
    target = load_target(name)
    assert target.dialect == "tensorrt"
    assert target.precisions == ("int8", "fp16")
    assert target.level == ("L2" if target.compile == "host" else "L1")


def test_form_of_a_component_is_no_option_of_its_quantizer() -> None:
    components = {"fusion": {"int8": False, "precision": "bf16"}, "text*": {"smooth_quant": -1}}
    recipe = load_recipe("default", {"quantize.components": components})
    check_plugins(recipe)
    assert recipe.quantize
    assert (recipe.quantize.of("fusion"), recipe.quantize.of("text_encoder")) == ({}, {"smooth_quant": -1})
    fusion, text = recipe.quantize.form("fusion"), recipe.quantize.form("text_encoder")
    assert (fusion.int8, fusion.precision, text.int8, text.precision) == (False, "bf16", True, None)


@pytest.mark.parametrize("change", [{"int8": "perhaps"}, {"precision": "f64"}, {"smooth": 1}])
def test_form_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        check_plugins(load_recipe("default", {"quantize.components": {"fusion": change}}))


def test_budget_must_be_a_time() -> None:
    with pytest.raises(InputError, match=r"quantize\.search\.budget_minutes"):
        load_recipe("reasoner-int8", {"quantize.search.budget_minutes": 0})


CPUINFO = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nmodel name\t: A CPU\n"


@pytest.mark.parametrize(
    ("flags", "isa", "narrow"),
    [
        ("avx2 avx512bw avx512_vnni amx_int8", "amx", False),
        ("avx2 avx512bw avx512_vnni", "avx512_vnni", False),
        ("avx2 avx_vnni", "avx_vnni", False),
        ("avx2 avx512bw", "avx512", True),
        ("avx2", "avx2", True),
        ("sse4_2", None, False),
    ],
)
def test_instruction_set_is_read_off_the_flags(
    flags: str, isa: str | None, narrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags=flags))
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert host.host_isa() == isa
    assert host.adds_in_16_bits(host.host_isa()) is narrow
    assert (host.host()["cpu"], host.host()["isa"]) == ("A CPU x2", isa or "unknown")
