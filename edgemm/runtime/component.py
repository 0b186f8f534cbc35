"""One graph of a model: compiled when it is first needed, and once for all sessions and threads that run it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

from edgemm.runtime.query import Array, Call, Tensors

Compile = Callable[[dict[str, Any]], Call]


@runtime_checkable
class Shared(Protocol):
    """A call that is one of several over the same compiled graph; only one thread at a time may be in each of them."""

    def another(self) -> Call: ...


class Component:
    """One entry of program.json's `components`, with what runs it.

    spec       the entry
    compile_   makes a call of it, when it is first run, and again for each thread more where that is not Shared
    """

    def __init__(self, spec: dict[str, Any], compile_: Compile) -> None:
        self.spec = spec
        self._compile = compile_
        self._first: Call | None = None
        self._idle: list[Call] = []
        self._lock = threading.Lock()

    def __call__(self, tensors: Tensors) -> dict[str, Array]:
        """Run it, from any thread -> its outputs, which are the caller's own."""
        with self.call() as run:
            return {name: value.copy() for name, value in run(tensors).items()}

    @contextmanager
    def call(self) -> Iterator[Call]:
        """A call for this thread alone: what it returns is its own memory, valid until it is called again."""
        run = self._take()
        try:
            yield run
        finally:
            with self._lock:
                self._idle.append(run)

    def load(self) -> None:
        """Compile it, if that was not done yet."""
        with self.call():
            pass

    @property
    def loaded(self) -> bool:
        """Whether it was compiled yet."""
        return self._first is not None

    def _take(self) -> Call:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if isinstance(self._first, Shared):
                return self._first.another()
            self._first = self._compile(self.spec)
            return self._first


class Components(dict[str, Component]):
    """The components of a model by name, in the order they run.

    Several may make the same tensor: the first whose inputs are there does, so that a model has one graph for each
    set of modalities that it can be given, and the rest of it once.

    origins   the modalities without which each one can't run
    joint     those that hang on which modalities there are, and so wait until all of a query's are encoded: whoever
              makes what something before makes, too, takes what several make, or takes what such a one makes
    ports     names of the tensors that each one takes, but for a state of its own, and makes
    sources   modality -> the tensors that its pre-processing makes
    """

    def __init__(self, specs: Sequence[dict[str, Any]], sources: Mapping[str, set[str]], compile_: Compile) -> None:
        super().__init__((spec["name"], Component(spec, compile_)) for spec in specs)
        self.sources = sources
        self.ports: dict[str, tuple[set[str], set[str]]] = {}
        for spec in specs:
            inputs, outputs = ({port["name"] for port in spec[side]} for side in ("inputs", "outputs"))
            self.ports[spec["name"]] = inputs - set(spec.get("state") or ()), outputs
        self.origins: dict[str, set[str]] = {}
        of = {tensor: {modality} for modality, tensors in sources.items() for tensor in tensors}
        made = Counter(chain(of, *(outputs for _, outputs in self.ports.values())))
        hanging, before, self.joint = {tensor for tensor, times in made.items() if times > 1}, set(of), set[str]()
        for name, (inputs, outputs) in self.ports.items():
            if hanging & inputs or before & outputs:
                self.joint.add(name)
                hanging |= outputs
            before |= outputs
            found = set().union(*(of.get(tensor, set()) for tensor in inputs))
            self.origins[name] = found
            of |= {tensor: found & of.get(tensor, found) for tensor in outputs}
        self.nobodys = set().union(*(inputs for inputs, _ in self.ports.values())) - before

    def load(self, modalities: set[str]) -> None:
        """Compile what runs when these are there, side by side."""
        known = self.nobodys.union(*(self.sources[m] for m in modalities))
        needed = []
        for name, (inputs, outputs) in self.ports.items():
            if inputs <= known and not outputs <= known:
                known |= outputs
                needed.append(self[name])
        needed = [component for component in needed if not component.loaded]
        if len(needed) > 1:
            with ThreadPoolExecutor() as pool:
                list(pool.map(Component.load, needed))


_LOADED: WeakValueDictionary[str, Components] = WeakValueDictionary()
_LOCK = threading.Lock()


def components(
    specs: Sequence[dict[str, Any]], sources: Mapping[str, set[str]], compile_: Compile, sha256: str | None
) -> Components:
    """Those of a model; those that a living session has already, where `sha256` is that of the same bundle."""
    made = Components(specs, sources, compile_)
    if sha256 is None:
        return made
    with _LOCK:
        return _LOADED.setdefault(sha256, made)
