"""The verdict: paired non-inferiority, clustered by media.

PASS only if the one-sided 95 % upper bound on the drop is under the margin. The bound is the largest of
three, each of which covers where the others are short:

bootstrap   percentile bound over resampled clusters, for skewed differences
normal      cluster-robust standard error, for few clusters
counts      gamma limits of the losses and of the gains (Fay & Feuer 1997, for sums over clusters; Garwood's
            exact Poisson limits where each sample stands alone), joined by MOVER (Zou & Donner 2008), for few
            flips: with none at all it is the rule of three, 3 / clusters

Sample size, for 80 % power at no true drop: n = (z_0.95 + z_0.80)^2 * flips / margin^2 (6.18 * flips / margin^2)
times the design effect of the clusters, plus 4 / margin times the size of a cluster: the price of the counts'
limits. Too few samples for that, and a bound over the margin is INCONCLUSIVE and not FAIL. A bound under the
margin needs no more samples, but for 3 / margin clusters, without which even no flip at all proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InconclusiveError, VerdictError
from edgemm.recipe import Recipe
from edgemm.report.schema import Accuracy, Gate, Latency, Memory, Size, TargetReport, Verdict
from edgemm.target import Target

Z95, Z80 = 1.6449, 0.8416
RULE_OF_THREE = 3.0  # 0 of n events bounds their rate by 3 / n
FEW_FLIPS = 4.0  # over 80 % power from no flips to many, by enumeration: tests/unit/test_verdict.py
ORDER: tuple[Verdict, ...] = ("PASS", "UNVERIFIED", "INCONCLUSIVE", "FAIL")
NOT_MEASURED: tuple[Verdict, str] = ("INCONCLUSIVE", "not measured")


@dataclass(frozen=True, slots=True)
class Paired:
    """What a paired comparison showed; `upper` and `lower` are one-sided 95 % bounds on the drop.

    n_required   samples for 80 % power at the flips seen; at most n (but see RULE_OF_THREE) when upper < margin
    """

    n: int
    clusters: int
    drop: float
    lower: float
    upper: float
    n_required: int
    verdict: Verdict


def compare(
    fp32: NDArray[Any],
    compressed: NDArray[Any],
    groups: NDArray[Any],
    *,
    margin: float,
    seed: int,
    resamples: int = 10_000,
) -> Paired:
    """Judge `compressed` against `fp32` (float[n] in 0..1 each, higher is better), paired by sample.

    groups   [n] cluster of each sample
    """
    difference = np.asarray(fp32, np.float64) - np.asarray(compressed, np.float64)
    n = len(difference)
    _, index = np.unique(groups, return_inverse=True)
    sizes = np.bincount(index).astype(np.float64)
    sums = np.bincount(index, difference).astype(np.float64)
    clusters = len(sizes)
    drop = float(difference.mean())
    error, effect = _cluster_error(difference, sums, sizes, drop)
    typical = float((sizes**2).sum()) / n  # size of the cluster of a typical sample
    bounds = (
        _bootstrap(sums, sizes, resamples, seed),
        (drop - Z95 * error, drop + Z95 * error),
        _counts(difference, index, typical),
    )
    lower, upper = min(low for low, _ in bounds), max(high for _, high in bounds)
    fewest = math.ceil(RULE_OF_THREE / margin * n / clusters)
    n_required = required_samples(float(np.mean(difference**2)), margin, effect, typical)
    if upper < margin:
        n_required = min(n_required, n)
    n_required = max(n_required, fewest)
    return Paired(
        n=n,
        clusters=clusters,
        drop=drop,
        lower=lower,
        upper=upper,
        n_required=n_required,
        verdict=_judge(n, n_required, lower, upper, margin),
    )


def _judge(n: int, n_required: int, lower: float, upper: float, margin: float) -> Verdict:
    if lower >= margin:
        return "FAIL"
    if n < n_required:
        return "INCONCLUSIVE"
    return "PASS" if upper < margin else "FAIL"


def required_samples(flip_rate: float, margin: float, design_effect: float = 1.0, cluster_size: float = 1.0) -> int:
    """Samples for 80 % power at no true drop; `flip_rate` is the mean square of the paired differences."""
    return math.ceil((Z95 + Z80) ** 2 * flip_rate / margin**2 * design_effect + FEW_FLIPS / margin * cluster_size)


def _cluster_error(
    difference: NDArray[np.float64], sums: NDArray[np.float64], sizes: NDArray[np.float64], drop: float
) -> tuple[float, float]:
    """Cluster-robust standard error of the mean, and the design effect (at least 1)."""
    clusters, n = len(sizes), len(difference)
    if clusters < 2:
        return 1.0, 1.0  # one cluster says nothing: an error as wide as the metric's range
    variance = float(((sums - drop * sizes) ** 2).sum()) / n**2 * clusters / (clusters - 1)
    simple = float(difference.var()) / n
    return math.sqrt(variance), max(1.0, variance / simple) if simple > 0 else 1.0


def _bootstrap(sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, seed: int) -> tuple[float, float]:
    """5th and 95th percentile of the mean over resampled clusters."""
    rng = np.random.default_rng(seed)
    clusters = len(sizes)
    # Clusters with the same (sum, size) are interchangeable: resample their counts, not each cluster.
    kinds, counts = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
    drawn = rng.multinomial(clusters, counts / clusters, resamples)
    means = (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])
    low, high = np.quantile(means, [0.05, 0.95])
    return float(low), float(high)


def _counts(difference: NDArray[np.float64], index: NDArray[np.intp], typical: float) -> tuple[float, float]:
    """5 % and 95 % limits of the mean from the sums of losses and of gains, which come cluster by cluster.

    typical   samples in a cluster: what one more cluster, unseen so far, could lose
    """
    losses, gains = (np.bincount(index, np.maximum(d, 0)).astype(np.float64) for d in (difference, -difference))
    (lost_low, lost, lost_high), (won_low, won, won_high) = (_gamma_limits(sums, typical) for sums in (losses, gains))
    n = len(difference)
    lower = (lost - won - math.hypot(lost - lost_low, won_high - won)) / n
    upper = (lost - won + math.hypot(lost_high - lost, won - won_low)) / n
    return lower, upper


def _gamma_limits(sums: NDArray[np.float64], typical: float) -> tuple[float, float, float]:
    """5 % limit, value and 95 % limit of the expected total of `sums`, a compound Poisson variable."""

    def quantile(mean: float, variance: float, z: float) -> float:
        if mean == 0:
            return 0.0
        shape = mean**2 / variance  # at least 1; Wilson and Hilferty's formula is good to 1 % or 0.01 of a count
        return mean * (1 - 1 / (9 * shape) + z / (3 * math.sqrt(shape))) ** 3

    total, squares = float(sums.sum()), float((sums**2).sum())
    return quantile(total, squares, -Z95), total, quantile(total + typical, squares + typical**2, Z95)


def worst(verdicts: list[Verdict]) -> Verdict:
    """The verdict of several gates together."""
    return max(verdicts, key=ORDER.index, default="INCONCLUSIVE")


def at_most(value: float, limit: float) -> Verdict:
    return "PASS" if value <= limit else "FAIL"


def at_least(interval: tuple[float, float], limit: float) -> Verdict:
    """PASS when the whole interval is at or over the limit, FAIL when all of it is under."""
    if interval[0] >= limit:
        return "PASS"
    return "FAIL" if interval[1] < limit else "INCONCLUSIVE"


def raise_verdict(targets: Iterable[TargetReport]) -> None:
    """VerdictError when a target FAILs, else InconclusiveError when one is INCONCLUSIVE or proven less than asked."""
    targets = list(targets)
    gates = [(t.name, g) for t in targets for g in t.gates]
    for verdict, error, fix in (
        ("FAIL", VerdictError, "prune or quantize less, or change the limit in the recipe or target"),
        ("INCONCLUSIVE", InconclusiveError, "give more verification samples, or measure on a quiet machine"),
    ):
        if missed := [f"{name}: {g.name}: {g.detail}, limit {g.limit:g}" for name, g in gates if g.verdict == verdict]:
            unmeasured = any(g.value is None for _, g in gates if g.verdict == verdict)
            raise error(f"{verdict}: " + "; ".join(missed), fix="--data with real samples" if unmeasured else fix)
    for t in targets:
        if t.verdict == "UNVERIFIED" and t.level and t.level_asked and t.level < t.level_asked:
            raise InconclusiveError(
                f"UNVERIFIED: {t.name}: level {t.level} is reached, and {t.level_asked} is asked. {t.established}",
                fix=f"measure the bundle on the device, or ask for less: --set target.level={t.level}",
            )


def accuracy_gates(rows: Sequence[Accuracy], recipe: Recipe) -> list[Gate]:
    """A gate a metric; one that can't pass when there is none."""
    if not rows:
        detail = f"not measured: {recipe.data} is noise"
        return [
            Gate(
                name="accuracy", value=None, limit=recipe.verify.margin, unit="", verdict="INCONCLUSIVE", detail=detail
            )
        ]
    return [
        Gate(
            name=f"{row.metric} drop",
            value=row.drop_ci95_upper,
            limit=row.margin,
            unit=row.unit,
            verdict=row.verdict,
            detail=f"{row.fp32:.4f} to {row.compressed:.4f}, one-sided 95 % bound on the drop "
            f"{row.drop_ci95_upper:.4f}, n {row.n} (needs {row.n_required})",
        )
        for row in rows
    ]


