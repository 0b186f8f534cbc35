"""The search for INT8 that keeps the answers, on graphs made to break it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemm.artifact import Artifact, build
from edgemm.backends import openvino as backend
from edgemm.errors import InputError
from edgemm.graph.bypass import bypass, quantized_products
from edgemm.quantizers import nncf, onnxruntime
from edgemm.recipe import Quantize, QuantizeSearch, Recipe
from edgemm.report.int8_schema import Trial, Tuned
from edgemm.runtime import openvino
from edgemm.runtime.session import Directory
from edgemm.simulation import answers, simulated, sqnr_db
from edgemm.target import Target
from edgemm.trials import Bench, Form
from edgemm.tuning import Switches, fastest, pareto, settings, tune_component

WIDTH, OUTLIERS = 32, (3, 11, 25)
SPEC: dict[str, Any] = {
    "name": "g",
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["b", WIDTH]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["b", WIDTH]}],
}


def graph(layers: int = 2, outliers: tuple[int, ...] = OUTLIERS) -> onnx.ModelProto:
    """LayerNorm and product, `layers` times; gains of 100 in three channels, whose weights are 1/100 of the others."""
    rng = np.random.default_rng(0)
    gain = np.ones(WIDTH, np.float32)
    gain[list(outliers)] = 100
    nodes, constants, x = [], {"gain": gain, "zero": np.zeros(WIDTH, np.float32)}, "x"
    for i in range(layers):
        out = "y" if i == layers - 1 else f"x{i}"
        constants[f"w{i}"] = (rng.standard_normal((WIDTH, WIDTH)) / gain[:, None]).astype(np.float32)
        nodes.append(helper.make_node("LayerNormalization", [x, "gain", "zero"], [f"n{i}"], name=f"norm_{i}"))
        nodes.append(helper.make_node("MatMul", [f"n{i}", f"w{i}"], [out], name=f"product_{i}"))
        x = out
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", WIDTH])],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def samples(n: int = 40) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((4, WIDTH)).astype(np.float32)} for _ in range(n)]


class Work:
    """What edgemm/stages/quantize.py gives the search, for one graph."""

    recipe = Recipe(name="r", quantize=Quantize(use="nncf"))
    options: ClassVar[dict[str, Any]] = {"g": nncf.Options()}

    def __init__(self, model: onnx.ModelProto, runs: Path) -> None:
        self.model, self.runs, self.made = model, runs, 0
        self.plain = self.keep("graph", {}, model)

    def keep(self, kind: Any, config: dict[str, Any], model: onnx.ModelProto) -> Artifact:
        def make(out: Path) -> None:
            self.made += 1
            onnx.save(model, out / "g.onnx")

        return build(kind, self.runs, config=config, make=make)

    def ranged(self, name: str) -> bool:
        return True

    def read(self, name: str) -> onnx.ModelProto:
        return self.model

    def int8(self, name: str, options: nncf.Options) -> Artifact:
        def make(out: Path) -> None:
            self.made += 1
            onnx.save(nncf.quantize(self.model, samples()[8:], options), out / "g.onnx")

        return build("int8", self.runs, parents=[self.plain], config=options.model_dump(mode="json"), make=make)


@dataclass(frozen=True)
class Clock(Bench):
    """A bench with the latencies of a table: INT8 three times as fast, a product in float a tenth slower."""

    slow: tuple[str, ...] = ()

    @property
    def times(self) -> bool:
        return True

    def measure(self, form: Form) -> Trial:
        call = simulated(onnx.load(form.graph.path / "g.onnx"), SPEC)
        plain = simulated(onnx.load(self.plain.path / "g.onnx"), SPEC)
        keep = tuple(form.options.keep_float) if form.options else ()
        bf16 = 1.2 if form.precision == "bf16" else 1.0
        return Trial(
            smooth_quant=form.options.smooth_quant if form.options else -1,
            ranges=form.options.ranges if form.options else "",
            sqnr_db=sqnr_db(answers(plain, self.held), answers(call, self.held))
            - (5 if form.precision == "bf16" else 0),
            int8=form.options is not None,
            precision=form.precision,
            keep_float=keep,
            speedup=(3.0 - 0.3 * len(set(keep) - set(self.slow)) if form.options else 1.0) * bf16,
        )

    def product_times(self, form: Form) -> dict[str, float]:
        return {f"product_{i}": 1.0 if form.options is None or f"product_{i}" in self.slow else 0.3 for i in range(4)}


def tuned(model: onnx.ModelProto, runs: Path, late: bool = False, slow: tuple[str, ...] = (), **changes: Any) -> Tuned:
    wanted = QuantizeSearch(**{"sqnr_db": 25, "smooth_quant": (-1, 0.5), "ranges": ("minmax",), **changes})
    work = Work(model, runs)
    target = Target(name="t", backend="openvino")
    bench = Clock(work.plain, SPEC, {}, samples()[:8], target, runs, {}, slow)
    return tune_component(bench, work, wanted, lambda: late)  # type: ignore[arg-type]


def test_outliers_are_smoothed(tmp_path: Path) -> None:
    found = tuned(graph(), tmp_path)
    plain, smooth = (t for t in found.trials if t.int8)
    assert plain.sqnr_db < 15 < 25 < smooth.sqnr_db
    assert (found.smooth_quant, found.keep_float, found.int8, found.speedup) == (0.5, (), True, 3.0)


def test_the_first_that_is_good_enough_is_taken(tmp_path: Path) -> None:
    found = tuned(graph(outliers=()), tmp_path)
    assert [t.smooth_quant for t in found.trials if t.int8] == [-1]


def test_where_nothing_smooths_the_most_sensitive_product_stays_float(tmp_path: Path) -> None:
    found = tuned(graph(4), tmp_path, smooth_quant=(-1,), sqnr_db=4)
    assert {row.name for row in found.sensitivity} == {f"product_{i}" for i in range(4)}
    loudest = min(found.sensitivity, key=lambda row: row.alone_db)
    assert found.int8
    assert found.keep_float[0] == loudest.name
    assert found.sqnr_db >= 4
    made = nncf.quantize(graph(4), samples(), nncf.Options(smooth_quant=-1, keep_float=found.keep_float))
    assert not set(quantized_products(made)) & set(found.keep_float)


def test_what_int8_can_not_keep_stays_float(tmp_path: Path) -> None:
    found = tuned(graph(4), tmp_path, sqnr_db=80, smooth_quant=(-1,))
    assert (found.int8, found.precision, found.speedup, found.sqnr_db) == (False, "f32", 1.0, 120)
    assert max(len(t.keep_float) for t in found.trials) == 3, "all in float is a form of its own"


def test_a_product_that_gains_nothing_is_tried_in_float(tmp_path: Path) -> None:
    found = tuned(graph(4, outliers=()), tmp_path, slow=("product_2",))
    assert ("product_2",) in [t.keep_float for t in found.trials]


def test_bf16_is_taken_where_it_is_faster_and_exact_enough(tmp_path: Path) -> None:
    found = tuned(graph(outliers=()), tmp_path, precisions=("f32", "bf16"))
    assert (found.int8, found.precision, found.speedup) == (True, "bf16", pytest.approx(3.6))


def test_a_spent_budget_tries_nothing_more(tmp_path: Path) -> None:
    found = tuned(graph(), tmp_path, late=True, sqnr_db=80)
    assert len([t for t in found.trials if t.int8]) == 1
    assert found.sensitivity == ()


def trial(speedup: float | None, sqnr: float, **changes: Any) -> Trial:
    return Trial(smooth_quant=0.5, ranges="minmax", sqnr_db=sqnr, speedup=speedup, **changes)


def test_equal_forms_are_not_told_apart_by_the_clock() -> None:
    """Whichever way the noise falls, the more exact of two that are equally fast is taken; a faster one wins."""
    for noise in (-0.015, 0.0, 0.015):
        assert fastest([trial(3.0 + noise, 40), trial(3.0 - noise, 35)], 30).sqnr_db == 40
    assert fastest([trial(1.0, 120), trial(1.02, 35)], 30).sqnr_db == 120
    assert fastest([trial(1.0, 120), trial(3.0, 35)], 30).sqnr_db == 35
    assert fastest([trial(3.0, 29), trial(1.0, 120)], 30).sqnr_db == 120
    assert fastest([trial(None, 35), trial(None, 40)], 30).sqnr_db == 35, "without times the first that is enough"
    assert fastest([trial(3.0, 10), trial(2.0, 20)], 30).sqnr_db == 20, "the closest where nothing is enough"


def test_the_pareto_front_has_what_nothing_beats() -> None:
    rows = [trial(1.0, 120), trial(3.0, 35), trial(2.0, 30), trial(3.0, 30), trial(2.5, 60)]
    assert pareto(rows) == [rows[0], rows[1], rows[4]]


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    """As after a kill -9: graphs and measurements are artifacts."""
    work = Work(graph(), tmp_path)
    target = Target(name="t", backend="openvino")
    spec = {**SPEC, "inputs": [{**SPEC["inputs"][0], "shape": [4, WIDTH]}]}
    bench = Bench(work.plain, spec, {"output": {"kind": "features"}}, samples(4), target, tmp_path, {})
    options = nncf.Options(smooth_quant=0.5)
    first = bench.measure(Form(work.int8("g", options), options, "f32"))
    made = work.made
    assert first.sqnr_db > 25
    assert first.speedup is not None and first.speedup > 0
    assert bench.measure(Form(work.int8("g", options), options, "f32")) == first
    assert work.made == made
    assert bench.measure(Form(work.plain, None, "f32")).sqnr_db > 100


def test_switches_are_what_bypassing_is() -> None:
    model = graph(3, outliers=())
    made = nncf.quantize(model, samples(), nncf.Options())
    switch = Switches(SPEC, made, model, samples(8))
    plain = answers(simulated(model, SPEC), switch.held)
    for floats in ((), ("product_1",), ("product_0", "product_2")):
        got = answers(simulated(bypass(made, floats), SPEC), switch.held)
        assert switch.without(floats) == pytest.approx(sqnr_db(plain, got), abs=1e-6)


def test_alpha_of_each_layer_is_tried(tmp_path: Path) -> None:
    found = tuned(graph(), tmp_path, smooth_quant=("auto",))
    assert (found.smooth_quant, found.keep_float) == ("auto", ())
    assert found.sqnr_db > 25


def test_a_quantizer_is_given_what_it_has() -> None:
    search = QuantizeSearch(smooth_quant=(-1,), ranges=("mse", "entropy"))
    assert settings(nncf.Options(), search) == [{"smooth_quant": -1, "ranges": "mse"}]
    assert settings(onnxruntime.Options(), search) == [{"smooth_quant": -1, "ranges": "entropy"}]
    with pytest.raises(InputError, match=r"search\.ranges: entropy is nothing .*\n  fix: it has minmax"):
        settings(nncf.Options(), QuantizeSearch(ranges=("entropy",)))


def test_float_weights_take_half_the_room_where_they_compute_in_bf16(tmp_path: Path) -> None:
    model = graph(4, outliers=())
    onnx.save(model, tmp_path / "g.onnx")
    plain, sizes = answers(simulated(model, SPEC), samples(4)), {}
    for precision in ("f32", "bf16"):
        target = Target(name="t", backend="openvino", precision=precision)
        backend.compile_component(tmp_path / "g.onnx", tmp_path, {}, target, {})
        sizes[precision] = (tmp_path / "g.bin").stat().st_size
        call = openvino.compile_component(Directory(tmp_path), SPEC, {"threads": 1, "precision": "f32"})
        assert sqnr_db(plain, answers(call, samples(4))) > (60 if precision == "bf16" else 100)
    assert sizes["bf16"] < 0.6 * sizes["f32"]


def test_all_products_bypassed_leave_the_weights_rounding_alone() -> None:
    made = nncf.quantize(graph(outliers=()), samples(), nncf.Options())
    plain = answers(simulated(graph(outliers=()), SPEC), samples(8))

    def judge(model: onnx.ModelProto) -> float:
        return sqnr_db(plain, answers(simulated(model, SPEC), samples(8)))

    names = quantized_products(made)
    assert names == ["product_0", "product_1"]
    assert judge(graph(outliers=())) > 100
    assert judge(bypass(made, names)) > judge(bypass(made, names[:1])) > judge(made)


def test_a_pattern_that_matches_no_node_names_near_ones() -> None:
    with pytest.raises(InputError, match=r"keep_float: 'prodct_0' matches no node\n  fix: near: product_0"):
        nncf.quantize(graph(), samples(), nncf.Options(keep_float=("prodct_0",)))
