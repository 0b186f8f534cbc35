"""So many heads or units stay in each layer: what `search` has found, or a user has written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from edgemm.errors import InputError
from edgemm.models._hidden_units import that_run
from edgemm.pruners._calibration import grams, repair
from edgemm.pruners._scores import fisher
from edgemm.yaml_files import Strict


class Options(Strict):
    """`keep`: name of an attention layer or a block with hidden units -> how many of its heads or units stay.

    Those stay without which the answers would lose most (score: fisher of `attention_heads` and `neurons`).
    repair  correct what reads those that stay by least squares on the calibration data
    """

    keep: dict[str, int] = Field(min_length=1)
    repair: bool = True


def prune(
    family: ModuleType, model: Any, run: Callable[[], object], options: Options
) -> dict[str, tuple[list[float], list[int]]]:
    """Shrink each named layer in place -> name: (scores of all its heads or units, those kept).

    run   passes the calibration data through the model once
    Raises InputError for a name that the model has not, and a number that its layer can't keep.
    """
    layers = shrinkable(family, model)
    for name, number in options.keep.items():
        if name not in layers:
            raise InputError(f"widths: no layer {name!r} that could shrink", fix=f"keep: {', '.join(layers)}")
        units = layers[name].units
        if not 1 <= number <= units:
            raise InputError(f"widths: keep.{name} = {number}: it has {units}", fix=f"1 to {units}")
    wanted = {name: layers[name] for name in options.keep}
    scores = fisher({n: (x.reads, x.units) for n, x in wanted.items()}, run)
    found = grams({n: x.reads for n, x in wanted.items()}, run) if options.repair else {}
    kept = {name: best(scores[name], number) for name, number in options.keep.items()}
    for name, layer in wanted.items():
        layer.shrink(kept[name], found.get(name))
    return {name: (scores[name], stay) for name, stay in kept.items()}


@dataclass(frozen=True, slots=True)
class Layer:
    """Heads or hidden units: `reads` has `per` columns for each of so many `units`, and `keep` removes the others."""

    reads: nn.Module
    units: int
    per: int
    keep: Callable[[list[int]], None]

    def shrink(self, stay: list[int], gram: Tensor | None) -> None:
        """Keep those that `stay`; with normal equations (see `grams`) they are corrected first."""
        if gram is not None:
            repair(self.reads, stay, self.per, gram)
        self.keep(stay)


def shrinkable(family: ModuleType, model: Any) -> dict[str, Layer]:
    """Every layer of a model that can keep a part of its heads or units, by name."""
    heads = {
        b.name: Layer(b.linears[3], b.heads, b.head_dim, b.keep) for b in family.attentions(model) if b.q and b.heads
    }
    return heads | {h.name: Layer(h.reads, h.units, h.per, h.keep) for h in that_run(family, model)}


def best(scores: list[float], number: int) -> list[int]:
    """Those that score most, in order."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:number])
