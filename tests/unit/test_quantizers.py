"""The three quantizers on one transformer block whose activations have outliers, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from edgemm.errors import InputError, ToolchainError
from edgemm.graph import layer_of
from edgemm.graph.bypass import constant_products, quantized_products
from edgemm.graph.smoothing import factors, smooth
from edgemm.graph.unsigned import unsigned_activations
from edgemm.plugins import names, plugin
from edgemm.quantizers import neural_compressor, nncf, onnxruntime
from edgemm.recipe import Recipe, check_plugins
from edgemm.simulation import answers, simulated, sqnr_db

WIDTH, OUTLIERS = 32, [3, 11, 25]
Graph = tuple[Any, onnx.ModelProto, list[dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Graph:
    """Component, graph and samples of different lengths: a pre-norm block and a head behind a post-norm."""
    import torch
    from torch import nn

    from edgemm.models import Component, Tensor
    from edgemm.models._graph import onnx_export

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.fc1, self.fc2, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH)
            with torch.no_grad():
                for norm, reader in ((self.norm, self.fc1), (self.post, self.head)):
                    norm.weight[OUTLIERS] = 100
                    reader.weight[:, OUTLIERS] /= 100

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.post(x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x)))))
            return x / 100 + self.head(x)

    torch.manual_seed(0)
    ports = [Tensor(n, "float32", ("batch", "tokens", WIDTH)) for n in "xy"]
    component = Component("g", Block().eval(), (ports[0],), (ports[1],), {"batch": 8, "tokens": 16})
    path = tmp_path_factory.mktemp("block") / "g.onnx"
    onnx_export(component, path, 18)
    rng = np.random.default_rng(0)
    lengths = [5, 9, 16] * 8
    return component, onnx.load(path), [{"x": rng.standard_normal((1, n, WIDTH), np.float32)} for n in lengths]


def quantized(name: str, block: Graph, **options: Any) -> onnx.ModelProto:
    component, model, samples = block
    module = plugin("quantizers", name)
    extra = {"component": component} if getattr(module, "NEEDS_MODULE", False) else {}
    made: onnx.ModelProto = module.quantize(model, samples, module.Options(**options), **extra)
    onnx.checker.check_model(made, full_check=True)
    return made


def sqnr(block: Graph, made: onnx.ModelProto) -> float:
    """SQNR of `made` against FP32, in dB, its Q/DQ computed as written."""
    component, model, samples = block
    wanted, got = (answers(simulated(graph, component.spec()), samples[:6]) for graph in (model, made))
    return sqnr_db(wanted, got)


def test_smoothing_changes_nothing_but_the_channels(block: Graph) -> None:
    _, model, samples = block
    for alpha in (0.5, "auto"):
        made = smooth(model, samples, alpha)
        assert sqnr(block, made) > 100
        kinds = Counter(n.op_type for n in made.graph.node)
        assert kinds["Mul"] == Counter(n.op_type for n in model.graph.node)["Mul"] + 1, "for what else reads post"
    assert smooth(model, samples, -1).graph.node == model.graph.node


def test_channels_with_outliers_are_divided_most(block: Graph) -> None:
    _, model, samples = block
    found = factors(model, samples, 0.5)
    readers = {n.name: layer_of(n) for n in constant_products(model)}
    assert {readers[name] for name in found} == {"fc1", "head"}, "the products behind a LayerNorm"
    for s in found.values():
        assert set(np.argsort(s)[-3:]) == set(OUTLIERS)


def test_alpha_is_each_layers_own(block: Graph) -> None:
    _, model, samples = block
    readers = {layer_of(n): n.name for n in constant_products(model)}
    found = factors(model, samples, 0.5, {readers["fc1"]: -1.0})
    assert set(found) == {readers["head"]}


def class_token_head(axis: int, *, elsewhere: bool = False) -> onnx.ModelProto:
    """x float32[b,4,WIDTH] -> LayerNormalization -> one of `axis` chosen -> product with constant weights -> y."""
    rng = np.random.default_rng(0)
    gain = np.ones(WIDTH, np.float32)
    gain[OUTLIERS] = 100
    weight = rng.standard_normal((4 if axis == 2 else WIDTH, 8), np.float32)
    constants = {"gain": gain, "bias": gain * 0, "weight": weight, "first": np.array(0)}
    nodes = [
        onnx.helper.make_node("LayerNormalization", ["x", "gain", "bias"], ["normed"], axis=-1),
        onnx.helper.make_node("Gather", ["normed", "first"], ["chosen"], axis=axis),
        onnx.helper.make_node("MatMul", ["chosen", "weight"], ["y"], "head"),
    ]
    ports = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (
        ("x", ["b", 4, WIDTH]), ("y", ["b", 8]), ("chosen", None), ("normed", ["b", 4, WIDTH])
    )]  # fmt: skip
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        ports[:1],
        ports[1:3] if elsewhere else ports[1:2],
        [onnx.numpy_helper.from_array(v, n) for n, v in constants.items()],
        value_info=ports[3:],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def test_a_head_that_reads_a_class_token_is_smoothed(one_thread: None) -> None:
    model = class_token_head(axis=1)
    samples = [{"x": np.random.default_rng(i).standard_normal((1, 4, WIDTH), np.float32)} for i in range(8)]
    (s,) = factors(model, samples, 0.5).values()
    assert set(np.argsort(s)[-3:]) == set(OUTLIERS)
    spec = {"name": "g", "inputs": [{"name": "x", "dtype": "float32", "shape": ["b", 4, WIDTH]}], "outputs": [
        {"name": "y", "dtype": "float32", "shape": ["b", 8]}
    ]}  # fmt: skip
    wanted, got = (answers(simulated(graph, spec), samples) for graph in (model, smooth(model, samples, 0.5)))
    assert sqnr_db(wanted, got) > 100


@pytest.mark.parametrize("other", [{"axis": 2}, {"axis": 1, "elsewhere": True}], ids=["a channel", "an output"])
def test_what_is_chosen_otherwise_is_not_smoothed(other: dict[str, Any]) -> None:
    samples = [{"x": np.ones((1, 4, WIDTH), np.float32)}]
    assert factors(class_token_head(**other), samples, 0.5) == {}


def test_a_table_that_is_kept_is_kept_for_all_that_read_it() -> None:
    """Rows looked up, and the product of all of them: NNCF rounds the one tensor where either may be rounded."""
    table = np.random.default_rng(0).standard_normal((512, WIDTH)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["rows"], "lookup"),
        onnx.helper.make_node("Transpose", ["rows"], ["turned"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["table", "turned"], ["logits"], "vocabulary"),
    ]
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["t"])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [512, "t"])
    graph = onnx.helper.make_graph(nodes, "g", [ids], [logits], [onnx.numpy_helper.from_array(table, "table")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    assert nncf.sharing(model, ["vocabulary"]) == {"vocabulary", "lookup"}
    made = nncf.quantize(model, [], nncf.Options(weight_only=True, keep_float=("vocabulary",)))
    (kept,) = (onnx.numpy_helper.to_array(i) for i in made.graph.initializer if i.name == "table")
    np.testing.assert_array_equal(kept, table)


def test_a_layer_is_known_by_its_weights_or_by_what_torch_wrote_down() -> None:
    node = onnx.helper.make_node("Conv", ["x", "stem.conv.weight"], ["y"])
    assert layer_of(node) == "stem.conv"
    node.input[1] = "val_3"
    assert layer_of(node) == ""
    scopes = node.metadata_props.add()
    scopes.key, scopes.value = "pkg.torch.onnx.name_scopes", "['', 'stem', 'stem.norm', 'batch_norm']"
    assert layer_of(node) == "stem.norm"


@pytest.mark.parametrize("name", names("quantizers"))
def test_a_quantizer_keeps_a_block_with_outliers(name: str, block: Graph) -> None:
    """All products become INT8 with weights stored so, and smoothing is what keeps them right."""
    made = quantized(name, block, smooth_quant="auto", ranges="mse" if name != "onnxruntime" else "minmax")
    assert sqnr(block, made) > 35
    assert len(quantized_products(made)) == 3
    stored = [i for i in made.graph.initializer if len(i.dims) == 2]
    assert {i.data_type for i in stored} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("name", ["nncf", "onnxruntime"])
def test_without_smoothing_it_does_not(name: str, block: Graph) -> None:
    assert sqnr(block, quantized(name, block, smooth_quant=-1)) < 25


@pytest.mark.parametrize("name", names("quantizers"))
def test_observers_of_one_layer_and_what_stays_float(name: str, block: Graph) -> None:
    other = {"nncf": "mse", "onnxruntime": "entropy", "neural_compressor": "minmax"}[name]
    options = {"smooth_quant": 0.5, "keep_float": ("head",)}
    plain = quantized(name, block, **options)
    mixed = quantized(name, block, **options, layers={"fc2": {"ranges": other}})
    products = {n.name: layer_of(n) for n in constant_products(block[1])}
    assert {products[n] for n in quantized_products(mixed)} == {"fc1", "fc2"}

    def scale(model: onnx.ModelProto, layer: str) -> float:
        values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        made = {o: n for n in model.graph.node for o in n.output}
        node = next(n for n in model.graph.node if products.get(n.name) == layer)
        return float(values[made[node.input[0]].input[1]])

    assert scale(mixed, "fc2") != scale(plain, "fc2")
    assert scale(mixed, "fc1") == scale(plain, "fc1")


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy"])
def test_onnxruntime_takes_samples_of_different_lengths(ranges: str, block: Graph) -> None:
    assert sqnr(block, quantized("onnxruntime", block, ranges=ranges)) > 25


def test_dynamic_needs_no_ranges(block: Graph) -> None:
    made = quantized("onnxruntime", block, dynamic=True)
    kinds = Counter(n.op_type for n in made.graph.node)
    assert (kinds["DynamicQuantizeLinear"], kinds["MatMulInteger"], kinds["MatMul"]) == (3, 3, 0)
    assert sqnr(block, made) > 35
    assert not onnxruntime.needs_samples(onnxruntime.Options(dynamic=True, smooth_quant=-1))


def test_four_bit_weights_are_half_of_eight(block: Graph) -> None:
    eight, four = (quantized("nncf", block, weight_only=True, bits=bits) for bits in (8, 4))
    assert sqnr(block, eight) > sqnr(block, four) > 15
    assert "MatMulNBits" in {n.op_type for n in four.graph.node}


def test_activations_become_unsigned_and_the_graph_computes_the_same(block: Graph) -> None:
    made = quantized("nncf", block)
    before = sqnr(block, made)
    unsigned = unsigned_activations(made)
    onnx.checker.check_model(unsigned, full_check=True)
    constants = {i.name: i.data_type for i in unsigned.graph.initializer}
    zeros = {constants[n.input[2]] for n in unsigned.graph.node if n.op_type == "QuantizeLinear"}
    assert zeros == {onnx.TensorProto.UINT8}
    assert sqnr(block, unsigned) == pytest.approx(before, abs=0.5)


@pytest.mark.parametrize("name", ["nncf", "onnxruntime"])
def test_activations_that_never_change_are_no_division_by_zero(name: str, block: Graph) -> None:
    component, model, _ = block
    still = [{"x": np.zeros((1, 4, WIDTH), np.float32)}] * 4
    module = plugin("quantizers", name)
    made = module.quantize(model, still, module.Options())
    (got,) = answers(simulated(made, component.spec()), still[:1])
    assert np.isfinite(got["y"]).all()


@pytest.mark.parametrize(
    ("name", "options", "has"),
    [
        ("nncf", {"ranges": "entropy"}, "'minmax', 'percentile' or 'mse'"),
        ("onnxruntime", {"ranges": "mse"}, "'minmax', 'percentile' or 'entropy'"),
        ("neural_compressor", {"ranges": "percentile"}, "'minmax' or 'mse'"),
        ("neural_compressor", {"layers": {"fc*": {"ranges": "entropy"}}}, "is not one of minmax, mse"),
        ("nncf", {"bits": 4}, "is for weight_only"),
        ("nncf", {"bits": 4, "weight_only": True, "preset": "mixed"}, "zero points that no runtime reads"),
    ],
)
def test_what_a_library_has_not_is_refused_with_what_it_has(name: str, options: dict[str, Any], has: str) -> None:
    with pytest.raises(ValidationError, match=has):
        plugin("quantizers", name).Options(**options)


def test_a_search_over_observers_that_the_quantizer_has_not_is_refused() -> None:
    recipe = Recipe.model_validate({"name": "x", "quantize": {"use": "onnxruntime", "search": {}}})
    with pytest.raises(InputError, match="'percentile' or 'entropy'"):
        check_plugins(recipe)


def test_a_layer_that_is_not_there_names_near_ones(block: Graph) -> None:
    with pytest.raises(InputError, match=r"layers: 'fc7' matches no node\n  fix: near: .*fc"):
        quantized("onnxruntime", block, layers={"fc7": {"ranges": "entropy"}})


def test_a_graph_from_outside_has_no_module_to_observe(block: Graph) -> None:
    _, model, samples = block
    with pytest.raises(InputError, match="this model came as ONNX"):
        neural_compressor.quantize(model, samples, neural_compressor.Options())


@pytest.mark.parametrize("name", names("quantizers"))
def test_a_quantizer_that_is_not_installed_says_what_to_install(name: str) -> None:
    """Where the library can't be found: exit code 3, before anything is imported."""
    code = (
        "import importlib.util\n"
        "from edgemm.errors import ToolchainError\n"
        "from edgemm.plugins import plugin\n"
        "import edgemm.quantizers._static as static\n"
        f"quantizer = plugin('quantizers', {name!r})\n"
        "static.find_spec = lambda name: None\n"
        "try:\n"
        "    quantizer.require()\n"
        "except ToolchainError as e:\n"
        "    print(e.exit_code, str(e))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("3 "), done.stderr
    assert "fix: pip install 'edgemm[" in done.stdout


def test_require_is_quiet_where_the_library_is_there(tmp_path: Path) -> None:
    for name in ("nncf", "onnxruntime"):
        plugin("quantizers", name).require()
    try:
        neural_compressor.require()
    except ToolchainError as e:
        assert "neural-compressor" in str(e)


def test_components_may_have_quantizers_of_their_own() -> None:
    values = {
        "use": "onnxruntime",
        "ranges": "entropy",
        "components": {"decoder*": {"use": "nncf", "weight_only": True}},
    }
    quantize = Recipe.model_validate({"name": "x", "quantize": values}).quantize
    assert quantize
    assert (quantize.quantizer("encoder"), quantize.of("encoder")) == ("onnxruntime", {"ranges": "entropy"})
    assert (quantize.quantizer("decoder"), quantize.of("decoder")) == ("nncf", {"weight_only": True})
    assert quantize.quantizers == {"nncf", "onnxruntime"}
    assert nncf.Options(**quantize.of("decoder")).weight_only
