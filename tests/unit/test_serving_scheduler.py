"""The scheduler: which rows become one batch, what is computed once, who comes first, who is turned away."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from edgemm.errors import InputError
from edgemm.runtime.serving.cache import OVERHEAD, Cache
from edgemm.runtime.serving.engine import Engine
from edgemm.runtime.serving.metrics import Metrics
from edgemm.runtime.serving.options import Options
from edgemm.runtime.serving.scheduler import Scheduler
from edgemm.runtime.serving.work import Absent, Expired, Plan, Rejected, Source


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def engine(name: str, inputs: Sequence[str], output: str, seconds: dict[int, float] | None = None) -> Engine:
    """A component that sums its inputs, and says that a batch takes as long as `seconds` says."""
    spec: dict[str, Any] = {
        "name": name,
        "inputs": [{"name": n, "dtype": "float32", "shape": ["batch", 2]} for n in inputs],
        "outputs": [{"name": output, "dtype": "float32", "shape": ["batch", 2]}],
    }
    cost = seconds or {1: 0.010, 2: 0.012, 4: 0.016, 8: 0.024}

    def call(tensors: Any) -> dict[str, Any]:
        if any((tensors[n] < 0).any() for n in inputs):
            raise InputError(f"{name} takes no negative numbers", fix="give others")
        return {output: sum(tensors[n] for n in inputs)}

    made = Engine(spec, lambda spec: call, list(cost), 2, fixed=False)
    made._seconds[((2,),) * len(inputs)] = cost
    return made


IMAGE, TEXT = engine("image_encoder", ["pixels"], "image"), engine("text_encoder", ["ids"], "text")
FUSION = engine("fusion", ["image", "text"], "logits")
BOTH = Plan("m", b"1", {"pixels": "image", "ids": "text"}, (IMAGE, TEXT, FUSION), frozenset({"logits"}))
LOOK = Plan("m", b"1", {"pixels": "image"}, (IMAGE,), frozenset({"image"}))


def source(name: str, value: float) -> Source:
    return Source(f"{name}{value}".encode(), {name: np.full((1, 2), value, np.float32)})


def sources(image: float, text: float | None = None) -> dict[str, Source]:
    given = {"image": source("pixels", image)}
    return given if text is None else given | {"text": source("ids", text)}


def scheduler(clock: Clock | None = None, **options: Any) -> Scheduler:
    return Scheduler(Options(**options), Metrics(), clock or Clock())


def sizes(made: Scheduler) -> list[tuple[str, int]]:
    """Run all that waits, on one stream -> component and rows of each batch."""
    ran = []
    while batch := made.next_batch()[0]:
        ran.append((batch[0].engine.name, len(batch)))
        made.run(0, batch)
    return ran


def counted(made: Scheduler, result: str, component: str = "image_encoder") -> float:
    return made.metrics.cache.labels("m", component, result)._value.get()


def test_one_batch_of_images_serves_two_kinds_of_requests() -> None:
    made = scheduler()
    asked = [made.submit(BOTH, sources(i, 10 + i)) for i in range(2)] + [made.submit(LOOK, sources(5))]
    assert sizes(made) == [("image_encoder", 3), ("text_encoder", 2), ("fusion", 2)]
    assert [f.result()["logits"][0, 0] for f in asked[:2]] == [10, 12]
    assert asked[2].result()["image"].tolist() == [[5, 5]]


def test_equal_inputs_are_encoded_once_in_flight_and_later() -> None:
    made = scheduler()
    first, second = made.submit(BOTH, sources(1, 2)), made.submit(BOTH, sources(1, 3))
    assert sizes(made) == [("image_encoder", 1), ("text_encoder", 2), ("fusion", 2)]
    third = made.submit(BOTH, {**sources(1), "text": source("ids", 4)})
    assert sizes(made) == [("text_encoder", 1), ("fusion", 1)]
    again = made.submit(BOTH, {"image": Source(b"pixels1"), "text": Source(b"ids4")})  # nothing to read again
    assert sizes(made) == []
    assert [f.result()["logits"][0, 0] for f in (first, second, third, again)] == [3, 4, 5, 5]
    assert (counted(made, "miss"), counted(made, "in_flight"), counted(made, "hit")) == (1, 1, 1)
    with pytest.raises(Absent, match="image"):
        made.submit(LOOK, {"image": Source(b"never seen")})
    assert made.submit(LOOK, sources(1)).done()


def test_without_a_cache_nothing_is_kept() -> None:
    made = scheduler(cache_mb=0)
    for _ in range(2):
        made.submit(LOOK, sources(1))
        assert sizes(made) == [("image_encoder", 1)]


def test_what_is_kept_is_bounded_and_the_least_used_goes() -> None:
    kept = Cache(2 * (16 + OVERHEAD))
    for key in (b"a", b"b"):
        kept.put(key, {"x": np.zeros(4, np.float32)})
    assert kept.get(b"a") is not None
    kept.put(b"c", {"x": np.zeros(4, np.float32)})
    kept.put(b"huge", {"x": np.zeros(400, np.float32)})
    assert [kept.get(key) is not None for key in (b"a", b"b", b"c", b"huge")] == [True, False, True, False]
    assert kept.used_bytes == 2 * (16 + OVERHEAD)


def test_the_latency_table_and_the_target_size_the_batch() -> None:
    for p99_ms, first in ((100, 8), (17, 4), (13, 2), (1, 8)):  # too late anyhow: most rows a second
        made = scheduler(p99_ms=p99_ms)
        for i in range(9):
            made.submit(LOOK, sources(i))
        assert sizes(made)[0] == ("image_encoder", first)
    slower = engine("image_encoder", ["pixels"], "image", {1: 0.010, 2: 0.020, 4: 0.060, 8: 0.160})
    made = scheduler()
    for i in range(4):
        made.submit(Plan("m", b"1", LOOK.origins, (slower,), LOOK.wanted), sources(i))
    assert [n for _, n in sizes(made)] == [1, 1, 1, 1]  # a batch that gains nothing is not made


def test_what_comes_after_counts_against_the_target() -> None:
    made = scheduler(p99_ms=25)  # 16 ms for four images, 10 for the fusion: too much
    for i in range(4):
        made.submit(BOTH, sources(i, i))
    assert sizes(made)[0] == ("image_encoder", 2)


def test_a_batch_waits_for_more_rows_only_as_long_as_it_is_told() -> None:
    clock = Clock()
    made = scheduler(clock, max_queue_delay_us=5000)
    made.submit(LOOK, sources(1))
    batch, wait = made.next_batch()
    assert not batch and wait == pytest.approx(0.005)
    clock.now += 0.002
    made.submit(LOOK, sources(2))
    assert made.next_batch()[1] == pytest.approx(0.003)
    clock.now += 0.004
    assert sizes(made) == [("image_encoder", 2)]
    for i in range(8):
        made.submit(LOOK, sources(10 + i))
    assert sizes(made) == [("image_encoder", 8)]  # full: no wait


def test_the_urgent_come_first_and_lift_what_they_share() -> None:
    made = scheduler(priority_levels=3, default_priority=2, max_batch_size=1)
    one = engine("image_encoder", ["pixels"], "image", {1: 0.010})
    plan = Plan("m", b"1", LOOK.origins, (one,), LOOK.wanted)
    order: list[str] = []
    for name, image, priority in (("default", 1, 0), ("low", 2, 3), ("high", 3, 1), ("lifted", 4, 3), ("lifts", 4, 1)):
        made.submit(plan, sources(image), priority).add_done_callback(lambda _, name=name: order.append(name))
    sizes(made)
    assert order == ["high", "lifted", "lifts", "default", "low"]


def test_answers_leave_in_order_when_asked_to() -> None:
    made = scheduler(preserve_ordering=True)
    order: list[int] = []
    for i, plan in enumerate((BOTH, LOOK, BOTH)):
        future = made.submit(plan, sources(i, i) if plan is BOTH else sources(i))
        future.add_done_callback(lambda _, i=i: order.append(i))
    sizes(made)
    assert order == [0, 1, 2]


def test_a_full_queue_rejects_with_a_time_to_come_back() -> None:
    made = scheduler(max_queue_size=2)
    made.submit(LOOK, sources(1)), made.submit(LOOK, sources(2))
    with pytest.raises(Rejected) as caught:
        made.submit(LOOK, sources(3))
    assert caught.value.retry_s >= 1
    sizes(made)
    made.submit(LOOK, sources(3))


def test_who_waits_too_long_or_has_gone_is_not_computed() -> None:
    clock = Clock()
    made = scheduler(clock, timeout_ms=1000)
    late, gone, patient = (made.submit(BOTH, sources(i, i), timeout_ms=t) for i, t in ((1, None), (2, None), (3, 0)))
    gone.cancel()
    clock.now += 2
    assert sizes(made) == [("image_encoder", 1), ("text_encoder", 1), ("fusion", 1)]
    assert patient.result()
    with pytest.raises(Expired):
        late.result(0)
    assert made.pending == 0 and not made._queues and not made.shared._in_flight


def test_a_component_that_fails_fails_those_that_need_it() -> None:
    made = scheduler()
    bad, good = made.submit(BOTH, sources(-1, 2)), None
    sizes(made)
    with pytest.raises(InputError, match="negative"):
        bad.result(0)
    good = made.submit(BOTH, sources(1, 2))
    sizes(made)
    assert good.result()["logits"].tolist() == [[3, 3]]
    assert made.pending == 0 and not made.shared._in_flight


def test_streams_answer_all_that_was_accepted_before_they_end() -> None:
    made = Scheduler(Options(streams=2), Metrics())
    made.start()
    found: list[float] = []

    def ask(start: int) -> None:
        asked = [made.submit(BOTH, sources(i % 7, i % 5)) for i in range(start, start + 200)]
        found.extend(f.result(10)["logits"][0, 0] for f in asked)

    threads = [threading.Thread(target=ask, args=(n,)) for n in (0, 200, 400)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = [made.submit(BOTH, sources(100 + i, i)) for i in range(50)]
    made.close()
    assert sorted(found) == sorted(float(i % 7 + i % 5) for i in range(600))
    assert [f.result(0)["logits"][0, 0] for f in last] == [100 + 2 * i for i in range(50)]
    with pytest.raises(Rejected, match="stopping"):
        made.submit(LOOK, sources(1))


def test_padding_is_counted() -> None:
    fixed = engine("image_encoder", ["pixels"], "image")
    fixed.fixed = True
    rows = [{"pixels": np.full((1, 2), i, np.float32)} for i in range(3)]
    made, elements, padding = fixed.run(0, rows)
    assert [r["image"][0, 0] for r in made] == [0, 1, 2]
    assert (elements, padding) == (8, 2)


def test_a_graph_that_mixes_its_rows_is_not_batched() -> None:
    spec: dict[str, Any] = {
        "name": "norm",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 2]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2]}],
    }
    made = Engine(spec, lambda spec: lambda t: {"y": t["x"] - t["x"].mean()}, [1, 2, 4], 1, fixed=False)
    made.learn({"x": np.array([[1, 5]], np.float32)})
    assert made.sizes == (1,)


@pytest.mark.parametrize(
    "options", [{"max_batch_size": 0}, {"p99_ms": 0}, {"priority_levels": 2, "default_priority": 3}]
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options(**options)
