"""Imports point one way: cli -> pipeline -> stages -> plug-ins -> core; the runtime knows only the core.

And every plug-in has what its group demands, so that a new file is held to it without being listed here.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from edgemm.errors import InputError
from edgemm.plugins import PACKAGE, names, plugin

CORE = ("artifact", "recipe", "target", "errors", "plugins", "console", "host", "training", "yaml_files")
GROUPS = ("models", "pruners", "quantizers", "backends", "metrics", "data")
# families of what edgemm/reasoner/ has
TRAINED_HERE = (
    "reasoner",
    "scenes_reasoner",
    "_scenes_graphs",
    "_scenes_levels",
    "scenes_painter",
    "scenes_watcher",
)
FRAMEWORKS = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt_rtx_bindings",
    "neural_compressor",
)
NEVER_ON_THE_DEVICE = ("torch", "transformers", "onnx", "nncf", "neural_compressor", "onnxscript", "matplotlib")
NOT_FOR_HELP = (*FRAMEWORKS, "matplotlib", "numpy", "PIL", "tokenizers", "safetensors", "easy_vqa")
NO_PLUGINS = {  # what stages call a file for, where they don't call each of its group
    "save": [("models", "onnx")],  # a graph from outside is not pruned
    "samples": [("data", "manifest"), ("data", "noise")],  # the user's files, and noise
}
SHARED = (
    "edgemm.models",
    "edgemm.models._blocks",
    "edgemm.models._calibration",
    "edgemm.models._graph",
    "edgemm.models._hidden_units",
    "edgemm.models._key_tokens",
    "edgemm.models._sources",
    "edgemm.data",
)  # the dataclasses that plug-ins and stages hand to each other


@dataclass(frozen=True)
class Import:
    """One imported module. `deferred`: inside a function."""

    module: str
    line: int
    deferred: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import, wherever it stands; `from edgemm.models import reasoner` is one of edgemm.models.reasoner."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level + is_package or None]
                base = ".".join([*parents, *filter(None, [base])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else base for name in whole]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in found:
            yield Import(name, getattr(node, "lineno", 0), id(node) in inside)


def area(module: str) -> str:
    """The part of edgemm that a module belongs to."""
    if module in ("edgemm", "edgemm.__main__"):
        return module
    part = module.split(".")[1]
    return "core" if part in CORE else part


def may_import(module: str, imported: str) -> bool:
    """Whether the design lets `module` import `imported`, both of edgemm."""
    own, other = area(module), area(imported)
    if other in ("cli", "edgemm.__main__"):
        return own in ("cli", "edgemm.__main__")
    if imported == "edgemm":
        return own == "cli"  # for the version
    if own == "core":
        return other == "core"
    if own in ("runtime", "report"):
        return other in ("core", own)
    if own == "graph":
        return other in ("core", "graph")
    if own == "verdict":
        return other in ("core", "report", "verdict")
    if own in ("levels", "parity"):
        return other in ("core", "report", "runtime", "verdict")
    if own == "reasoner":
        return other in ("core", own) or imported == "edgemm.data"
    if own in GROUPS:
        its_own_model = own == "models" and other == "reasoner" and module.rpartition(".")[2] in TRAINED_HERE
        return other in ("core", "runtime", "report", "graph", own) or imported in SHARED or its_own_model
    if own == "device":
        return other in ("core", "runtime", own) or imported in SHARED
    if own in ("stages", "recheck", "recording", "recovery", "simulation"):
        shared = ("core", "runtime", "report", "verdict", "parity", "levels", "graph", "device")
        if own == "stages" and other in ("recording", "recovery", "simulation"):
            return True
        return other in shared or imported in SHARED or imported == module
    tops = ("pipeline", "inspection", "conformance", "device_report", "few_shot", "scorecard", "triton", "oci")
    if own in ("search", "tuning", "trials", "kernels", "ceiling"):
        return other not in tops
    if own in tops:
        return other not in tops or (own, other) in (("conformance", "inspection"), ("inspection", "scorecard"))
    return own in ("cli", "edgemm", "edgemm.__main__")


def complaints(module: str, source: str, is_package: bool = False) -> list[str]:
    """What in the imports of `module` points the wrong way."""
    found = []
    for use in imports_of(source, module, is_package):
        top, own = use.module.split(".")[0], area(module)
        library = module.rpartition(".")[2]
        its_own = own == "runtime" and top in (library, f"{library}_bindings") and use.deferred
        if (
            (top == "edgemm" and not may_import(module, use.module))
            or (own in ("core", "cli", "report", "verdict") and top in FRAMEWORKS)
            or (own == "runtime" and top in NEVER_ON_THE_DEVICE)
            or (own == "runtime" and top in FRAMEWORKS and not its_own)
            or (own == "backends" and top in FRAMEWORKS and not use.deferred)
        ):
            found.append(f"{module}:{use.line} imports {use.module}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    path = MODULES[module]
    assert not complaints(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")


def test_every_part_of_the_design_is_there_to_be_checked() -> None:
    areas = {area(module) for module in MODULES}
    assert {"core", "cli", "pipeline", "stages", "runtime", "report", "reasoner", *GROUPS} <= areas
    assert {f"edgemm.{name}" for name in CORE} <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("edgemm.errors", "import torch"),
        ("edgemm.recipe", "def f():\n    import onnxruntime as ort"),
        ("edgemm.plugins", "import importlib\nimportlib.import_module('torch')"),
        ("edgemm.artifact", "from edgemm.runtime.bundle import read_bundle"),
        ("edgemm.console", "from edgemm import pipeline"),
        ("edgemm.runtime.session", "import onnx"),
        ("edgemm.runtime.session", "def f():\n    import openvino"),
        ("edgemm.runtime.openvino", "import openvino"),
        ("edgemm.runtime.openvino", "def f():\n    import onnxruntime"),
        ("edgemm.runtime.server", "from edgemm.report.schema import Report"),
        ("edgemm.runtime.install", "from edgemm.recheck import golden_gate"),
        ("edgemm.conformance", "from edgemm.pipeline import compress"),
        ("edgemm.pipeline", "from edgemm.oci import write_layout"),
        ("edgemm.runtime.server", "def f():\n    from transformers import AutoTokenizer"),
        ("edgemm.report.html", "from edgemm.verdict import worst"),
        ("edgemm.verdict", "from edgemm.stages import verify"),
        ("edgemm.stages.prune", "from edgemm.stages.load import load"),
        ("edgemm.stages.prune", "from .load import load"),
        ("edgemm.stages.prune", "from edgemm.pipeline import compress"),
        ("edgemm.stages.prune", "from edgemm.models.reasoner import load"),
        ("edgemm.stages.prune", "from edgemm.pruners import attention_heads"),
        ("edgemm.pruners.x", "from edgemm.quantizers.nncf import quantize"),
        ("edgemm.pruners.x", "from edgemm.data import easy_vqa"),
        ("edgemm.metrics.x", "from edgemm.reasoner.model import Reasoner"),
        ("edgemm.models.clip", "from edgemm.reasoner.model import Reasoner"),
        ("edgemm.models.clip", "from edgemm.stages.load import load"),
        ("edgemm.backends.openvino", "import openvino"),
        ("edgemm.backends._tensorrt_lint", "import onnx"),
        ("edgemm.graph.qdq", "from edgemm.quantizers import nncf"),
        ("edgemm.levels", "from edgemm.stages.verify import accuracy_gates"),
        ("edgemm.reasoner.train", "from edgemm.models import find_family"),
        ("edgemm.reasoner.train", "from edgemm.data.easy_vqa import samples"),
        ("edgemm.device.files", "from edgemm.stages.verify import verify"),
        ("edgemm.runtime.session", "from edgemm.device import device_runner"),
        ("edgemm.inspection", "from edgemm.cli import main"),
        ("edgemm.stages.load", "import edgemm.cli"),
        ("edgemm.stages.load", "from edgemm import verify"),
    ],
)
def test_arrow_that_points_back_is_found(module: str, source: str) -> None:
    assert complaints(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("edgemm.models.reasoner", "from edgemm.reasoner.model import Reasoner\nfrom edgemm.data import Sample"),
        ("edgemm.runtime.openvino", "def f():\n    import openvino as ov"),
        ("edgemm.stages.prune", "from edgemm import plugins\nfrom edgemm.models import find_family"),
        ("edgemm.pruners.x", "from edgemm.models import AttentionBlock\nimport torch"),
        ("edgemm.backends.tensorrt_rtx", "from edgemm.backends.tensorrt import settings"),
        ("edgemm.cli.run", "from edgemm.runtime.session import load_bundle\nfrom edgemm import console"),
    ],
)
def test_arrow_that_points_on_is_let_through(module: str, source: str) -> None:
    assert not complaints(module, source)


def in_a_process(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HELP = """
import contextlib, io, sys
from edgemm.cli import build_app
app = build_app()
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    app(sys.argv[1].split())
assert "Usage" in shown.getvalue(), shown.getvalue()
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("command", ["--help", *(f"{name.replace('_', '-')} --help" for name in names("cli"))])
def test_help_loads_no_framework(command: str) -> None:
    loaded = in_a_process(HELP, command).split()
    assert "edgemm" in loaded
    assert not set(NOT_FOR_HELP) & set(loaded)


