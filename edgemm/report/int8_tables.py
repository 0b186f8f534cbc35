"""Cells of the tables that say how INT8 was chosen and what was proven of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgemm.report.int8_schema import Saturation, Settled, Share, Trial, Tuned
from edgemm.report.schema import TargetReport

TUNED_HEAD = ("component", "SQNR, dB", "asked", "speed-up", "form")
TRIAL_HEAD = ("component", "form", "SQNR, dB", "speed-up", "")
SENSITIVITY_HEAD = ("component", "product", "gain in float, dB", "alone in INT8, dB", "saved, ms")
SHARE_HEAD = ("component", "FP32, ms", "share in INT8", "ceiling", "reached", "of the ceiling")
RANGES_HEAD = ("component", "samples", "activations", "not settled")
SATURATION_HEAD = ("component", "target adds in", "products proven", "not proven", "7-bit weights", "left in float")
SHOWN = 3  # names of a list


def tables(target: TargetReport) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, head and rows of each table that has rows."""
    found = [
        ("INT8", TUNED_HEAD, [tuned_cells(t) for t in target.tuning]),
        ("Forms tried", TRIAL_HEAD, list(trial_rows(target.tuning))),
        ("Sensitivity of products to INT8", SENSITIVITY_HEAD, sensitivity_rows(target.tuning)),
        ("Ceiling of INT8", SHARE_HEAD, [share_cells(s) for s in target.int8_share]),
        ("Ranges of activations", RANGES_HEAD, [ranges_cells(r) for r in target.ranges]),
        ("Overflow of 16 bits", SATURATION_HEAD, [saturation_cells(s) for s in target.saturation]),
    ]
    return [(title, head, rows) for title, head, rows in found if rows]


def smoothing(row: Trial | Tuned) -> str:
    """Alpha of SmoothQuant in words."""
    alpha = row.smooth_quant
    if alpha == "auto":
        return "a layer's own"
    return "off" if alpha < 0 else f"{alpha:g}"


def form(row: Trial | Tuned) -> str:
    """How a component runs."""
    if not row.int8:
        return row.precision
    how = f"smoothing {smoothing(row)}, {row.ranges}" if row.ranges else "weights alone"
    floats = f"; in float: {some(row.keep_float)}" if row.keep_float else ""
    return f"INT8, {how}, the rest {row.precision}{floats}"


def tuned_cells(found: Tuned) -> tuple[str, ...]:
    """What the search chose for a component."""
    return found.component, f"{found.sqnr_db:.1f}", f"{found.wanted_db:.1f}", times(found.speedup), form(found)


def trial_rows(tuned: Sequence[Tuned]) -> Iterator[tuple[str, ...]]:
    """Every form tried, and whether none is better in both and which one goes on."""
    for found in tuned:
        for row in found.trials:
            marks = [name for name, on in (("chosen", row.chosen), ("Pareto front", row.pareto)) if on]
            yield found.component, form(row), f"{row.sqnr_db:.1f}", times(row.speedup), ", ".join(marks)


def sensitivity_rows(tuned: Sequence[Tuned]) -> list[tuple[str, ...]]:
    """Products of all components, the costliest first."""
    rows = sorted(((t.component, s) for t in tuned for s in t.sensitivity), key=lambda row: -row[1].gain_db)
    return [(n, s.name, f"{s.gain_db:.2f}", number(s.alone_db, 1), number(s.saved_ms, 3)) for n, s in rows]


def share_cells(row: Share) -> tuple[str, ...]:
    reached = "with pruning" if row.reached is None else times(row.reached)
    near = "" if row.reached is None else f"{100 * row.reached / row.ceiling:.0f} %"
    return row.name, f"{row.fp32_ms:.2f}", f"{100 * row.share:.0f} %", times(row.ceiling), reached, near


def ranges_cells(row: Settled) -> tuple[str, ...]:
    unsettled = f"{len(row.unsettled)}: {some(row.unsettled)}" if row.unsettled else "none"
    return row.component, str(row.samples), str(row.tensors), unsettled


def saturation_cells(row: Saturation) -> tuple[str, ...]:
    """With VNNI nothing is at stake: what is not proven there is said all the same."""
    bits = "16 bits" if row.sixteen_bits else "32 bits"
    total = len(row.proven) + len(row.unproven)
    lists = (row.unproven, row.seven_bits, row.floats)
    return (
        row.component,
        f"{bits} ({row.isa or 'this machine'})",
        f"{len(row.proven)} of {total}",
        *(some(names) for names in lists),
    )


def some(names: Sequence[str]) -> str:
    """The first of them, and how many there are."""
    if not names:
        return "none"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def times(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}x"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
