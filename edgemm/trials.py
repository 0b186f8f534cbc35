"""One form of a component on the target: its loss and its latency, measured once and kept.

Each graph and each measurement is an artifact: a search that was interrupted, or is repeated, measures nothing twice,
and so chooses the same again.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgemm import plugins
from edgemm.artifact import Artifact, build
from edgemm.graph.shapes import is_decoder
from edgemm.graph.timing import timed
from edgemm.host import host
from edgemm.kernels import kernels, of_products
from edgemm.report.int8_schema import Trial
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import Directory
from edgemm.simulation import Call, answers, simulated, sqnr_db
from edgemm.target import Target

RUNS = 4  # inferences a turn; the least of timing.ROUNDS turns counts


@dataclass(frozen=True, slots=True)
class Form:
    """How a component may run: its graph, and the precision of what is not INT8.

    options   of the quantizer that made the graph; None: nothing is INT8
    """

    graph: Artifact
    options: Any | None
    precision: str


@dataclass(frozen=True, slots=True)
class Bench:
    """Measures the forms of one component on the target.

    plain      artifact with the FP32 graph, <component>.onnx
    component, program   its entry in program.json, and the whole of it, with the shapes that the target fixes
    held       what the component meets on calibration samples that gave no ranges
    """

    plain: Artifact
    component: dict[str, Any]
    program: dict[str, Any]
    held: Sequence[Tensors]
    target: Target
    runs: Path
    config: Mapping[str, Any]

    @property
    def times(self) -> bool:
        """Whether the target is timed here; where not, the loss is that of Q/DQ computed in ONNX Runtime."""
        return self.target.backend == "openvino"

    def measure(self, form: Form) -> Trial:
        """Loss against FP32, and the speed-up over it with the same threads, by processor time: see timing.timed."""
        name = self.component["name"]

        def make(out: Path) -> None:
            base = self.compiled(self.plain, "f32")
            tried = self.compiled(form.graph, form.precision)
            sqnr = sqnr_db(answers(base, self.held), answers(tried, self.held))
            faster = None
            if self.times:
                sample = self.held[len(self.held) // 2]
                before, after = timed([lambda: base(sample), lambda: tried(sample)], RUNS)
                faster = before / after
            (out / "trial.json").write_text(json.dumps([sqnr, faster]), encoding="utf-8")

        config = {"component": name, "precision": form.precision, "target": self.on, "host": host(), **self.config}
        parents = [self.plain, form.graph]
        kept = build("trial", self.runs, parents=parents, config=config, tools=("openvino", "onnxruntime"), make=make)
        sqnr, faster = kept.json("trial.json")
        options = form.options
        return Trial(
            smooth_quant=getattr(options, "smooth_quant", -1.0),
            ranges=getattr(options, "ranges", ""),
            sqnr_db=sqnr,
            int8=options is not None,
            precision=form.precision,
            keep_float=getattr(options, "keep_float", ()),
            speedup=faster,
        )

    def product_times(self, form: Form) -> dict[str, float]:
        """ms of each product of the graph in this form, in one run."""
        with tempfile.TemporaryDirectory() as folder:
            self.compile_into(Path(folder), form.graph, form.precision)
            files, spec = Directory(Path(folder)), {**self.component, "precision": form.precision}
            graph = onnx.load(self.plain.path / f"{self.component['name']}.onnx")
            middle = self.held[len(self.held) // 2 :][:1]
            return of_products(kernels(files, spec, {"threads": self.target.threads}, middle, graph))

    @property
    def on(self) -> dict[str, Any]:
        return {"backend": self.target.backend, "threads": self.target.threads, "static": self.target.static}

    def compiled(self, graph: Artifact, precision: str) -> Call:
        """The component as the device will run it."""
        name = self.component["name"]
        if not self.times:
            return simulated(onnx.load(graph.path / f"{name}.onnx"), self.component)
        runtime = importlib.import_module(f"edgemm.runtime.{self.target.backend}")
        settings = {"threads": self.target.threads, "precision": precision}
        with tempfile.TemporaryDirectory() as folder:
            self.compile_into(Path(folder), graph, precision)
            return runtime.compile_component(Directory(Path(folder)), self.component, settings)

    def compile_into(self, folder: Path, graph: Artifact, precision: str) -> None:
        name = self.component["name"]
        shapes = {p["name"]: p["shape"] for p in self.component["inputs"]} if self.target.static else {}
        cache = dict(self.program["output"]["cache"]) if is_decoder(self.component, self.program) else {}
        backend = plugins.plugin("backends", self.target.backend)
        target = self.target.model_copy(update={"precision": precision})
        backend.compile_component(graph.path / f"{name}.onnx", folder, shapes, target, cache)
