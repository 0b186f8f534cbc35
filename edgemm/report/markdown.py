"""report.json -> Markdown for a pull request, and the wording of numbers that all renderers share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edgemm.report.int8_tables import tables
from edgemm.report.schema import Gate, Layers, Pruning, Report, TargetReport

NOT_MEASURED = "not measured"
ENGINE_HEAD = ("engine", "INT8 products", "fused attention", "nodes in FP32", "layers")
KINDS = {"cross": "cross-modal attention", "self": "self-attention", "merged": "merged attention"}


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity before (FP32) and after compression, as text. `change` says what it means."""

    name: str
    before: str
    after: str
    change: str


def render(report: Report) -> str:
    """Markdown of the whole report."""
    lines = [f"# edgemm: {plain(report.model)}", "", f"Recipe {plain(report.recipe)}, seed {report.seed}.", ""]
    for target in report.targets:
        lines += section(target)
    return "\n".join(lines).rstrip() + "\n"


def section(target: TargetReport) -> list[str]:
    """Lines of one target: verdict, comparison, gates, pruning, notes, bundle."""
    lines = [f"## {target.verdict}: {plain(target.name)}", "", plain(headline(target)), ""]
    lines += table(("", "FP32", "compressed", "change"), (row_cells(r) for r in comparison(target)), numbers=(1, 2))
    lines += [plain(timing_note(target)), "", "### Gates", ""]
    gates = ((g.name, measure(g.value, g.unit), measure(g.limit, g.unit), g.verdict, g.detail) for g in target.gates)
    lines += table(("gate", "value", "limit", "verdict", "detail"), gates, numbers=(1, 2))
    lines += ["### Pruning", ""]
    if target.pruning:
        rows = (row_cells(r) for r in pruning_summary(target.pruning))
        lines += table(("", "before", "after", "change"), rows, numbers=(1, 2, 3))
    else:
        lines += [NOT_MEASURED, ""]
    for title, head, cells in tables(target):
        lines += [f"### {title}", "", *table(head, cells, numbers=())]
    if target.level:
        lines += [f"### Level {target.level}", "", plain(target.established), ""]
    if target.layers:
        lines += ["### Engines", "", *table(ENGINE_HEAD, map(engine_cells, target.layers), numbers=(1, 2, 3, 4))]
    if target.notes:
        lines += ["### Notes", "", *(f"- {plain(note)}" for note in target.notes), ""]
    return [*lines, f"Bundle: {plain(bundle_line(target))}", ""]


def headline(target: TargetReport) -> str:
    """The result in one sentence; what was not measured is left to the table."""
    parts = [f"{a.metric} {a.fp32:.4f} → {a.compressed:.4f}" for a in target.accuracy]
    if target.latency and target.latency.speedup_ci95:
        low, high = target.latency.speedup_ci95
        parts.append(f"speed-up {target.latency.speedup_p50:.2f}x ({low:.2f} to {high:.2f})")
    if target.size:
        parts.append(f"size {relative(target.size.fp32_bytes, target.size.compressed_bytes)}")
    if missed := [g.name for g in target.gates if g.verdict == target.verdict != "PASS"]:
        parts.insert(0, f"{target.verdict}: {', '.join(missed)}")
    return "; ".join(parts) or NOT_MEASURED


def comparison(target: TargetReport) -> list[Row]:
    """FP32 against compressed: accuracy, latency, speed-up, memory, size."""
    rows = [
        Row(
            a.metric,
            f"{a.fp32:.4f}",
            f"{a.compressed:.4f}",
            f"drop {a.drop:.4f}, at most {a.drop_ci95_upper:.4f} (95 %), margin {a.margin:g}",
        )
        for a in target.accuracy
    ] or [missing("accuracy")]
    if latency := target.latency:
        for p in ("p50", "p90", "p99"):
            before = getattr(latency.fp32, f"{p}_ms") if latency.fp32 else None
            rows.append(change_row(f"latency {p}", before, getattr(latency.compressed, f"{p}_ms"), "ms"))
        if latency.speedup_ci95:
            low, high = latency.speedup_ci95
            interval = f"95 % interval {low:.2f} to {high:.2f}"
            rows.append(Row("speed-up at p50", "1x", f"{latency.speedup_p50:.2f}x", interval))
        else:
            rows.append(missing("speed-up at p50"))
        rows += ceiling_rows(target)
        for c in latency.components if len(latency.components) > 1 else ():
            row = change_row(f"{c.name} p50", c.fp32_p50_ms, c.compressed_p50_ms, "ms")
            if c.speedup_ci95:
                low, high = c.speedup_ci95
                row = replace(row, change=f"{c.speedup_p50:.2f}x ({low:.2f} to {high:.2f})")
            rows.append(row)
    else:
        rows += [missing(f"latency {p}") for p in ("p50", "p90", "p99")] + [missing("speed-up at p50")]
    if memory := target.memory:
        rows.append(change_row("peak memory", memory.fp32_peak_mb, memory.compressed_peak_mb, "MB", 1))
    else:
        rows.append(missing("peak memory"))
    if size := target.size:
        before, after = size.fp32_bytes, size.compressed_bytes
        rows.append(Row("size on disk", megabytes(before), megabytes(after), relative(before, after)))
    else:
        rows.append(missing("size on disk"))
    return rows


