"""Timing in ABBA blocks, on a clock that the test turns, and the interval of a ratio of medians."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemm.errors import ToolchainError
from edgemm.runtime import measure
from edgemm.runtime.measure import BLOCK, WARM_UP, abba, peak_memory_mb, ratio_interval

Call = Callable[[str], object]


class Clock:
    """Stands still but for what models take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 100.0, list[tuple[str, str]]()
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def model(self, name: str, seconds: Callable[[int], float]) -> Call:
        """A model whose n-th call of all calls takes `seconds(n)`."""

        def call(given_: str) -> None:
            self.now += seconds(len(self.calls))
            self.calls.append((name, given_))

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("rounds", [1, 3])
def test_order_is_a_b_b_a_after_a_warm_up(clock: Clock, rounds: int) -> None:
    abba(clock.model("A", lambda _: 1.0), clock.model("B", lambda _: 1.0), ["x", "y", "z"], rounds)
    warm_up, timed = clock.calls[: 2 * WARM_UP], clock.calls[2 * WARM_UP :]
    assert "".join(name for name, _ in warm_up) == "A" * WARM_UP + "B" * WARM_UP
    assert "".join(name for name, _ in timed) == ("A" * BLOCK + "B" * 2 * BLOCK + "A" * BLOCK) * rounds


@pytest.mark.parametrize("count", [1, 3, BLOCK, 2 * BLOCK])
def test_both_models_get_the_same_inputs_in_every_block(clock: Clock, count: int) -> None:
    inputs = [f"input {i}" for i in range(count)]
    abba(clock.model("A", lambda _: 1.0), clock.model("B", lambda _: 1.0), inputs, rounds=2)
    timed = [given_ for _, given_ in clock.calls[2 * WARM_UP :]]
    expected = [inputs[i % count] for i in range(BLOCK)]
    assert [timed[i : i + BLOCK] for i in range(0, len(timed), BLOCK)] == [expected] * 8


@pytest.mark.parametrize("rounds", [1, 4, 24])
def test_shapes_and_milliseconds(clock: Clock, rounds: int) -> None:
    a, b = abba(clock.model("A", lambda _: 0.003), clock.model("B", lambda _: 0.001), ["x"], rounds)
    assert a.shape == b.shape == (rounds, 2 * BLOCK)
    assert a.dtype == b.dtype == np.float64
    assert np.allclose(a, 3.0)
    assert np.allclose(b, 1.0)


def test_each_time_stands_where_its_call_was(clock: Clock) -> None:
    a, b = abba(clock.model("A", lambda n: n), clock.model("B", lambda n: n), ["x"], rounds=2)
    at = np.arange(2 * WARM_UP, 2 * WARM_UP + 8 * BLOCK).reshape(2, 4, BLOCK)
    assert np.allclose(a, 1e3 * np.concatenate([at[:, 0], at[:, 3]], axis=1))
    assert np.allclose(b, 1e3 * np.concatenate([at[:, 1], at[:, 2]], axis=1))


def test_warm_up_is_thrown_away(clock: Clock) -> None:
    cold = clock.model("A", lambda n: 1.0 if n < 2 * WARM_UP else 0.002)
    a, b = abba(cold, clock.model("B", lambda n: 1.0 if n < 2 * WARM_UP else 0.002), ["x"], rounds=3)
    assert a.max() == pytest.approx(2.0) and b.max() == pytest.approx(2.0)