def test_runtime_loads_without_what_only_compression_needs() -> None:
    """As on a device, where these are not installed: every module of the runtime, and `edgemm run --help`."""
    code = (
        "import importlib, sys\n"
        f"for name in {(*FRAMEWORKS, *NEVER_ON_THE_DEVICE, 'safetensors', 'jinja2', 'easy_vqa')!r}:\n"
        "    sys.modules[name] = None\n"
        "from edgemm.plugins import names\n"
        "for name in names('runtime'):\n"
        "    importlib.import_module(f'edgemm.runtime.{name}')\n"
        "from edgemm import load_bundle\n"
        "from edgemm.cli import build_app\n"
        "build_app()\n"
        "print('whole')\n"
    )
    assert in_a_process(code) == "whole\n"


@pytest.mark.parametrize("group", ["backends", "metrics", "data"])
def test_group_loads_without_any_framework(group: str) -> None:
    """A broken install of one library hurts only what uses it."""
    code = (
        "import importlib, sys\n"
        f"for name in {(*FRAMEWORKS, 'easy_vqa')!r}:\n"
        "    sys.modules[name] = None\n"
        "from edgemm.plugins import names\n"
        f"for name in names({group!r}):\n"
        f"    importlib.import_module(f'edgemm.{group}.{{name}}')\n"
    )
    assert in_a_process(code) == ""


