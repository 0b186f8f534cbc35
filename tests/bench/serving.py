"""Goodput of the server's scheduler against two simpler ones, on mixed traffic, open loop.

    make bench-serve
    .venv/bin/python tests/bench/serving.py [BUNDLE] [--p99-ms 50] [--seconds 4]

Traffic: a third each of question + image, image alone (its encoding), text alone (its encoding), as tensors; requests
come when they come, whether or not earlier ones are answered: by a Poisson process, or in bursts (of 1 to 15, in a
Poisson process). Goodput is the highest rate at which 99 % of the requests of a run are answered within --p99-ms;
rejected ones count as not answered. It is searched by bisection, the policies in turn at each step, so that a drift of
the machine falls on all.

    fifo     batch 1, first in first out, all encoders and the fusion on each request, what is absent made up
    batch-1  batch 1, first in first out, absent encoders skipped
    edgemm   the server's defaults

All run the same code with the same bundle; the first two as the bundle is compiled: one stream with all threads, every
text as long as the longest, and nothing kept. `distinct`: no two requests have an image or a text in common;
`easy-VQA`: questions and images as drawn from its test split, where they return.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgemm import console
from edgemm.data.easy_vqa import samples
from edgemm.runtime.serving.model import Model
from edgemm.runtime.serving.options import Limits, Options
from edgemm.runtime.serving.service import Inference, Service
from edgemm.runtime.serving.work import Expired, Rejected

KINDS = (("image", "text"), ("image",), ("text",))
ALONE = {"streams": 1, "max_batch_size": 1, "cache_mb": 0}
POLICIES: dict[str, dict[str, Any]] = {"fifo": ALONE, "batch-1": ALONE, "edgemm": {}}
BURST = 15  # requests at the most
STEPS = 6  # of the bisection
SEED = 20261128
Tensors = dict[str, np.ndarray[Any, Any]]
Ask = Callable[[Tensors], Awaitable[None]]


class Traffic:
    """Requests without end. all_encoders: none lacks a modality; longest: texts as long as the bundle has them."""

    def __init__(self, model: Model, distinct: bool) -> None:
        self.rng, self.distinct = np.random.default_rng(SEED), distinct
        drawn = [samples("test")[i] for i in self.rng.permutation(9_673)[:512]]
        self.images = [model.medium("image", s.image.read_bytes()) for s in drawn]
        self.texts = [model.medium("text", s.text) for s in drawn]
        self.ids = model.text["ids"] if model.text else ""
        self.most = model.text["max_tokens"] if model.text else 0
        self.high = model.tokenizer.get_vocab_size() if model.tokenizer else 1
        self.count = itertools.count(1)

    def request(self, all_encoders: bool, longest: bool) -> Tensors:
        kind = KINDS[self.rng.integers(len(KINDS))]
        i = int(self.rng.integers(len(self.images)))
        tensors: Tensors = {}
        if "image" in kind or all_encoders:
            tensors |= {n: v + 1e-6 * next(self.count) if self.distinct else v for n, v in self.images[i].items()}
        if "text" in kind or all_encoders:
            tensors |= self.texts[i]
            if self.distinct:
                ids = tensors[self.ids]
                tensors[self.ids] = np.where(ids > 4, self.rng.integers(5, self.high, ids.shape), ids)
        if longest and self.ids in tensors:
            missing = self.most - tensors[self.ids].shape[1]
            tensors = {n: np.pad(v, ((0, 0), (0, missing))) if v.ndim == 2 else v for n, v in tensors.items()}
        return {n: v.astype(np.float32) if v.dtype.kind == "f" else v for n, v in tensors.items()}

    def gaps(self, rate: float, bursty: bool) -> Iterator[float]:
        """Seconds until each next request."""
        while True:
            size = int(self.rng.integers(1, BURST + 1)) if bursty else 1
            yield float(self.rng.exponential((1 + BURST) / 2 / rate if bursty else 1 / rate))
            yield from itertools.repeat(0.0, size - 1)


async def answered(ask: Ask, traffic: Traffic, rate: float, bursty: bool, name: str, arguments: Any) -> Any:
    """(share answered in time, p50 and p99 in seconds) of one run."""
    loop, p99_s = asyncio.get_running_loop(), arguments.p99_ms / 1e3
    gaps, times, requests = traffic.gaps(rate, bursty), [], []
    made = [traffic.request(name == "fifo", name != "edgemm") for _ in range(round(rate * arguments.seconds))]

    async def one(tensors: Tensors, due: float) -> None:
        try:
            await ask(tensors)
            times.append(loop.time() - due)
        except (Rejected, Expired):
            times.append(float("inf"))

    due = loop.time()
    for tensors in made:
        due += next(gaps)
        if (wait := due - loop.time()) > 0:
            await asyncio.sleep(wait)
        requests.append(asyncio.ensure_future(one(tensors, due)))
        if len(requests) % 64 == 0 and sum(r.done() for r in requests) < len(requests) - 4 * rate * p99_s - 64:
            for request in requests:  # hopelessly late: the answer to this rate is known
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            return 0.0, float("inf"), float("inf")
    await asyncio.gather(*requests)
    found = np.array(times)
    return float((found <= p99_s).mean()), *np.quantile(found, [0.5, 0.99]).tolist()


async def compare(
    asks: dict[str, Ask], traffic: Traffic, arguments: argparse.Namespace, bursty: bool
) -> dict[str, Any]:
    """Goodput of each policy, by bisection between rates that are kept and rates that are not."""
    span = {name: [20.0, 3000.0] for name in asks}
    best: dict[str, Any] = {name: {"goodput_rps": 0.0} for name in asks}
    for _ in range(arguments.steps):
        for name, ask in asks.items():
            rate = float(np.sqrt(span[name][0] * span[name][1]))
            share, p50, p99 = await answered(ask, traffic, rate, bursty, name, arguments)
            kept = share >= 0.99
            span[name][0 if kept else 1] = rate
            if kept:
                best[name] = {"goodput_rps": round(rate), "p50_ms": round(p50 * 1e3, 2), "p99_ms": round(p99 * 1e3, 2)}
    for name in asks:
        best[name]["ratio_to_fifo"] = round(best[name]["goodput_rps"] / max(1, best["fifo"]["goodput_rps"]), 2)
    return best


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("out/x86-openvino/reasoner-x86-openvino.edgemm")
    parser.add_argument("bundle", type=Path, nargs="?", default=default)
    parser.add_argument("--p99-ms", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", choices=["distinct", "easy-VQA"])
    parser.add_argument("--set", action="append", default=[], help="NAME=NUMBER of the server's options")
    arguments = parser.parse_args()
    changes = {k: json.loads(v) for k, v in (s.split("=") for s in arguments.set)}
    services = {}
    for name, options in POLICIES.items():
        chosen = options | {"p99_ms": arguments.p99_ms} | (changes if name == "edgemm" else {})
        services[name] = Service([arguments.bundle], Options(**chosen), Limits())
        services[name].load()

    def ask_of(service: Service) -> Ask:
        model = next(iter(service.models.values()))

        async def ask(tensors: Tensors) -> None:
            await service.infer(model, Inference(tensors, [], {}))

        return ask

    asks = {name: ask_of(service) for name, service in services.items()}
    model = next(iter(services["edgemm"].models.values()))
    for distinct in (True, False):
        if arguments.only and (arguments.only == "distinct") != distinct:
            continue
        traffic = Traffic(model, distinct)
        for bursty in (False, True):
            found = await compare(asks, traffic, arguments, bursty)
            found["edgemm"]["ratio_to_batch_1"] = round(
                found["edgemm"]["goodput_rps"] / max(1, found["batch-1"]["goodput_rps"]), 2
            )
            label = {"inputs": "distinct" if distinct else "easy-VQA", "arrivals": "bursts" if bursty else "Poisson"}
            console.result_line(label | found)
    for service in services.values():
        service.close()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
