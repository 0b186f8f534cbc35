"""report.json, schema 1: what a run established. Every renderer and every pipeline reads this alone.

A number that was not measured is null, and `notes` says why.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgemm.report.int8_schema import Saturation, Settled, Share, Tuned
from edgemm.target import Level
from edgemm.yaml_files import Strict

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "UNVERIFIED"]


class Accuracy(Strict):
    """One metric, paired by sample against the FP32 model that the user brought.

    n, clusters      samples, and groups of samples that share media
    n_required       samples that the claim needs, at most n once the bound is under the margin; see edgemm/verdict.py
    drop             fp32 - compressed; `drop_ci95_upper` its one-sided 95 % upper bound
    flips            share of samples whose label or text changed; None where neither is the answer
    sqnr_db          of the model's raw outputs against FP32; None where the output is text
    """

    metric: str
    unit: str
    n: int
    clusters: int
    n_required: int
    fp32: float
    compressed: float
    drop: float
    drop_ci95_upper: float
    margin: float
    flips: float | None
    sqnr_db: float | None
    verdict: Verdict


class Percentiles(Strict):
    p50_ms: float
    p90_ms: float
    p99_ms: float


class Samples(Strict):
    """Every timed inference, in ms, in the order measured."""

    fp32: tuple[float, ...]
    compressed: tuple[float, ...]


class ComponentLatency(Strict):
    """One component alone, on inputs that it meets in its model; a decoder by the token, over a whole text.

    FP32's side is None where it was not run.
    """

    name: str
    fp32_p50_ms: float | None
    compressed_p50_ms: float
    speedup_p50: float | None
    speedup_ci95: tuple[float, float] | None


class Latency(Strict):
    """One input through all components, warm, to the whole text where the model writes one.

    speedup_p50   fp32 p50 / compressed p50;  torch_p50_ms  None for a model that came as a graph
    fp32, speedup_p50, speedup_ci95  None where FP32 was not run, as on a device: `baseline` says why
    threads       None on a GPU
    """

    fp32: Percentiles | None
    compressed: Percentiles
    speedup_p50: float | None
    speedup_ci95: tuple[float, float] | None
    baseline: str
    threads: int | None
    torch_p50_ms: float | None
    components: tuple[ComponentLatency, ...] = ()
    samples_ms: Samples


class Memory(Strict):
    """Peak resident memory of a fresh process that runs only the runtime, in MB (10^6 bytes)."""

    fp32_peak_mb: float | None
    compressed_peak_mb: float


class Size(Strict):
    """Bytes of the compiled components."""

    fp32_bytes: int
    compressed_bytes: int


class Layer(Strict):
    """One attention layer before and after pruning. A link is one head of the edge queries -> keys.

    scores   of each head before pruning, None when nothing was scored;  kept  the heads that stayed
    keys     key positions that the layer projects, of one input at its largest size; within a link, one each. None
             where q, k and v are one matrix
    """

    name: str
    kind: Literal["self", "cross", "merged"]
    queries: str
    keys: str
    links_before: int
    links_after: int
    heads_before: int
    heads_after: int
    keys_before: int | None
    keys_after: int | None
    scores: tuple[float, ...] | None
    kept: tuple[int, ...]


class Units(Strict):
    """The neurons of one feed-forward block, or the channels inside a residual block, before and after pruning."""

    name: str
    units_before: int
    units_after: int


class Pruning(Strict):
    """What left the model. MACs are of one input at its largest size.

    zero_weights   of the parameters that stay: they are multiplied by as the others are, see `notes`
    """

    layers: tuple[Layer, ...]
    hidden: tuple[Units, ...] = ()
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    zero_weights: int = 0


class Gate(Strict):
    """One condition of the verdict. `value` with its 95 % interval or bound in `detail`."""

    name: str
    value: float | None
    limit: float
    unit: str
    verdict: Verdict
    detail: str


class Layers(Strict):
    """What the engine of one component computes how, as TensorRT's builder told; "unknown" where none was built here.

    gemms            products with constant weights, K and N of 16 and more
    quantized_gemms  those of them that have INT8 weights in the graph;  int8_gemms  those that the engine runs in INT8
    attention        attention blocks in the graph;  fused_attention  those that are one kernel of the engine
    float32_nodes    nodes of the graph that FP16 can't hold
    layers           of the engine
    """

    component: str
    precision: str
    gemms: int
    quantized_gemms: int
    int8_gemms: int | Literal["unknown"]
    attention: int
    fused_attention: int | Literal["unknown"]
    float32_nodes: int
    layers: int | Literal["unknown"]


class BundleFile(Strict):
    path: str
    sha256: str


class TargetReport(Strict):
    """One model on one target.

    level        how far a target was proven that this host can't measure, level_asked how far it must be, and
                 `established` says in a sentence what that means; see edgemm/levels.py
    layers       of each engine
    int8_share   of each component, and of `all`
    """

    name: str
    verdict: Verdict
    accuracy: tuple[Accuracy, ...]
    latency: Latency | None = None
    memory: Memory | None = None
    size: Size | None = None
    pruning: Pruning | None = None
    tuning: tuple[Tuned, ...] = ()
    ranges: tuple[Settled, ...] = ()
    saturation: tuple[Saturation, ...] = ()
    int8_share: tuple[Share, ...] = ()
    gates: tuple[Gate, ...]
    bundle: BundleFile | None = None
    level: Level | None = None
    level_asked: Level | None = None
    established: str = ""
    layers: tuple[Layers, ...] = ()
    notes: tuple[str, ...] = ()


class Certificate(Strict):
    """What a bundle says was proven of it; nothing that failed is packed."""

    verdict: Literal["PASS", "UNVERIFIED"]
    accuracy: tuple[Accuracy, ...]
    level: Level | None = None
    established: str = ""


class Report(Strict):
    schema_: Literal[1] = Field(1, alias="schema")
    model: str
    recipe: str
    seed: int
    versions: dict[str, str]
    host: dict[str, str]
    targets: tuple[TargetReport, ...]