def ceiling_rows(target: TargetReport) -> list[Row]:
    """What INT8 could reach at most, beside the speed-up."""
    rows = []
    for s in target.int8_share:
        if s.name == "all":
            near = f"; {100 * s.reached / s.ceiling:.0f} % of it reached" if s.reached else ""
            why = f"{100 * s.share:.0f} % of FP32's time is in products that are INT8 now{near}"
            rows.append(Row("ceiling of INT8 alone", "1x", f"{s.ceiling:.2f}x", why))
    return rows


def pruning_summary(pruning: Pruning) -> list[Row]:
    """Links and heads by kind of attention, hidden units, then parameters and MACs."""
    rows = []
    for kind, name in KINDS.items():
        if layers := [x for x in pruning.layers if x.kind == kind]:
            before, after = sum(x.links_before for x in layers), sum(x.links_after for x in layers)
            heads_before, heads_after = sum(x.heads_before for x in layers), sum(x.heads_after for x in layers)
            change = relative(before, after)
            rows.append(
                Row(name, f"{before} links, {heads_before} heads", f"{after} links, {heads_after} heads", change)
            )
            before, after = sum(x.keys_before or 0 for x in layers), sum(x.keys_after or 0 for x in layers)
            if before != after:
                rows.append(Row(f"{name}, keys", f"{before} keys", f"{after} keys", relative(before, after)))
    if pruning.hidden:
        before, after = sum(x.units_before for x in pruning.hidden), sum(x.units_after for x in pruning.hidden)
        rows.append(Row("hidden units", f"{before} units", f"{after} units", relative(before, after)))
    for name, before, after in (
        ("parameters", pruning.parameters_before, pruning.parameters_after),
        ("MACs", pruning.macs_before, pruning.macs_after),
    ):
        rows.append(Row(name, measure(before / 1e6, "M"), measure(after / 1e6, "M"), relative(before, after)))
    if pruning.zero_weights > 0.01 * pruning.parameters_after:  # a row of padding in a table is no finding
        share = f"{100 * pruning.zero_weights / pruning.parameters_after:.1f} % of the parameters"
        rows.append(Row("zero weights", "", measure(pruning.zero_weights / 1e6, "M"), share))
    return rows


def engine_cells(row: Layers) -> tuple[str, ...]:
    """One engine: what runs in INT8 and what is fused, of how many."""
    int8, fused = f"{row.int8_gemms} of {row.gemms}", f"{row.fused_attention} of {row.attention}"
    return f"{row.component}, {row.precision}", int8, fused, str(row.float32_nodes), str(row.layers)


def timing_note(target: TargetReport) -> str:
    """What the FP32 latency is, since a speed-up means nothing without its baseline."""
    if not (latency := target.latency):
        return f"Latency {NOT_MEASURED}."
    torch = NOT_MEASURED if latency.torch_p50_ms is None else f"{latency.torch_p50_ms:.2f} ms"
    return f"Baseline: {latency.baseline}. FP32 in PyTorch, p50: {torch}."


def bundle_line(target: TargetReport) -> str:
    return f"{target.bundle.path} (sha256 {target.bundle.sha256[:12]})" if target.bundle else "not made"


def gate_line(gate: Gate) -> str:
    value, limit = measure(gate.value, gate.unit), measure(gate.limit, gate.unit)
    return f"{gate.name}: {value}, limit {limit}" + (f"; {gate.detail}" if gate.detail else "")


def measure(value: float | None, unit: str) -> str:
    """Four significant digits and the unit; `x` (times) stands against its number."""
    if value is None:
        return NOT_MEASURED
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{number}x" if unit == "x" else f"{number} {unit}".rstrip()


def change_row(name: str, before: float | None, after: float, unit: str, digits: int = 2) -> Row:
    """A quantity with its change in percent; `before` None where FP32 was not run."""
    now = f"{after:.{digits}f} {unit}"
    if before is None:
        return Row(name, NOT_MEASURED, now, "")
    return Row(name, f"{before:.{digits}f} {unit}", now, relative(before, after))


def missing(name: str) -> Row:
    return Row(name, NOT_MEASURED, NOT_MEASURED, "")


def relative(before: float, after: float) -> str:
    """Change in percent of `before`."""
    if before == after:
        return "unchanged"
    return f"{100 * (after - before) / before:+.1f} %" if before else "from 0"


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"


def row_cells(row: Row) -> tuple[str, ...]:
    return row.name, row.before, row.after, row.change


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    """A GitHub table and an empty line; columns in `numbers` are right-aligned."""
    rule = ["---:" if i in numbers else "---" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *([plain(c) for c in row] for row in rows))] + [""]


def plain(text: str) -> str:
    """Text that Markdown shows as it is: on one line, with markup escaped."""
    return re.sub(r"([\\`*\[\]<>|~&]|\b_|_\b)", r"\\\1", " ".join(text.split()))