def budget_gates(
    target: Target,
    latency: Latency | None,
    memory: Memory | None,
    size: Size | None,
    absent: tuple[Verdict, str] = NOT_MEASURED,
) -> list[Gate]:
    """A gate a budget; one whose quantity was not measured can't pass: it gets the verdict and reason `absent`."""
    budgets = target.budgets
    gates = []
    if (limit := budgets.min_speedup) is not None:
        (verdict, detail), speedup = absent, None
        if latency and latency.speedup_ci95:
            low, high = latency.speedup_ci95
            verdict, detail = at_least(latency.speedup_ci95, limit), f"95 % interval {low:.2f} to {high:.2f}"
            speedup = latency.speedup_p50
        gates.append(Gate(name="speed-up p50", value=speedup, limit=limit, unit="x", verdict=verdict, detail=detail))
    for name, value, most, unit in (
        ("latency p50", latency.compressed.p50_ms if latency else None, budgets.max_p50_ms, "ms"),
        ("peak memory", memory.compressed_peak_mb if memory else None, budgets.max_peak_mb, "MB"),
        ("size ratio", size.compressed_bytes / size.fp32_bytes if size else None, budgets.max_size_ratio, "of FP32"),
    ):
        if most is not None:
            verdict, detail = absent if value is None else (at_most(value, most), "at most")
            gates.append(Gate(name=name, value=value, limit=most, unit=unit, verdict=verdict, detail=detail))
    return gates
