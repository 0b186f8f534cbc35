"""report.json -> one self-contained HTML page: the pictures are inline SVG, so no script and no network.

Import it only where a page is made: it brings in matplotlib. The page itself is report.html.j2.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from edgemm.report import markdown
from edgemm.report.int8_figures import most_sensitive, pareto_figure, sensitivity_figure
from edgemm.report.int8_tables import tables
from edgemm.report.look import BEYOND, COMPRESSED, FP32, INK, LABEL, MUTED, WIDTH_IN, shorten
from edgemm.report.schema import Accuracy, Latency, Layer, Memory, Report, Size, TargetReport

# Light enough everywhere for the cross of a removed head to be seen on it.
SCORES = LinearSegmentedColormap.from_list("scores", ["#f4f8fb", "#9cc7e4", "#3a8fc7"])
STYLE = {
    "svg.fonttype": "none",  # real text: selectable, small, and in the font of the page
    "svg.hashsalt": "edgemm",
    "text.parse_math": False,  # a name with two `$` is a name, not a formula
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "xtick.color": MUTED,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of the page. `svg` None where the numbers were not measured."""

    title: str
    caption: str
    svg: Markup | None


def render(report: Report) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with style.context(["default", STYLE], after_reset=True):
        pages = [(target, pictures(target, f"t{i}")) for i, target in enumerate(report.targets)]
    return environment.get_template("report.html.j2").render(report=report, pages=pages, text=markdown, int8=tables)


def pictures(target: TargetReport, prefix: str) -> tuple[Picture, ...]:
    """Accuracy, latency, memory and size, links of one target; `prefix` keeps SVG ids apart."""
    row = {r.name: r for r in markdown.comparison(target)}
    accuracy = latency = bars = links = None
    if target.accuracy:
        alt = "; ".join(f"{a.metric}: {row[a.metric].change}" for a in target.accuracy)
        accuracy = svg(accuracy_figure(target.accuracy), f"{prefix}a", f"Drop against the margin. {alt}")
    if target.latency and target.latency.samples_ms.compressed:
        p50 = row["latency p50"]
        alt = f"Latency distributions: p50 FP32 {p50.before}, compressed {p50.after}"
        latency = svg(latency_figure(target.latency), f"{prefix}t", alt)
    if target.size or target.memory:
        alt = "; ".join(
            f"{n}: FP32 {row[n].before}, compressed {row[n].after}" for n in ("size on disk", "peak memory")
        )
        bars = svg(bars_figure(target.size, target.memory), f"{prefix}b", f"Bars. {alt}")
    if target.pruning and target.pruning.layers:
        layers = target.pruning.layers
        alt = f"Heads kept of {len(layers)} layers: " + ", ".join(f"{x.name} {kept(x)}" for x in layers)
        links = svg(links_figure(layers), f"{prefix}p", alt)
    found = []
    if rows := most_sensitive(target.tuning):
        alt = "Most sensitive to INT8: " + ", ".join(f"{n} {s.name} {s.gain_db:.2f} dB" for n, s in rows)
        picture = svg(sensitivity_figure(rows), f"{prefix}s", alt)
        found.append(Picture("Sensitivity to INT8", "What outputs gain when a product is not rounded.", picture))
    if timed := [t for t in target.tuning if any(row.speedup for row in t.trials)]:
        alt = "Forms tried: " + "; ".join(f"{t.component} {len(t.trials)}, chosen {t.speedup:.2f}x" for t in timed)
        caption = "Forms tried of each component. Line: none is both faster and closer to FP32. Ring: chosen."
        found.append(Picture("Latency against loss", caption, svg(pareto_figure(timed), f"{prefix}f", alt)))
    return (
        Picture(
            "Accuracy",
            "Dot: drop against FP32. Line: up to its one-sided 95 % upper bound, which must stay left of the margin.",
            accuracy,
        ),
        Picture("Latency", markdown.timing_note(target), latency),
        Picture("Size and memory", "Compiled components on disk; peak resident memory of a fresh process.", bars),
        Picture("Attention links", "One cell a head, darker = higher score. Crossed and hatched: removed.", links),
        *found,
    )


def save_links(layers: Sequence[Layer], file: Path) -> None:
    """The picture of links that the page has, in a file; none of them removed."""
    with style.context(["default", STYLE], after_reset=True):
        links_figure(layers).savefig(file, dpi=150, metadata={"Software": None} if file.suffix == ".png" else None)


