"""Load: the user's model and the FP32 outputs that every later number is measured against."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgemm.artifact import Artifact, build, sha256_file
from edgemm.console import log
from edgemm.data import Sample, digest, split
from edgemm.errors import InputError
from edgemm.models import find_family, model_files, open_fp32, read_model, tokenizer_of, whole_program
from edgemm.models._sources import resolve
from edgemm.recipe import Recipe


def load(recipe: Recipe, runs: Path) -> Artifact:
    """Freeze the model and record its FP32 outputs on the verification split.

    The artifact holds model/ (a directory that its family reads), program.json (pre- and post-processing),
    calibration.json (ids of the calibration samples, from the train split), reference.npz: ids, groups
    str[n]; targets str[n], "" where there is none; and the model's outputs (edgemm/metrics/__init__.py:
    Outputs), each key with "out." before it.
    """
    directory = resolve(recipe.model, recipe.inputs, runs, recipe.task)
    family = find_family(directory)
    calibration, verification = split(
        recipe, cache(lambda: whole_program(family, read_model(family, directory), directory))
    )

    def make(out: Path) -> None:
        log(f"load {recipe.model}: FP32 outputs on {len(verification)} verification samples of {recipe.data}")
        model = read_model(family, directory)
        program = whole_program(family, model, directory)
        if program["output"]["kind"] == "labels":
            check_labels(verification, set(program["output"]["labels"]), recipe)
        (out / "model").mkdir()
        for name in model_files(directory):
            shutil.copyfile(directory / name, out / "model" / name)
        if (tokenizer := tokenizer_of(family, directory)) is not None:
            (out / "model" / "tokenizer.json").write_bytes(tokenizer)
        (out / "program.json").write_text(json.dumps(program), encoding="utf-8")
        (out / "calibration.json").write_text(json.dumps([s.id for s in calibration]), encoding="utf-8")
        outputs: dict[str, Any] = open_fp32(family, model, directory).outputs([s.query for s in verification])
        for name, value in outputs.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise InputError(f"{recipe.model} gives NaN or infinity in {name}", fix="repair the FP32 model first")
        np.savez(
            out / "reference.npz",
            ids=np.array([s.id for s in verification]),
            groups=np.array([s.group for s in verification]),
            targets=np.array([s.label or "" for s in verification]),
            **{f"out.{name}": value for name, value in outputs.items()},
        )

    return build(
        "source",
        runs,
        config={
            "family": family.__name__,
            "files": {name: sha256_file(directory / name) for name in model_files(directory)},
            "data": digest(calibration, verification),
            "seed": recipe.seed,
        },
        tools=("torch", "transformers", "onnxruntime", "easy-vqa"),
        make=make,
    )


def check_labels(samples: list[Sample], known: set[str], recipe: Recipe) -> None:
    """InputError when more right answers than the recipe tolerates are none that the model can give."""
    unknown = [s.label for s in samples if s.label and not known & {s.label, *s.label.split("|")}]
    if len(unknown) > recipe.data_tolerance * len(samples):
        raise InputError(
            f"{recipe.data} has answers that the model does not know: {', '.join(sorted(set(unknown))[:10])}",
            fix=f"the model knows {', '.join(sorted(known))[:300]}; data_tolerance in the recipe accepts some",
        )
