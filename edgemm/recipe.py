"""What a recipe file (recipes/*.yaml) may say: passes, quantizer, parity limits."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgemm.errors import InputError
from edgemm.plugins import options, plugin, validate
from edgemm.training import Train, TrainPainter, TrainScenes, TrainWatcher
from edgemm.yaml_files import Strict, override, read_yaml, shipped_files


class Use(BaseModel):
    """A plug-in by file name, and its own options, which the plug-in validates."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str

    @property
    def values(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class QuantizeSearch(Strict):
    """What edgemm/tuning.py may try, to find the fastest form of each component that keeps `sqnr_db` against FP32.

    smooth_quant   alphas of SmoothQuant, -1 for off, auto for each layer's own;  ranges  how activations' ranges are
                   found, of those that the quantizer has; until one suffices
    precisions     of what is not INT8; the first is the FP32 model's form. bf16 is tried where the target may use it
    After `budget_minutes` in all nothing more is tried.
    """

    sqnr_db: float = Field(30.0, gt=0, le=80)
    smooth_quant: tuple[float | Literal["auto"], ...] = Field(("auto", 0.5, 0.8, -1.0), min_length=1)
    ranges: tuple[Literal["minmax", "percentile", "entropy", "mse"], ...] = Field(("minmax", "mse"), min_length=1)
    precisions: tuple[Literal["f32", "bf16"], ...] = Field(("f32",), min_length=1)
    budget_minutes: float = Field(10.0, gt=0)


class Form(Strict):
    """`int8`: false leaves a component in float. `precision` of what is not INT8, null: the recipe's.

    threads   at most so many of the target's: where products are small, another one costs more than it does
    """

    int8: bool = True
    precision: Literal["f32", "bf16"] | None = None
    threads: int | None = Field(None, ge=1)


class Quantize(Use):
    """A quantizer, its options, and what differs for single components, by glob pattern over their names.

    components   changes of options, and `int8`, `precision` and `threads`, see Form; with a `use` of its own, the
                 options of that quantizer alone
    search       finds some of the options, and the form of each component, by measurement on calibration data
    held         calibration samples that give no ranges, since a search is judged on them
    """

    components: dict[str, dict[str, Any]] = {}
    search: QuantizeSearch | None = None
    held: int = Field(0, ge=0)

    def of(self, component: str) -> dict[str, Any]:
        """The options of one component: later patterns win over earlier ones and over the general options."""
        return {k: v for k, v in self._chosen(component)[1].items() if k not in Form.model_fields}

    def form(self, component: str) -> Form:
        """Whether and how one component is quantized at all."""
        return Form.model_validate(self.form_values(component))

    def form_values(self, component: str) -> dict[str, Any]:
        return {k: v for k, v in self._chosen(component)[1].items() if k in Form.model_fields}

    def quantizer(self, component: str) -> str:
        """The quantizer of one component."""
        return self._chosen(component)[0]

    @property
    def quantizers(self) -> set[str]:
        """All that are named."""
        return {self.use, *(c["use"] for c in self.components.values() if "use" in c)}

    def _chosen(self, component: str) -> tuple[str, dict[str, Any]]:
        use, values = self.use, self.values
        for pattern, changes in self.components.items():
            if fnmatchcase(component, pattern):
                if "use" in changes:
                    use, values = changes["use"], {}
                values |= {key: value for key, value in changes.items() if key != "use"}
        return use, values


class Export(Strict):
    """`opset` of ONNX; 18 to 20 is what every backend takes. `tolerance`: largest relative error to torch."""

    opset: int = Field(18, ge=18, le=20)
    tolerance: float = Field(1e-4, gt=0)


class Limit(Strict):
    """One metric and the largest drop against FP32 that is accepted, in the metric's unit (0.01 = 1 point)."""

    use: str
    margin: float = Field(0.01, gt=0, lt=1)


class Verify(Strict):
    """How the proof is made. `resamples` of the bootstrap; `rounds` of ABBA blocks in the latency run.

    metrics  empty: what suits the model's output and the data, see parity.py; `margin` is then theirs
    """

    metrics: tuple[Limit, ...] = ()
    margin: float = Field(0.01, gt=0, lt=1)
    resamples: int = Field(10_000, ge=1_000)
    rounds: int = Field(24, ge=4)
    limit: int | None = Field(None, ge=1, description="use only the first N verification samples")


class Recover(Strict):
    """A short distillation from the FP32 model after the passes of `prune`; see edgemm/recovery.py.

    samples        at most so many of the train split;  held_back  share of them that judges, and is not learned
    learning_rate  the largest of all `steps`;  batch  samples a step
    features       weight of what layers read, beside that of the answers, which is 1
    every          steps from a judgement, and a checkpoint, to the next;  patience  so many without a better one end it
    """

    samples: int = Field(4096, ge=2)
    held_back: float = Field(0.1, gt=0, le=0.5)
    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    features: float = Field(1.0, ge=0)
    every: int = Field(100, ge=1)
    patience: int = Field(5, ge=1)


class Search(Strict):
    """How wide each layer is to stay: see edgemm/search.py.

    speedup     of the FP32 graph, by pruning alone, on the target
    repair      correct what stays by least squares on the calibration data
    key_tokens  let image tokens leave too, as many as pays on the target
    """

    use: Literal["latency"]
    speedup: float = Field(gt=1)
    repair: bool = True
    key_tokens: bool = False


Version = Annotated[int, Field(ge=1, le=(1 << 53) - 1)]  # what JSON carries whole everywhere
InputKind = Literal["image", "audio", "tokens", "mask", "tensor"]


class Recipe(Strict):
    """Everything that decides what is made, except the target."""

    schema_: Literal[1] = Field(1, alias="schema")
    name: str
    description: str = ""
    model: str = "reasoner"
    task: str | None = Field(None, description="of a model that has several: what its graphs are for; null: its first")
    data: str | None = None
    data_tolerance: float = Field(0.0, ge=0, lt=1, description="share of broken rows that is accepted")
    version: Version = Field(1, description="of the bundle; a device refuses one that is not higher than it had")
    seed: int = Field(0, ge=0)
    calibration: int = Field(300, ge=1, description="at most so many samples of the train split for scores and ranges")
    inputs: dict[str, InputKind] = Field({}, description="kind of an ONNX input, by name, where it can't be read off")
    precision: Literal["f32", "bf16", "f16"] | None = Field(
        None, description="of the float parts; null: the target's, which TensorRT keeps"
    )
    search: Search | None = None
    prune: tuple[Use, ...] = ()
    recover: Recover | None = None
    export: Export = Export()
    quantize: Quantize | None = None
    verify: Verify = Verify()
    train: Train | None = None
    train_scenes: TrainScenes | None = None
    train_painter: TrainPainter | None = None
    train_watcher: TrainWatcher | None = None
    smoke: dict[str, Any] = Field({}, description="what `train --smoke` overrides, by dotted path")


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A recipe by name (recipes/NAME.yaml, shipped with the package) or file, with dotted overrides applied."""
    values, where = read_yaml("recipes", name)
    return validate(Recipe, override(values, overrides or {}, where), where)


def default_recipe(model: str | None) -> str:
    """The shipped recipe of MODEL: its family's where there is one, else `default`."""
    if model is None:
        return "reasoner"
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        name = str(config["model_type"]).replace("-", "_")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        name = model
    return name if name in shipped_files("recipes") else "default"


def check_plugins(recipe: Recipe) -> None:
    """InputError unless every plug-in that the recipe names is there and takes the options given."""
    for limit in recipe.verify.metrics:
        plugin("metrics", limit.use)
    for i, pass_ in enumerate(recipe.prune):
        options("pruners", pass_.use, pass_.values, f"{recipe.name}: prune.{i}")
        if getattr(plugin("pruners", pass_.use), "LAST", False) and i < len(recipe.prune) - 1:
            raise InputError(f"{recipe.name}: prune.{i}: {pass_.use} is not the last pass", fix="move it to the end")
    if recipe.quantize is not None:
        where = f"{recipe.name}: quantize"
        for component in ("", *recipe.quantize.components):
            use, values = recipe.quantize.quantizer(component), recipe.quantize.of(component)
            options("quantizers", use, values, where)
            validate(Form, recipe.quantize.form_values(component), f"{where}.components.{component}")
            for ranges in recipe.quantize.search.ranges if recipe.quantize.search else ():
                options("quantizers", use, {**values, "ranges": ranges}, f"{where}.search")