def svg(figure: Figure, prefix: str, label: str) -> Markup:
    """`figure` as an <svg> element that reads `label` aloud; every id starts with `prefix`."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = re.sub(r"<!--.*?-->\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return Markup(f'<svg role="img" aria-label="{escape(label)}"') + Markup(text.removeprefix("<svg"))


def accuracy_figure(metrics: Sequence[Accuracy]) -> Figure:
    """A line a metric: from the drop to its upper bound, and the margin it must not pass."""
    figure = Figure(figsize=(WIDTH_IN, 0.3 + 1.35 * len(metrics)), layout="constrained")
    for ax, a in zip(figure.subplots(len(metrics), 1, squeeze=False)[:, 0], metrics, strict=True):
        # With little data the bound is wide, or infinite: it may leave the axis, on which the margin stays in sight.
        bound = min(a.drop_ci95_upper, 4 * max(a.margin, a.drop))
        low, high = min(0.0, a.drop), max(a.margin, bound)
        span = high - low
        side = "right" if bound > low + span / 2 else "left"
        ax.set(xlim=(low - 0.06 * span, high + 0.22 * span), ylim=(-1, 1), yticks=[])
        ax.spines["left"].set_visible(False)
        ax.axvspan(a.margin, high + span, facecolor="#fdf0e7", edgecolor="#eec3a3", hatch="///", linewidth=0)
        ax.axvline(0, color="#9aa5b1", linewidth=1)
        ax.axvline(a.margin, color=BEYOND, linewidth=1.8, linestyle=(0, (5, 2)))
        ax.annotate(f"margin {a.margin:g}", (a.margin, -0.72), (6, 0), color="#9a3d00", va="center", **LABEL)
        ax.plot([a.drop, bound], [0, 0], color=COMPRESSED, linewidth=2.6, solid_capstyle="butt")
        ax.plot(bound, 0, "|" if bound == a.drop_ci95_upper else ">", color=COMPRESSED, ms=14, mew=2.6)
        ax.plot(a.drop, 0, "o", color=COMPRESSED, ms=8)
        ax.annotate(f"drop {a.drop:.4f}", (a.drop, -0.28), (-4, 0), va="top", **LABEL)
        ax.annotate(f"95 % upper bound {a.drop_ci95_upper:.4f}", (bound, 0.26), (4, 0), ha=side, **LABEL)
        ax.set_title(
            f"{shorten(a.metric)}: FP32 {a.fp32:.4f}, compressed {a.compressed:.4f}   "
            f"(n = {a.n:,} in {a.clusters:,} groups; {a.verdict})"
        )
        ax.set_xlabel(f"drop against FP32 ({a.unit})" if a.unit else "drop against FP32")
    return figure


def latency_figure(latency: Latency) -> Figure:
    """Histogram and cumulative share of every timed inference."""
    figure = Figure(figsize=(WIDTH_IN, 3.1), layout="constrained")
    histogram, share = figure.subplots(1, 2)
    both = (
        ("FP32", latency.samples_ms.fp32, latency.fp32, "#7b8794", FP32, "///", "--"),
        ("compressed", latency.samples_ms.compressed, latency.compressed, COMPRESSED, "#8cc1e3", None, "-"),
    )
    series = [(name, samples, p, *look) for name, samples, p, *look in both if samples and p]
    # A single stall of the host must not squeeze the picture: the axis ends a little after p99.
    slowest = max(max(s[1]) for s in series)
    end = min(slowest, 1.25 * max(s[2].p99_ms for s in series)) * 1.02
    start = min(min(s[1]) for s in series)
    start = max(0.0, start - 0.05 * (end - start))
    bins = [start + i * (end - start) / 80 for i in range(81)]
    for name, samples, p, edge, face, hatch, line in series:
        label = f"{name} (n = {len(samples):,})"
        histogram.hist(
            samples, bins, histtype="stepfilled", facecolor=face, edgecolor=edge, hatch=hatch, alpha=0.9, label=label
        )
        share.ecdf(samples, color=edge, linestyle=line, linewidth=1.8, label=label)
        for value, level, marker in ((p.p50_ms, 0.5, "o"), (p.p90_ms, 0.9, "s"), (p.p99_ms, 0.99, "^")):
            share.plot(value, level, marker, color=edge, markersize=6)
        share.annotate(f"p50 {p.p50_ms:.2f} ms", (p.p50_ms, 0.5), (9, 9 if name == "FP32" else -15), color=INK, **LABEL)
    beyond = sum(v > end for s in series for v in s[1])
    for ax, title in ((histogram, "Distribution"), (share, "Share of inferences at or below")):
        ax.set(title=title, xlim=(start, end), xlabel="ms" + (f" ({beyond} slower not shown)" if beyond else ""))
    histogram.set_ylabel("inferences")
    share.set(ylim=(0, 1.04), yticks=[0, 0.5, 0.9, 1])
    share.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    share.set_axisbelow(True)
    histogram.set_ylim(top=histogram.get_ylim()[1] * 1.25)
    histogram.legend(loc="upper center", ncols=2)
    return figure


def bars_figure(size: Size | None, memory: Memory | None) -> Figure:
    """Bytes on disk and peak memory, FP32 above compressed."""
    figure = Figure(figsize=(WIDTH_IN, 1.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars(left, "Size on disk, MB", (size.fp32_bytes / 1e6, size.compressed_bytes / 1e6) if size else None)
    peaks = None
    if memory and memory.fp32_peak_mb is not None:
        peaks = memory.fp32_peak_mb, memory.compressed_peak_mb
    bars(right, "Peak memory, MB", peaks)
    return figure


def bars(ax: Axes, title: str, values: tuple[float, float] | None) -> None:
    ax.set_title(title)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_xticks([])
    if values is None:
        ax.set_yticks([])
        ax.text(0, 0.5, markdown.NOT_MEASURED, transform=ax.transAxes, color=MUTED)
        return
    drawn = ax.barh(("FP32", "compressed"), values, color=(FP32, COMPRESSED), height=0.62)
    drawn[0].set(hatch="///", edgecolor="#7b8794")
    ax.bar_label(drawn, (f"{values[0]:,.1f}", f"{values[1]:,.1f} ({markdown.relative(*values)})"), padding=5)
    ax.set_xlim(0, max(*values, 1e-9) * 1.25)
    ax.invert_yaxis()
    ax.tick_params(length=0)


def links_figure(layers: Sequence[Layer]) -> Figure:
    """A panel for each kind and edge queries -> keys, layers x heads."""

    def edge(layer: Layer) -> tuple[str, str, str]:
        return layer.kind, layer.queries, layer.keys

    panels = {key: list(group) for key, group in groupby(sorted(layers, key=edge), edge)}
    heights = [len(p) + 2.4 for p in panels.values()]
    figure = Figure(figsize=(WIDTH_IN, 0.27 * sum(heights)), layout=ConstrainedLayoutEngine(hspace=0.06))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, ((kind, queries, keys), panel) in zip(axes, panels.items(), strict=True):
        links_panel(ax, panel)
        ax.set_title(shorten(f"{markdown.KINDS[kind]}, {queries} → {keys}"))
    return figure


def links_panel(ax: Axes, layers: Sequence[Layer]) -> None:
    """Each head of each layer. Scores share a colour scale only within a panel: criteria may differ."""
    scores = [s for layer in layers for s in layer.scores or ()]
    norm = Normalize(min(scores, default=0.0), max(scores, default=1.0))
    heads = max(layer.heads_before for layer in layers)
    for y, layer in enumerate(layers):
        for x in range(layer.heads_before):
            score = layer.scores[x] if layer.scores else None
            face = SCORES(norm(score)) if score is not None else "#eef1f4"
            ax.add_patch(Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5))
            if x not in layer.kept:
                ax.add_patch(Rectangle((x, y), 1, 1, facecolor="none", edgecolor="#7b8794", hatch="////", linewidth=0))
                ax.plot((x + 0.36, x + 0.64), (y + 0.25, y + 0.75), color=INK, linewidth=1.6)
                ax.plot((x + 0.36, x + 0.64), (y + 0.75, y + 0.25), color=INK, linewidth=1.6)
        ax.text(heads + 0.15, y + 0.5, kept(layer), va="center", color=MUTED)
    ax.set(xlim=(0, heads), ylim=(len(layers), 0), xlabel="head")
    every = 1 if heads <= 24 else 4
    ax.set_xticks([x + 0.5 for x in range(0, heads, every)], [str(x) for x in range(0, heads, every)])
    ax.set_yticks([y + 0.5 for y in range(len(layers))], [shorten(layer.name) for layer in layers])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if scores:
        bar = ax.figure.colorbar(ScalarMappable(norm, SCORES), ax=ax, label="score", pad=0.09, aspect=9)
        bar.outline.set_visible(False)


def kept(layer: Layer) -> str:
    return f"{layer.heads_after} of {layer.heads_before}"
