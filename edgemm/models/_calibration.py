"""The calibration data of a model, which pruners pass through it: forwards, or forwards and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from edgemm.errors import InputError
from edgemm.models import Component, open_fp32
from edgemm.runtime.query import Outputs, Query
from edgemm.runtime.session import Session


@dataclass(frozen=True, slots=True)
class Calibration:
    """Queries of the train split and the model as it is now; calling it passes them through once, past all exits."""

    family: ModuleType
    model: Any
    directory: Path
    queries: Sequence[Query]

    def __call__(self) -> Outputs:
        session = open_fp32(self.family, self.model, self.directory)
        session.exits = {}
        return session.outputs(self.queries)

    def losses(self) -> Iterator[Tensor]:
        """A scalar a sample: its gradient squared is, on average, the curvature of the loss against the model itself.

        The loss is the KL divergence from the model's own answer (label by label where they are scored one by one),
        and the squared distance where it gives embeddings or features. At the model itself the gradient of that loss
        is nothing; what it rises by is half its curvature, the Fisher information. So no right answers are needed.
        Raises InputError for a model that writes text token by token: there is no gradient through its words.
        """
        session = open_fp32(self.family, self.model, self.directory)
        if session.decoder:
            raise InputError(
                "fisher: the model writes text token by token, and no gradient passes through its words",
                fix="score: attention (heads) or activation (neurons)",
            )
        components = self.family.components(self.model)
        rng = torch.Generator().manual_seed(0)
        for query in self.queries:
            yield _loss(_infer(components, session, query), session, rng)


@torch.enable_grad()
def _infer(components: Sequence[Component], session: Session, query: Query) -> dict[str, Tensor]:
    """All tensors of one sample, joined by name, with their gradients."""
    known = {name: torch.from_numpy(value) for name, value in session.tensors(query).items()}
    for component in components:
        done = all(port.name in known for port in component.outputs)
        if not done and all(port.name in known for port in component.inputs):
            assert isinstance(component.module, nn.Module)
            out = component.module(**{port.name: known[port.name] for port in component.inputs})
            parts = out if isinstance(out, tuple) else (out,)
            known |= {port.name: part for port, part in zip(component.outputs, parts, strict=True)}
    return known


@torch.enable_grad()
def _loss(known: dict[str, Tensor], session: Session, rng: torch.Generator) -> Tensor:
    """A random direction times the outputs, whose covariance is the Hessian of the loss in the outputs."""
    output = session.output
    tensors = output.get("tensors", output.get("tensor"))
    names = [tensors] if isinstance(tensors, str) else list(tensors.values() if isinstance(tensors, dict) else tensors)
    names += [output["match"]] if output.get("match") else []
    total = torch.zeros(())
    for name in (n for n in names if n in known):
        logits = known[name].detach()
        direction = torch.randn(logits.shape, generator=rng)
        if output.get("activation") == "sigmoid" and output["kind"] == "labels":
            p = logits.sigmoid()
            direction = (p * (1 - p)).sqrt() * direction
        elif output["kind"] in ("labels", "transcript"):  # covariance diag(p) - p p^T
            p = logits.softmax(-1)
            direction = p.sqrt() * direction
            direction = direction - p * direction.sum(-1, keepdim=True)
        total = total + (known[name] * direction).sum()
    return total
