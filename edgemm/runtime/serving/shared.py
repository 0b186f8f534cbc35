"""What is computed once: tasks that several requests wait for, and what is kept of those that are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgemm.runtime.query import Array, Tensors
from edgemm.runtime.serving.cache import Cache
from edgemm.runtime.serving.engine import Engine
from edgemm.runtime.serving.metrics import Metrics
from edgemm.runtime.serving.work import Absent, Job, Plan, Source, Task


class Shared:
    """Tasks by key. Not thread-safe: the scheduler's lock holds it.

    hurry   is told of a task that became more urgent
    """

    def __init__(self, cache_bytes: int, metrics: Metrics, hurry: Callable[[Task], None]) -> None:
        self.cache, self.metrics, self._hurry = Cache(cache_bytes), metrics, hurry
        self._in_flight: dict[bytes, Task] = {}

    def running(self, task: Task) -> bool:
        """Whether the task is still to be done."""
        return self._in_flight.get(task.key) is task

    def forget(self, task: Task) -> None:
        """The task will not be done."""
        if self.running(task):
            del self._in_flight[task.key]

    def done(self, task: Task, outputs: Mapping[str, Array]) -> None:
        self.forget(task)
        self.cache.put(task.key, outputs)

    def expand(self, job: Job, sources: Mapping[str, Source]) -> list[Task]:
        """Make the job's tasks, or join those that are there -> new ones that can run.

        Raises Absent for a source that has to be read, before anything is changed.
        """
        plan = job.plan
        known: dict[Engine, Tensors | Task | None] = {}
        keys = {engine: plan.key(engine, sources) for engine in plan.engines}
        pending = {plan.makers[name] for name in plan.wanted}
        while pending:  # from the answer back to what is known; None is what must be computed
            engine = pending.pop()
            known[engine] = self.cache.get(keys[engine]) or self._in_flight.get(keys[engine])
            if known[engine] is None:
                for name in engine.inputs:
                    if name in plan.makers:
                        pending |= {plan.makers[name]} - known.keys()
                    elif sources[plan.origins[name]].tensors is None:
                        raise Absent(plan.origins[name])
        ready = []
        for engine in plan.engines:
            if engine in known:
                found = known[engine]
                result = "miss" if found is None else "in_flight" if isinstance(found, Task) else "hit"
                self.metrics.cache.labels(plan.model, engine.name, result).inc()
                if found is None:
                    found = known[engine] = self._task(engine, plan, keys[engine], known, sources)
                    if not found.producers:
                        ready.append(found)
                for name in plan.wanted & engine.outputs.keys():
                    if not isinstance(found, Task):
                        job.found[name] = found[name]
                    elif job not in found.answers:
                        found.answers.append(job)
                        job.pending += 1
                        self._join(found, job)
        return ready

    def _task(
        self,
        engine: Engine,
        plan: Plan,
        key: bytes,
        known: Mapping[Engine, Tensors | Task | None],
        sources: Mapping[str, Source],
    ) -> Task:
        task = self._in_flight[key] = Task(engine, key, plan.rest_s[engine])
        for name in engine.inputs:
            maker = plan.makers.get(name)
            if maker is None:
                task.inputs[name] = (sources[plan.origins[name]].tensors or {})[name]
            elif not isinstance(producer := known[maker], Task):
                task.inputs[name] = (producer or {})[name]
            elif producer not in task.producers:
                task.producers.append(producer)
                producer.dependents.append(task)
        return task

    def _join(self, task: Task, job: Job) -> None:
        """Let the job wait for a task, which becomes as urgent as the job, as does what it reads from."""
        if job in task.jobs:
            return
        task.jobs.append(job)
        if (urgency := (job.priority, job.deadline)) < task.urgency:
            task.urgency = urgency
            self._hurry(task)
        for producer in task.producers:
            self._join(producer, job)