@settings(max_examples=30)
@given(slope=st.floats(-1e-5, 1e-5), rounds=st.integers(1, 6))
def test_a_steady_drift_falls_on_both_alike(slope: float, rounds: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        a, b = abba(*(clock.model(name, lambda n: 0.01 + slope * n) for name in "AB"), ["x"], rounds)
    assert a.mean(axis=1) == pytest.approx(b.mean(axis=1), rel=1e-9)


def test_time_between_inferences_is_not_counted(clock: Clock) -> None:
    class Slow(list[str]):
        def __getitem__(self, i: int) -> str:  # type: ignore[override]
            clock.now += 5.0
            return super().__getitem__(i)

    a, _ = abba(clock.model("A", lambda _: 0.003), clock.model("B", lambda _: 0.001), Slow(["x"]), rounds=2)
    assert np.allclose(a, 3.0)


def test_blocks_of_a_round_are_unbroken(clock: Clock) -> None:
    abba(clock.model("A", lambda _: 1.0), clock.model("B", lambda _: 1.0), ["x"], rounds=2)
    runs = [(name, len(list(calls))) for name, calls in groupby(name for name, _ in clock.calls[2 * WARM_UP :])]
    assert runs == [("A", BLOCK), ("B", 2 * BLOCK), ("A", 2 * BLOCK), ("B", 2 * BLOCK), ("A", BLOCK)]


# The ratio


def latencies(rng: np.random.Generator, rounds: int, scale: float = 1.0) -> tuple[NDArray[np.float64], ...]:
    """Two draws of one skewed distribution, with slow rounds that hit both; the first `scale` times slower."""
    load = rng.lognormal(0, 0.1, (rounds, 1))
    a, b = ((9 + rng.gamma(2, 0.3, (rounds, 2 * BLOCK))) * load for _ in range(2))
    return a * scale, b


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESAMPLES", 400)


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_interval_covers_the_true_ratio(ratio: float) -> None:
    covered = 0
    for i in range(200):
        a, b = latencies(np.random.default_rng([7, i]), rounds=24, scale=ratio)
        low, high = ratio_interval(a, b, seed=i)
        assert low < high
        covered += low <= ratio <= high
    assert covered >= 180


@pytest.mark.usefixtures("fewer_resamples")
def test_two_draws_of_one_distribution_stay_within_2_percent_of_1() -> None:
    for i in range(20):
        low, high = ratio_interval(*latencies(np.random.default_rng([8, i]), rounds=24), seed=i)
        assert 0.98 < low < high < 1.02


def test_interval_is_the_loop_over_rounds() -> None:
    a, b = latencies(np.random.default_rng(1), rounds=12, scale=2.0)
    rng, ratios = random.Random(1), []
    for _ in range(2_000):
        rows = rng.choices(range(12), k=12)
        ratios.append(
            statistics.median(t for r in rows for t in a[r].tolist())
            / statistics.median(t for r in rows for t in b[r].tolist())
        )
    ratios.sort()
    width = ratios[1_950] - ratios[50]
    assert ratio_interval(a, b, seed=3) == pytest.approx((ratios[50], ratios[1_950]), abs=0.1 * width)


@pytest.mark.usefixtures("fewer_resamples")
@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.1, 10), rounds=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_ratio_that_never_varies_has_no_width(factor: float, rounds: int, seed: int) -> None:
    b = np.random.default_rng(seed).gamma(2, 1, (rounds, 2 * BLOCK))
    assert ratio_interval(factor * b, b, seed) == pytest.approx((factor, factor), rel=1e-9)


@pytest.mark.usefixtures("fewer_resamples")
def test_same_seed_same_interval_and_swapped_models_the_inverse() -> None:
    a, b = latencies(np.random.default_rng(2), rounds=24, scale=2.0)
    low, high = ratio_interval(a, b, seed=4)
    assert ratio_interval(a, b, seed=4) == (low, high)
    assert ratio_interval(b, a, seed=4) == pytest.approx((1 / high, 1 / low), rel=1e-3)


def test_slow_rounds_that_hit_both_do_not_widen_the_interval() -> None:
    a, b = latencies(np.random.default_rng(3), rounds=24)
    b = a * 0.5 * np.random.default_rng(4).normal(1, 0.005, a.shape)
    low, high = ratio_interval(a, b, seed=0)
    assert high - low < 0.02


# Memory


def test_a_directory_that_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        peak_memory_mb(tmp_path, {})
    assert str(tmp_path) in str(caught.value)
    assert "\n  fix: " in str(caught.value)
