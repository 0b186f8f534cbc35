"""The verdict: paired non-inferiority, clustered by media.

PASS only if the one-sided 95 % upper bound on the drop is under the margin. The bound is the larger of
two: the percentile bound of a bootstrap that resamples whole clusters, and the cluster-robust normal
bound. Each covers where the other is short (few clusters; skewed differences).

Sample size of a paired test at no true loss, from the power formula
n = (z_0.95 + z_0.80)^2 * flips / margin^2 (6.18 * flips / margin^2), times the design effect of the
clusters; and never fewer than 3 / margin clusters, below which even no flip at all proves nothing
(the rule of three: 0 of n events bounds the rate by 3 / n).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InconclusiveError, VerdictError
from edgemm.report.schema import TargetReport, Verdict

Z95, Z80 = 1.6449, 0.8416
RULE_OF_THREE = 3.0
ORDER: tuple[Verdict, ...] = ("PASS", "UNVERIFIED", "INCONCLUSIVE", "FAIL")


@dataclass(frozen=True, slots=True)
class Paired:
    """What a paired comparison showed; `upper` and `lower` are one-sided 95 % bounds on the drop."""

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
    """Judge `compressed` against `fp32` (float[n] each, higher is better), paired by sample.

    groups   [n] cluster of each sample"""
    difference = np.asarray(fp32, np.float64) - np.asarray(compressed, np.float64)
    n = len(difference)
    _, index = np.unique(groups, return_inverse=True)
    sizes = np.bincount(index).astype(np.float64)
    sums = np.bincount(index, difference).astype(np.float64)
    clusters = len(sizes)
    drop = float(difference.mean())
    error, effect = _cluster_error(difference, sums, sizes, drop)
    low, high = _bootstrap(sums, sizes, resamples, seed)
    lower, upper = min(low, drop - Z95 * error), max(high, drop + Z95 * error)
    changed = float(np.mean(difference != 0))
    fewest = math.ceil(RULE_OF_THREE / margin * n / clusters)
    n_required = max(fewest, required_samples(changed, margin, effect))
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


def required_samples(flip_rate: float, margin: float, design_effect: float = 1.0) -> int:
    """Samples for 80 % power at no true drop when `flip_rate` of the paired values differ."""
    return math.ceil((Z95 + Z80) ** 2 * flip_rate / margin**2 * design_effect)


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
    """VerdictError when a target FAILs, else InconclusiveError when one is INCONCLUSIVE."""
    gates = [(t.name, g) for t in targets for g in t.gates]
    for verdict, error, fix in (
        ("FAIL", VerdictError, "prune or quantize less, or change the limit in the recipe or target"),
        ("INCONCLUSIVE", InconclusiveError, "give more verification samples, or measure on a quiet machine"),
    ):
        if missed := [f"{name}: {g.name}: {g.detail}, limit {g.limit:g}" for name, g in gates if g.verdict == verdict]:
            raise error(f"{verdict}: " + "; ".join(missed), fix=fix)
