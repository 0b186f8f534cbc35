"""Parity: every metric of the recipe, of the compressed model against the FP32 model that the user brought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.recipe import Limit, Recipe
from edgemm.report.schema import Accuracy
from edgemm.runtime.arrays import read_arrays
from edgemm.verdict import compare

Outputs = Mapping[str, NDArray[Any]]  # edgemm/metrics/__init__.py says what is in it


@dataclass(frozen=True, slots=True)
class Reference:
    """reference.npz: the FP32 model's outputs on the verification split; see stages/load.py."""

    ids: list[str]
    groups: list[str]
    targets: list[str | None]
    outputs: Outputs


def read_reference(content: bytes) -> Reference:
    stored = read_arrays(content, "the FP32 model's outputs")
    if missing := {"ids", "groups", "targets"} - stored.keys():
        raise InputError(f"the FP32 model's outputs have no {min(missing)}", fix="run edgemm compress again")
    targets = [t or None for t in stored["targets"].tolist()]
    outputs = {n.removeprefix("out."): value for n, value in stored.items() if n.startswith("out.")}
    return Reference(stored["ids"].tolist(), stored["groups"].tolist(), targets, outputs)


def kind_of(program: Mapping[str, Any]) -> str:
    """What metrics say in OUTPUTS of this program.json's `output`: its kind, but "picture" of one that is painted."""
    return "picture" if program["output"].get("picture") else str(program["output"]["kind"])


def default_metric(kind: str, *, has_targets: bool, audio: bool) -> str:
    """What judges an output of this kind: against right answers where the data has them, else against FP32."""
    if kind == "labels":
        return "accuracy" if has_targets else "agreement"
    if kind == "embeddings":
        return "recall_at_1"
    if kind == "features":
        return "cosine"
    if not has_targets:
        return "text_agreement_wer"
    if kind == "picture":
        return "true_pictures"
    return "wer" if audio else "exact_match"


def judge(outputs: Outputs, reference: Reference, program: Mapping[str, Any], recipe: Recipe) -> tuple[Accuracy, ...]:
    """Every metric of the recipe with its verdict; without any, the default ones."""
    kind = kind_of(program)
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InputError(f"the compressed model gives NaN or infinity in {name}", fix="quantize less of it")
    use = default_metric(kind, has_targets=None not in reference.targets, audio=bool(program.get("audio")))
    limits = recipe.verify.metrics or (Limit(use=use, margin=recipe.verify.margin),)
    rows = []
    for limit in limits:
        metric = plugins.plugin("metrics", limit.use)
        if kind not in metric.OUTPUTS:
            raise InputError(
                f"{limit.use} does not judge {kind}", fix=f"{recipe.name}: verify.metrics; it judges {metric.OUTPUTS}"
            )
        before = metric.values(reference.outputs, reference.outputs, reference.targets)
        after = metric.values(outputs, reference.outputs, reference.targets)
        groups = np.array(reference.groups)
        verify = recipe.verify
        paired = compare(before, after, groups, margin=limit.margin, seed=recipe.seed, resamples=verify.resamples)
        error = getattr(metric, "ERROR", False)
        fp32, compressed = (float(1 - v.mean() if error else v.mean()) for v in (before, after))
        rows.append(
            Accuracy(
                metric=limit.use,
                unit=metric.UNIT,
                n=paired.n,
                clusters=paired.clusters,
                n_required=paired.n_required,
                fp32=fp32,
                compressed=compressed,
                drop=paired.drop,
                drop_ci95_upper=paired.upper,
                margin=limit.margin,
                flips=flips(outputs, reference.outputs),
                sqnr_db=sqnr_db(outputs, reference.outputs),
                verdict=paired.verdict,
            )
        )
    return tuple(rows)


def flips(outputs: Outputs, reference: Outputs) -> float | None:
    """Share of samples whose label or text (of pictures, whose ids) changed; None where neither is the answer."""
    if "logits" in outputs:
        return float((outputs["logits"].argmax(1) != reference["logits"].argmax(1)).mean())
    return float((outputs["text"] != reference["text"]).mean()) if set(outputs) - {"picture"} == {"text"} else None


def sqnr_db(outputs: Outputs, reference: Outputs) -> float | None:
    """Signal to quantization noise of all numeric outputs, in dB, at most 200; None where the output is text."""
    names = [n for n, v in outputs.items() if v.dtype.kind == "f"]
    if not names:
        return None
    signal = sum(float((reference[n].astype(np.float64) ** 2).sum()) for n in names)
    noise = sum(float(((outputs[n].astype(np.float64) - reference[n]) ** 2).sum()) for n in names)
    return min(200.0, 10 * float(np.log10(signal / noise))) if noise else 200.0