def parameters(**takes: str) -> list[Any]:
    """One test case a group, plug-in and function: how the stages call it."""
    return [
        pytest.param(group, name, function, given.split(), id=f"{group}.{name}.{function}")
        for key, given in takes.items()
        for group, function in [key.split("__")]
        for name in names(group)
        if (group, name) not in NO_PLUGINS.get(function, ())
    ]


@pytest.mark.parametrize(
    ("group", "name", "function", "given"),
    parameters(
        models__load="directory",
        models__save="model directory source",
        models__components="model",
        models__attentions="model",
        models__program="model directory",
        pruners__prune="family model run options",
        quantizers__quantize="model samples options",
        quantizers__needs_samples="options",
        backends__compile_component="onnx_file out shapes target cache",
        backends__doctor="",
        metrics__values="outputs reference targets",
        data__samples="split",
    ),
)
def test_plugin_has_the_function_that_stages_call(group: str, name: str, function: str, given: list[str]) -> None:
    found = getattr(plugin(group, name), function)
    inspect.signature(found).bind(*given)
    assert inspect.getdoc(found) or group == "models", "says what it does"


@pytest.mark.parametrize("group", GROUPS)
def test_group_has_plugins_named_like_modules(group: str) -> None:
    assert names(group)
    assert all(name.isidentifier() and name == name.lower() for name in names(group))
    assert all(plugin(group, name).__doc__ for name in names(group))


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in ("pruners", "quantizers") for n in names(g)])
def test_options_are_strict_frozen_and_explained(group: str, name: str) -> None:
    options: type[BaseModel] = plugin(group, name).Options
    assert issubclass(options, BaseModel)
    assert options.model_config["extra"] == "forbid"
    assert options.model_config["frozen"] is True
    assert options.__doc__
    with pytest.raises(ValidationError):
        options.model_validate({"no_such_option": 1})


@pytest.mark.parametrize("name", names("backends"))
def test_backend_names_its_tools_and_has_a_twin_in_the_runtime(name: str) -> None:
    backend = plugin("backends", name)
    assert backend.TOOLS
    assert all(isinstance(tool, str) for tool in backend.TOOLS)
    twin = importlib.import_module(f"edgemm.runtime.{name}")
    inspect.signature(twin.compile_component).bind("files", "component", "settings")


@pytest.mark.parametrize("name", names("backends"))
def test_backend_without_its_library_says_what_to_install(name: str) -> None:
    code = (
        "import sys\n"
        f"for framework in {FRAMEWORKS!r}:\n"
        "    sys.modules[framework] = None\n"
        "from pathlib import Path\n"
        "from edgemm.errors import ToolchainError\n"
        "from edgemm.plugins import plugin\n"
        "from edgemm.target import Target\n"
        f"backend = plugin('backends', {name!r})\n"
        f"target = Target(name='x', backend={name!r})\n"
        "for call in (backend.doctor, lambda: backend.compile_component(Path('x.onnx'), Path(), {}, target, {})):\n"
        "    try:\n"
        "        call()\n"
        "    except ToolchainError as e:\n"
        "        print(e.exit_code, 'fix:' in str(e))\n"
    )
    assert in_a_process(code) == "3 True\n3 True\n"


CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name in names("metrics")
    for kind in plugin("metrics", name).OUTPUTS
]


def outputs_of(kind: str, n: int = 60) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Outputs that are all right, others that are all wrong, and the targets of `n` samples."""
    rng = np.random.default_rng(0)
    words = ("one", "two", "three", "four", "five")
    if kind == "labels":
        logits = np.eye(5, dtype=np.float32)[np.arange(n) % 5]
        return (
            {"logits": logits, "labels": words},
            {"logits": -logits, "labels": words},
            [words[i % 5] for i in range(n)],
        )
    if kind == "features":
        rows = rng.standard_normal((n, 3, 4)).astype(np.float32)
        return {"hidden": rows}, {"hidden": -rows}, [str(i) for i in range(n)]
    if kind == "embeddings":
        rows = np.eye(n, dtype=np.float32)
        wrong = {"image": rows, "text": np.roll(rows, 20, 0)}
        return {"image": rows, "text": rows.copy()}, wrong, [str(i) for i in range(n)]
    if kind == "picture":
        scenes = plugin("data", "scenes")
        drawn = [scene for scene, _ in zip(scenes.scenes("test", 0), range(n), strict=False)]
        pictures = np.stack([scenes.draw(scene) for scene in drawn])
        codes = np.array([f"{i} {i + 1}" for i in range(n)])
        wrong = {"text": np.array(["700 800"] * n), "picture": np.roll(pictures, 1, 0)}
        return {"text": codes, "picture": pictures}, wrong, [scenes.caption(scene) for scene in drawn]
    right = [f"please press {words[i % 5]} for room number {i}" for i in range(n)]
    return {"text": np.array(right)}, {"text": np.array(["quite another thing"] * n)}, right


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric_gives_one_finite_value_a_sample_and_more_for_better(name: str, kind: str) -> None:
    """Of the FP32 model itself all is right: 1, or no error. Whatever is passed in stays as it is."""
    metric = plugin("metrics", name)
    right, wrong, targets = outputs_of(kind)
    before = copy.deepcopy((right, wrong, targets))
    good, bad = metric.values(right, right, targets), metric.values(wrong, right, targets)
    for values in (good, bad):
        assert (values.shape, values.dtype) == ((60,), np.float64)
        assert np.isfinite(values).all()
    np.testing.assert_allclose(good, 1, atol=1e-6)
    assert bad.mean() <= 0.5
    np.testing.assert_array_equal(metric.values(wrong, right, targets), bad)
    np.testing.assert_equal((right, wrong, targets), before)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_metric_says_whether_it_can_do_without_targets(name: str, kind: str) -> None:
    metric = plugin("metrics", name)
    right, wrong, targets = outputs_of(kind)
    if getattr(metric, "NEEDS_TARGETS", True):
        with pytest.raises(InputError, match="sample 7 has no target"):
            metric.values(wrong, right, [*targets[:7], None, *targets[8:]])
    else:
        blind = metric.values(wrong, right, [None] * len(targets))
        np.testing.assert_array_equal(blind, metric.values(wrong, right, targets))


@pytest.mark.parametrize("name", names("metrics"))
def test_metric_names_its_unit_and_the_outputs_that_it_judges(name: str) -> None:
    metric = plugin("metrics", name)
    assert isinstance(metric.UNIT, str)
    assert metric.UNIT
    assert set(metric.OUTPUTS) <= {"labels", "embeddings", "generation", "transcript", "picture", "features"}
    assert metric.OUTPUTS
    assert {type(getattr(metric, flag, False)) for flag in ("ERROR", "NEEDS_TARGETS")} == {bool}


@pytest.mark.parametrize("name", [n for n in names("data") if ("data", n) not in NO_PLUGINS["samples"]])
def test_data_has_two_splits_of_samples_that_exist_and_no_third(name: str) -> None:
    from edgemm.data import Sample

    data: ModuleType = plugin("data", name)
    train, test = data.samples("train"), data.samples("test")
    for samples in (train, test):
        assert all(type(s) is Sample for s in samples)
        assert len({s.id for s in samples}) == len(samples) > 0
        assert all(s.text.strip() and s.label and s.kind for s in samples)
        media = {s.image or s.audio for s in samples[:: max(1, len(samples) // 50)]}
        assert all(medium if isinstance(medium, bytes) else medium and medium.is_file() for medium in media)
    seen, judged = ({m for s in samples for m in (s.image, s.audio) if m} for samples in (train, test))
    assert not seen & judged, "what is tuned on is not judged on"
    assert data.samples("test") == test, "in the same order each time"
    with pytest.raises(InputError, match="validation"):
        data.samples("validation")
