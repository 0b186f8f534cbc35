"""Token by token from a decoder with a key/value cache: greedy and beam search, for one sample.

Equal to transformers' generate with do_sample=False and early_stopping=False; the beam search follows its
generation/utils.py:_beam_search. The cache goes from the decoder's outputs to its next inputs as it is, so `call`
may return its own buffers if it does not write to them while they are its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import InputError

Tensors = Mapping[str, NDArray[Any]]
Call = Callable[[Tensors], Mapping[str, NDArray[Any]]]


def tokens(
    call: Call, component: dict[str, Any], spec: dict[str, Any], known: Tensors, prompt: Sequence[int]
) -> Iterator[int]:
    """The ids that follow `prompt` as they are made, without it and without the one that ends the text.

    A beam search makes all of them before the first is given.

    call       the compiled decoder: named arrays to named arrays
    component  its ComponentSpec; `max_sizes` of the cache's axis is the most positions that the decoder has
    spec       program.json's `output` of kind generation, see program.Generation
    known      what earlier components made of one sample (batch 1), by name

    Raises InputError when the prompt leaves no position for an answer.
    """
    decoder, limit = _Decoder(call, component, spec, known), _limit(component, spec, prompt)
    if spec["beams"] > 1:
        yield from _beam_search(decoder, limit, prompt)
        return
    ids = np.array([prompt], np.int64)
    for step in range(limit):
        token = int(decoder.suppress(decoder.step(ids).copy(), step).argmax())
        if token in spec["eos"]:
            return
        yield token
        ids = np.array([[token]], np.int64)


def generate(
    call: Call, component: dict[str, Any], spec: dict[str, Any], known: Tensors, prompt: Sequence[int]
) -> list[int]:
    """All that `tokens` gives, of the same arguments."""
    return list(tokens(call, component, spec, known, prompt))


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """A text that grows -> what is new in it, once it will not change: joined, the last of `texts`.

    A word of ASCII is held back until the next begins, as decoders of word pieces join "don" and "'t" late, and so is
    the sign for bytes that make no letter yet.
    """
    given = text = ""
    for text in texts:
        end = len(text) if text and not text[-1].isascii() and text[-1] != "\ufffd" else text.rfind(" ")
        if end > len(given) and text.startswith(given):
            yield text[len(given) : end]
            given = text[:end]
    if text != given:
        yield text[len(given) :]


def _limit(component: dict[str, Any], spec: dict[str, Any], prompt: Sequence[int]) -> int:
    """How many tokens may be made: at most `max_new_tokens`, and as many as there are positions left."""
    axis = next(p["shape"][2] for p in component["inputs"] if p["name"] == spec["cache"][0][0])
    positions = component["max_sizes"][axis]
    if len(prompt) >= positions:
        raise InputError(
            f"the prompt has {len(prompt)} tokens", fix=f"the model has {positions} positions: give a shorter text"
        )
    return int(min(spec["max_new_tokens"], positions - len(prompt)))


class _Decoder:
    """The decoder's inputs between two calls, the cache among them. Its first slot is empty and hidden by the mask."""

    def __init__(self, call: Call, component: dict[str, Any], spec: dict[str, Any], known: Tensors) -> None:
        self.call, self.spec, self.length = call, spec, 0
        self.suppressed = [np.array(spec[key], np.int64) for key in ("suppress", "suppress_first")]
        shapes = {port["name"]: port["shape"] for port in component["inputs"]}
        own = {spec["ids"], spec["positions"], spec["mask"]}
        caches = {past: np.zeros((1, shapes[past][1], 1, shapes[past][3]), np.float32) for past, _ in spec["cache"]}
        self.constant = {name: known[name] for name in shapes.keys() - own - caches.keys()}
        self.inputs: dict[str, NDArray[Any]] = {**self.constant, **caches}

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """int64[B,T] the tokens that come next -> float32[B,V] logits of what follows them."""
        start, self.length = self.length, self.length + ids.shape[1]
        mask = np.ones((len(ids), 1 + self.length), np.int64)
        mask[:, 0] = 0
        positions = np.tile(np.arange(start, self.length, dtype=np.int64), (len(ids), 1))
        self.inputs |= {self.spec["ids"]: ids, self.spec["positions"]: positions, self.spec["mask"]: mask}
        made = self.call(self.inputs)
        self.inputs |= {past: made[present] for past, present in self.spec["cache"]}
        return made[self.spec["logits"]]

    def suppress(self, scores: NDArray[np.float32], step: int) -> NDArray[np.float32]:
        """`scores` float32[B,V], where the tokens that may not be made in this step become -inf."""
        for ids in self.suppressed if step == 0 else self.suppressed[:1]:
            scores[:, ids[ids < scores.shape[1]]] = -np.inf
        return scores

    def select(self, rows: NDArray[np.int64]) -> None:
        """Go on with these rows of the batch, in this order; one may be there several times."""
        for past, _ in self.spec["cache"]:
            self.inputs[past] = self.inputs[past][rows]
        for name, value in self.constant.items():
            if len(self.inputs[name]) != len(rows):
                self.inputs[name] = np.repeat(value, len(rows), axis=0)


def _beam_search(decoder: _Decoder, limit: int, prompt: Sequence[int]) -> list[int]:
    spec, eos = decoder.spec, set(decoder.spec["eos"])
    beams, candidates = spec["beams"], spec["beams"] * (1 + len(eos))
    running: list[list[int]] = [[]]
    totals = np.zeros(1, np.float32)  # log probability of each running sequence, the best first
    finished: list[tuple[float, list[int]]] = []  # score and sequence, the best first
    ids = np.array([prompt], np.int64)
    for length in range(1, limit + 1):
        scores = decoder.suppress(_log_softmax(decoder.step(ids)), length - 1) + totals[:, None]
        best = _largest(scores.ravel(), candidates)
        rows, chosen = np.divmod(best, scores.shape[1])
        values = scores.ravel()[best]
        sequences = [[*running[r], t] for r, t in zip(rows.tolist(), chosen.tolist(), strict=True)]
        ends = [length == limit or sequence[-1] in eos for sequence in sequences]
        # Only the best `beams` may finish; the other candidates are there to go on with.
        finished += [
            (float(v / length ** spec["length_penalty"]), s)
            for v, s, end in zip(values[:beams], sequences, ends, strict=False)
            if end
        ]
        finished = sorted(finished, key=lambda f: -f[0])[:beams]
        alive = np.flatnonzero(~np.array(ends))[:beams]
        if not len(alive):
            break
        running, totals = [sequences[k] for k in alive], values[alive]
        if len(finished) == beams and float(totals[0] / length ** spec["length_penalty"]) <= finished[-1][0]:
            break  # the best that runs would not be among the best that ended
        decoder.select(rows[alive])
        ids = chosen[alive][:, None]
    best_sequence = finished[0][1]
    return best_sequence[:-1] if best_sequence[-1] in eos else best_sequence


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _largest(values: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Indices of the `n` largest, the largest first."""
    part = np.argpartition(-values, n)[:n] if n < len(values) else np.arange(len(values))
    return part[np.argsort(-values[part], kind="stable")]
