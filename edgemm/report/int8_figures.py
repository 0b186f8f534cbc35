"""Pictures of what edgemm/tuning.py tried: products by what their INT8 costs, forms by latency and loss."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from edgemm.report.int8_schema import Sensitivity, Tuned
from edgemm.report.look import BEYOND, COMPRESSED, FP32, MUTED, WIDTH_IN, shorten

MOST_SENSITIVE = 20


def most_sensitive(tuned: Sequence[Tuned]) -> list[tuple[str, Sensitivity]]:
    """The products whose INT8 costs most, with their components."""
    rows = [(t.component, s) for t in tuned for s in t.sensitivity]
    return sorted(rows, key=lambda row: -row[1].gain_db)[:MOST_SENSITIVE]


def sensitivity_figure(rows: Sequence[tuple[str, Sensitivity]]) -> Figure:
    """A bar a product, in dB."""
    figure = Figure(figsize=(WIDTH_IN, 0.5 + 0.22 * len(rows)), layout="constrained")
    ax = figure.subplots()
    names = [shorten(f"{component}  {s.name}") for component, s in rows]
    ax.barh(range(len(rows)), [s.gain_db for _, s in rows], color=COMPRESSED, height=0.62)
    ax.set_yticks(range(len(rows)), names)
    ax.set_xlabel("dB")
    ax.invert_yaxis()
    ax.tick_params(length=0)
    return figure


def pareto_figure(tuned: Sequence[Tuned]) -> Figure:
    """A panel a component: speed-up over FP32 against SQNR of every form tried."""
    columns = min(3, len(tuned))
    lines = -(-len(tuned) // columns)
    figure = Figure(figsize=(WIDTH_IN, 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in panels[len(tuned) :]:
        ax.set_visible(False)
    for ax, found in zip(panels, tuned, strict=False):
        timed = [t for t in found.trials if t.speedup is not None]
        for int8, face, label in ((False, FP32, "float"), (True, COMPRESSED, "INT8")):
            rows = [t for t in timed if t.int8 is int8]
            ax.plot([t.speedup for t in rows], [t.sqnr_db for t in rows], "o", color=face, label=label, ms=6)
        front = sorted((t.speedup or 0.0, t.sqnr_db) for t in timed if t.pareto)
        ax.plot([x for x, _ in front], [y for _, y in front], color=MUTED, linewidth=1)
        for t in timed:
            if t.chosen:
                ax.plot(t.speedup, t.sqnr_db, "o", mfc="none", mec=BEYOND, mew=2, ms=12, label="chosen")
        ax.axhline(found.wanted_db, color=BEYOND, linewidth=1.2, linestyle=(0, (5, 2)))
        ax.set(title=shorten(found.component), xlabel="speed-up over FP32", ylabel="SQNR, dB")
        ax.legend(loc="best")
    return figure
