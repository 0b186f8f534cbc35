"""What the scheduler handles: requests' rows as jobs, and the components that they need as tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

from edgemm.runtime.query import Array, Tensors
from edgemm.runtime.serving.engine import Engine

Urgency = tuple[int, float]  # priority, deadline: the smaller is the more urgent
LEAST_URGENT: Urgency = (1 << 30, float("inf"))


class Rejected(Exception):
    """The queue is full, or the server stops: try again after `retry_s` seconds."""

    def __init__(self, why: str, retry_s: float) -> None:
        super().__init__(why)
        self.retry_s = max(1.0, retry_s)


class Expired(Exception):
    """The request's time was over before it was answered."""


class Failed(Exception):
    """A component could not run, and the request is not to blame."""


class Absent(Exception):
    """The named source has to be read: nothing that was made of it is kept."""


@dataclass(frozen=True, slots=True)
class Source:
    """A medium of a request: what identifies it, and its tensors [1, ...] where they are at hand."""

    digest: bytes
    tensors: Mapping[str, Array] | None = None


@dataclass(frozen=True)
class Plan:
    """How a request with these sources is answered: by which components, in which order.

    model, bundle  the model's name, and what tells its bundle from every other
    origins        tensor -> the source that has it
    engines        components that run, each after those that it reads from
    wanted         tensors that answer
    """

    model: str
    bundle: bytes
    origins: Mapping[str, str]
    engines: Sequence[Engine]
    wanted: frozenset[str]

    @cached_property
    def signature(self) -> str:
        """The modalities that are there: what requests are counted by."""
        return "+".join(sorted(set(self.origins.values())))

    @cached_property
    def makers(self) -> dict[str, Engine]:
        return {output: engine for engine in self.engines for output in engine.outputs}

    @cached_property
    def sources(self) -> dict[Engine, frozenset[str]]:
        """The sources that each component's outputs depend on."""
        found: dict[Engine, frozenset[str]] = {}
        for engine in self.engines:
            behind = [found[self.makers[n]] if n in self.makers else {self.origins[n]} for n in engine.inputs]
            found[engine] = frozenset().union(*behind)
        return found

    @cached_property
    def rest_s(self) -> dict[Engine, float]:
        """What is to come after each component, for one row alone."""
        rest = dict.fromkeys(self.engines, 0.0)
        for engine in reversed(self.engines):
            for producer in {self.makers[n] for n in engine.inputs if n in self.makers}:
                rest[producer] = max(rest[producer], rest[engine] + engine.fastest_s)
        return rest

    def key(self, engine: Engine, sources: Mapping[str, Source]) -> bytes:
        """The same for equal inputs of the same component."""
        behind = sorted(self.sources[engine])
        parts = [self.bundle, engine.name.encode(), *(n.encode() + b"\0" + sources[n].digest for n in behind)]
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()


@dataclass(eq=False, slots=True)
class Job:
    """One row of a request. `pending`: tasks that it still waits for; `expires`, `deadline`, `arrived`: seconds."""

    plan: Plan
    priority: int
    deadline: float
    expires: float
    arrived: float
    future: Future[dict[str, Array]] = field(default_factory=Future)
    found: dict[str, Array] = field(default_factory=dict)
    pending: int = 0
    error: Exception | None = None
    settled: bool = False

    def wanted_now(self, now: float) -> bool:
        """Whether someone still waits for it; one that is too late gets its error."""
        if self.error is None and now > self.expires:
            self.error = Expired("the request's time was over before it was answered")
        return self.error is None and not self.settled and not self.future.cancelled()


@dataclass(eq=False, slots=True)
class Task:
    """A component on one row.

    jobs       those that need it, directly or not;  answers  those that want tensors which it makes
    producers  tasks that it reads from and that are not done;  dependents  tasks that read from it
    waiting    in a queue, since `queued`, seconds;  rest_s  what comes after it
    """

    engine: Engine
    key: bytes
    rest_s: float
    inputs: dict[str, Array] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    answers: list[Job] = field(default_factory=list)
    producers: list[Task] = field(default_factory=list)
    dependents: list[Task] = field(default_factory=list)
    urgency: Urgency = LEAST_URGENT
    waiting: bool = False
    queued: float = 0.0

    def read(self, producer: Task, outputs: Tensors) -> None:
        """Take what a producer made."""
        self.inputs.update({name: outputs[name] for name in self.engine.inputs if name in producer.engine.outputs})
        self.producers.remove(producer)
