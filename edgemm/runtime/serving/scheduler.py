"""Which component runs next, on which rows: requests become tasks, tasks of a kind become batches.

A request asks for tensors. What is not known of them is computed by a task for each component on the way. Tasks with
equal inputs are one task, whichever requests they come from, and what a task made is kept for the next. Tasks of one
component and one shape wait in a queue by priority and deadline; a stream that is free takes the queue whose first task
is the most urgent, and as many tasks as the component's latency table says keep that one in time (see engine.py).

Protocols and streams meet under one lock, which is never held while a component runs.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import structlog

from edgemm.errors import EdgemmError
from edgemm.runtime.query import Array, Tensors
from edgemm.runtime.serving.engine import Engine
from edgemm.runtime.serving.metrics import Metrics
from edgemm.runtime.serving.options import Options
from edgemm.runtime.serving.shared import Shared
from edgemm.runtime.serving.work import Expired, Failed, Job, Plan, Rejected, Source, Task, Urgency

Queue = list[tuple[Urgency, int, Task]]  # a heap; a task that became more urgent is in it twice

log = structlog.get_logger("edgemm.serve")


class Scheduler:
    """Runs the rows of any number of models on `options.streams` streams.

    clock   seconds, monotonic
    """

    def __init__(self, options: Options, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self.metrics, self.clock = options, metrics, clock
        self.shared = Shared(options.cache_mb * 1_000_000, metrics, self._hurry)
        self._changed = threading.Condition()
        self._queues: dict[tuple[Engine, Any], Queue] = {}
        self._order: dict[str, deque[Job]] = defaultdict(deque)
        self._count = itertools.count()
        self._jobs, self._idle, self._closing, self._patient = 0, 0, False, options.max_queue_delay_us > 0
        self._streams = [
            threading.Thread(target=self._stream, args=(n,), name=f"stream-{n}", daemon=True)
            for n in range(options.streams)
        ]

    def start(self) -> None:
        for stream in self._streams:
            stream.start()

    def hurry(self) -> None:
        """From now on no batch waits to grow."""
        with self._changed:
            self._patient = False
            self._changed.notify_all()

    def close(self) -> None:
        """Refuse what comes, answer what was accepted, end the streams."""
        with self._changed:
            self._closing, self._patient = True, False
            self._changed.notify_all()
        for stream in self._streams:
            if stream.is_alive():
                stream.join()

    @property
    def pending(self) -> int:
        """Rows that wait or run."""
        return self._jobs

    def submit(
        self, plan: Plan, sources: Mapping[str, Source], priority: int = 0, timeout_ms: float | None = None
    ) -> Future[dict[str, Array]]:
        """Accept one row; its future gives the wanted tensors, each [1, ...], which are not to be written to.

        priority    1 is the most urgent, 0 the default;  timeout_ms  None is the default, 0 no limit
        Raises Rejected when there is no room, Absent when a source's tensors are needed and not given. The future
        raises Expired, Failed, or the EdgemmError of a component that refuses it.
        """
        options, now = self.options, self.clock()
        level = priority if priority and options.priority_levels else options.default_priority
        limit = options.timeout_ms if timeout_ms is None else timeout_ms
        expires = now + limit / 1e3 if limit else float("inf")
        job = Job(plan, min(level, max(1, options.priority_levels)), now + options.p99_ms / 1e3, expires, now)
        with self._changed:
            if self._closing:
                raise Rejected("the server is stopping", 1)
            if self._jobs >= options.max_queue_size:
                self.metrics.rejects.labels(plan.model, "queue_full").inc()
                raise Rejected(f"{self._jobs} requests are waiting or running", self._backlog_s())
            ready = self.shared.expand(job, sources)
            self._jobs += 1
            self.metrics.waiting.set(self._jobs)
            if options.preserve_ordering:
                self._order[plan.model].append(job)
            for task in ready:
                self._enqueue(task, now)
            if not job.pending:
                self._settle(job)
        return job.future

    def _hurry(self, task: Task) -> None:
        """A task that may wait has become more urgent."""
        if task.waiting:
            heapq.heappush(self._queue(task), (task.urgency, next(self._count), task))

    def _queue(self, task: Task) -> Queue:
        return self._queues.setdefault((task.engine, task.engine.shape(task.inputs)), [])

    def _enqueue(self, task: Task, now: float) -> None:
        task.waiting, task.queued = True, now
        heapq.heappush(self._queue(task), (task.urgency, next(self._count), task))
        self._changed.notify()

    def _stream(self, number: int) -> None:
        while (batch := self._take()) is not None:
            self.run(number, batch)

    def run(self, stream: int, batch: list[Task]) -> None:
        """Run a batch, and hand what it made to those that wait for it."""
        engine = batch[0].engine
        labels = batch[0].jobs[0].plan.model, engine.name
        begin = self.clock()
        for task in batch:
            self.metrics.queue.labels(*labels).observe(begin - task.queued)
            self.metrics.rows.labels(*labels, task.jobs[0].plan.signature).inc()
        rows: Sequence[Tensors] | EdgemmError | Failed
        try:
            rows, elements, padding = engine.run(stream, [task.inputs for task in batch])
        except EdgemmError as e:
            rows, elements, padding = e, 0, 0
        except (RuntimeError, ValueError, MemoryError) as e:  # what native libraries raise; the stream goes on
            log.error("component failed", component=engine.name, error=str(e)[:1000])
            rows, elements, padding = Failed(f"{engine.name} failed; the server's log says why"), 0, 0
        self.metrics.compute.labels(*labels).observe(self.clock() - begin)
        self.metrics.batch.labels(*labels).observe(len(batch))
        self.metrics.elements.labels(*labels).inc(elements)
        self.metrics.padding.labels(*labels).inc(padding)
        with self._changed:
            for i, task in enumerate(batch):
                self._finish(task, rows if isinstance(rows, EdgemmError | Failed) else rows[i])
            self.metrics.kept.set(self.shared.cache.used_bytes)

    def _take(self) -> list[Task] | None:
        """Wait for the next batch; None when the server has stopped and all is answered."""
        with self._changed:
            while True:
                batch, wait = self.next_batch()
                if batch:
                    return batch
                if self._closing and not self._jobs:
                    self._changed.notify_all()
                    return None
                self._idle += 1
                self._changed.wait(wait)
                self._idle -= 1

    def next_batch(self) -> tuple[list[Task], float | None]:
        """Take the most urgent batch, or say in how many seconds one is worth looking for (None: when one comes)."""
        now, best, wait = self.clock(), None, None
        for place, queue in list(self._queues.items()):
            while queue and not self._alive(queue[0], now):
                heapq.heappop(queue)
            if not queue:
                del self._queues[place]
            elif (hold := self._hold(place, queue, now)) > 0:
                wait = min(hold, wait or hold)
            elif best is None or queue[0][0] < self._queues[best][0][0]:
                best = place
        if best is None:
            return [], wait
        (engine, shape), queue = best, self._queues[best]
        first = queue[0][2]
        share = -(-len(queue) // (1 + self._idle))  # streams that are free take their part
        slack = first.urgency[1] - now - first.rest_s
        size = engine.batch_for(shape, share, slack)
        batch: list[Task] = []
        while queue and len(batch) < size:
            entry = heapq.heappop(queue)
            if self._alive(entry, now):
                entry[2].waiting = False
                batch.append(entry[2])
        return batch, None

    def _hold(self, place: tuple[Engine, Any], queue: Queue, now: float) -> float:
        """Seconds that this queue may still wait for its batch to grow."""
        if not self._patient or len(queue) >= place[0].sizes[-1]:
            return 0.0
        oldest = min(entry[2].queued for entry in queue)
        return oldest + self.options.max_queue_delay_us / 1e6 - now

    def _alive(self, entry: tuple[Urgency, int, Task], now: float) -> bool:
        """Whether a task of a queue is to be run; one that nobody waits for any more is dropped."""
        task = entry[2]
        if not task.waiting:
            return False
        if any([job.wanted_now(now) for job in task.jobs]):
            return True
        self._drop(task)
        return False

    def _drop(self, task: Task) -> None:
        task.waiting = False
        self.shared.forget(task)
        for job in task.jobs:
            self._settle(job)
        for dependent in task.dependents:
            self._drop(dependent)

    def _finish(self, task: Task, outputs: Tensors | EdgemmError | Failed) -> None:
        if isinstance(outputs, EdgemmError | Failed):
            for job in task.jobs:
                job.error = job.error or outputs
            self._drop(task)
            return
        self.shared.done(task, outputs)
        now = self.clock()
        for dependent in task.dependents:
            dependent.read(task, outputs)
            if not dependent.producers and self.shared.running(dependent):
                self._enqueue(dependent, now)
        for job in task.answers:
            job.found.update({name: outputs[name] for name in job.plan.wanted & task.engine.outputs.keys()})
            job.pending -= 1
            if not job.pending:
                self._settle(job)

    def _settle(self, job: Job) -> None:
        """The job is over: answered, failed, expired or cancelled."""
        if job.settled:
            return
        job.settled = True
        self._jobs -= 1
        self.metrics.waiting.set(self._jobs)
        if not self.options.preserve_ordering:
            self._release([job])
            return
        order, over = self._order[job.plan.model], []
        while order and order[0].settled:
            over.append(order.popleft())
        self._release(over)

    def _release(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            try:
                if job.error is not None:
                    self.metrics.rejects.labels(job.plan.model, _reason(job.error)).inc()
                    job.future.set_exception(job.error)
                else:
                    took = self.clock() - job.arrived
                    self.metrics.latency.labels(job.plan.model, job.plan.signature).observe(took)
                    job.future.set_result(job.found)
            except InvalidStateError:  # cancelled: the client has gone
                self.metrics.rejects.labels(job.plan.model, "cancelled").inc()

    def _backlog_s(self) -> float:
        """How long what waits in the queues will take."""
        waiting = sum(engine.row_s(shape) * len(queue) for (engine, shape), queue in self._queues.items())
        return waiting / self.options.streams


def _reason(error: Exception) -> str:
    return "timeout" if isinstance(error, Expired) else "failed"
