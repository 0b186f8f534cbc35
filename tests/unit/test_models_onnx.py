"""Graphs from outside: what is taken, and what is refused before a native library sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from edgemm.cli import build_app
from edgemm.data.noise import samples
from edgemm.errors import InputError
from edgemm.models import find_family, open_fp32, read_model
from edgemm.models._sources import resolve
from edgemm.runtime.session import Session

NEWEST = onnx.defs.onnx_opset_version()


def graph(
    path: Path,
    *,
    x: str = "x",
    y: str = "y",
    rows: int = 4,
    weight: Any = None,
    shape: Any = ...,
    dtype: int = TensorProto.FLOAT,
    op: str = "MatMul",
    domain: str = "",
    opset: int = 18,
    **save: Any,
) -> Path:
    """One node: `x` [N,rows] times a weight [rows,4] -> `y` [N,4]."""
    weight = numpy_helper.from_array(np.eye(rows, 4, dtype=np.float32), "w") if weight is None else weight
    made = helper.make_graph(
        [helper.make_node(op, [x, "w"], [y], domain=domain)],
        "one",
        [helper.make_tensor_value_info(x, dtype, ["N", rows] if shape is ... else shape)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["N", 4])],
        [weight],
    )
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(made, opset_imports=domains, ir_version=8), path, **save)
    return path


def opened(model: Path, runs: Path, **kinds: str) -> Session:
    directory = resolve(str(model), kinds, runs)
    family = find_family(directory)
    return open_fp32(family, read_model(family, directory), directory)


def refused(model: Path, runs: Path, **kinds: str) -> str:
    with pytest.raises(InputError) as caught:
        opened(model, runs / "runs", **kinds)
    assert not list((runs / "runs").glob("imported-*"))
    return str(caught.value)


@pytest.mark.parametrize("opset", [11, 13, 18, NEWEST])
def test_every_opset_that_is_named_runs(opset: int, tmp_path: Path) -> None:
    session = opened(graph(tmp_path / "model.onnx", opset=opset), tmp_path)
    answer = session.run(tensors={"x": np.arange(4, dtype=np.float32)})
    assert answer.outputs["y"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("opset", [1, 10, NEWEST + 1, 999])
def test_an_opset_too_old_or_too_new_is_refused(opset: int, tmp_path: Path) -> None:
    error = refused(graph(tmp_path / "model.onnx", opset=opset), tmp_path)
    assert f"model.onnx: opset {opset}\n" in error
    assert f"opset 11 to {NEWEST}" in error


def test_an_opset_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    """BatchNormalization with the outputs of training, which opset 14 no longer has."""
    path = graph(tmp_path / "model.onnx", opset=11)
    model = onnx.load(path)
    scale = [numpy_helper.from_array(np.ones(4, np.float32), name) for name in "sbmv"]
    model.graph.initializer.extend(scale)
    model.graph.node.append(helper.make_node("BatchNormalization", ["y", *"sbmv"], ["z", "m2", "v2", "m3", "v3"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 4]))
    onnx.save(model, path)
    assert "opset 11 can't be converted to 18" in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"op": "Magic", "domain": "com.acme"}, "custom ops com.acme.Magic\n"),
        ({"op": "FusedMatMul", "domain": "com.microsoft"}, "custom ops com.microsoft.FusedMatMul\n"),
        ({"op": "Magic"}, "No Op registered for Magic"),
        ({"shape": None}, "x has no known rank"),
        ({"shape": []}, "x is a scalar"),
        ({"weight": helper.make_tensor("w", TensorProto.BFLOAT16, [4, 4], [1.0] * 16)}, "w is 16 bits wide"),
        ({"weight": numpy_helper.from_array(np.ones((4, 4), np.float16), "w")}, "w is 16 bits wide"),
        ({"weight": numpy_helper.from_array(np.ones((4, 4)), "w"), "dtype": TensorProto.DOUBLE}, "x is DOUBLE"),
        ({"weight": numpy_helper.from_array(np.full((4, 4), np.nan, np.float32), "w")}, "w holds NaN"),
        ({"weight": numpy_helper.from_array(np.ones((4, 4), np.int64), "w")}, "can't load it"),
    ],
    ids=str,
)
def test_what_no_target_can_take_is_refused(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(graph(tmp_path / "model.onnx", **values), tmp_path)
    assert told in str(caught.value)
    assert "\n  fix: " in str(caught.value)


def test_an_output_of_unknown_rank_is_refused(tmp_path: Path) -> None:
    model = onnx.load(graph(tmp_path / "model.onnx"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "model.onnx")
    assert "y has no known rank" in refused(tmp_path / "model.onnx", tmp_path)


def test_infinity_in_a_mask_is_taken(tmp_path: Path) -> None:
    weight = np.where(np.eye(4), 1.0, 0.0).astype(np.float32)
    weight[3, 3] = -np.inf
    session = opened(graph(tmp_path / "model.onnx", weight=numpy_helper.from_array(weight, "w")), tmp_path)
    assert session.run(tensors={"x": np.ones(4, np.float32)}).outputs["y"].tolist() == [1, 1, 1, -np.inf]


def test_a_model_whose_answers_are_no_numbers_is_refused(tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", weight=numpy_helper.from_array(np.full((4, 4), np.inf, np.float32), "w"))
    command = ["compress", str(path), "--data", "random:2", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(build_app(), command)
    assert result.exit_code == 2, result.stderr
    assert "model.onnx gives NaN or infinity in y\n  fix: " in result.stderr


def test_nan_in_an_inner_graph_is_found(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array([np.nan], np.float32), "k"))],
        "branch",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])],
    )
    model = onnx.load(graph(tmp_path / "model.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["i"], then_branch=branch, else_branch=branch))
    onnx.save(model, tmp_path / "model.onnx")
    assert "k holds NaN" in refused(tmp_path / "model.onnx", tmp_path)


@pytest.mark.parametrize("spoil", [lambda content: b"", lambda content: content[:60], lambda content: b"not ONNX"])
def test_a_file_that_is_none_is_refused(spoil: Any, tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx")
    path.write_bytes(spoil(path.read_bytes()))
    assert f"{path}: no valid ONNX: " in refused(path, tmp_path)


EXTERNAL = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0}


def test_external_data_is_part_of_the_model(tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", **EXTERNAL)
    first = resolve(str(path), runs=tmp_path / "runs")
    assert resolve(str(path), runs=tmp_path / "runs") == first
    (tmp_path / "w.data").write_bytes(np.zeros((4, 4), np.float32).tobytes())
    assert resolve(str(path), runs=tmp_path / "runs") != first


@pytest.mark.parametrize("content", [None, b"", b"\0" * 63])
def test_external_data_that_is_missing_or_short_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", **EXTERNAL)
    (tmp_path / "w.data").unlink()
    if content is not None:
        (tmp_path / "w.data").write_bytes(content)
    error = refused(path, tmp_path)
    assert f"{path}: no valid ONNX: " in error
    assert "w" in error


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd"])
def test_external_data_elsewhere_is_not_read(location: str, tmp_path: Path) -> None:
    path = graph(tmp_path / "in" / "model.onnx", **EXTERNAL)
    (tmp_path / "secret").write_bytes(bytes(64))
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    assert location in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"y": "e"}, {"x": "e", "rows": 3}, "e is float32['batch', 4] in a and float32['batch', 3] in b"),
        ({"y": "e"}, {"x": "e", "shape": ["N", "M", 4]}, "e is float32['batch', 4] in a and"),
        ({"y": "e"}, {"x": "e", "dtype": TensorProto.INT64}, "e is float32['batch', 4] in a and int64"),
        ({"x": "e"}, {"x": "e", "y": "z", "rows": 3}, "e is float32['batch', 4] in a and float32['batch', 3] in b"),
        ({"x": "p", "y": "q"}, {"x": "q", "y": "p"}, "a, b: need each other's outputs"),
        ({"x": "p"}, {"x": "q"}, "a and b both give y"),
    ],
    ids=["size", "rank", "dtype", "shared input", "circle", "same output"],
)
def test_graphs_that_do_not_join_are_refused(
    first: dict[str, Any], second: dict[str, Any], told: str, tmp_path: Path
) -> None:
    graph(tmp_path / "dir" / "a.onnx", **first)
    graph(tmp_path / "dir" / "b.onnx", **second)
    assert told in refused(tmp_path / "dir", tmp_path)


def test_graphs_of_one_name_are_refused(tmp_path: Path) -> None:
    graph(tmp_path / "dir" / "a b.onnx", x="p", y="q")
    graph(tmp_path / "dir" / "a+b.onnx", x="r", y="s")
    assert "have the same name: a_b" in refused(tmp_path / "dir", tmp_path)


def test_a_directory_without_graphs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    assert "no config.json" in refused(tmp_path / "dir", tmp_path)


@pytest.mark.parametrize(("kind", "told"), [("image", "is no image"), ("audio", None), ("tokens", None)])
def test_kinds_that_a_recipe_gives_must_fit_the_shape(kind: str, told: str | None, tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx")
    if told:
        assert told in refused(path, tmp_path, x=kind)
    else:
        opened(path, tmp_path, x=kind)


def test_an_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "inputs.z: no such input" in refused(graph(tmp_path / "model.onnx"), tmp_path, z="image")


def test_noise_fits_every_dtype_that_is_taken(tmp_path: Path) -> None:
    """32-bit ids, as TensorFlow's exports have them, and masks of bool."""
    ports = [("ids", TensorProto.INT32), ("mask", TensorProto.BOOL)]
    made = helper.make_graph(
        [
            helper.make_node("Where", ["mask", "ids", "zero"], ["kept"]),
            helper.make_node("Cast", ["kept"], ["y"], to=TensorProto.FLOAT),
        ],
        "one",
        [helper.make_tensor_value_info(name, dtype, ["N", "T"]) for name, dtype in ports],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "T"])],
        [numpy_helper.from_array(np.int32(0), "zero")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    session = opened(tmp_path / "model.onnx", tmp_path)
    rows = samples(session.program, 3, 0)
    assert session.outputs([row.query for row in rows])["y"].shape == (3, 128)
