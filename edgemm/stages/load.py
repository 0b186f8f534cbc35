"""Load: the user's model and the FP32 outputs that every later number is measured against."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from edgemm.artifact import Artifact, build, sha256_file
from edgemm.console import log
from edgemm.data import split
from edgemm.errors import InputError
from edgemm.models import FILES, find_family, read_model, resolve
from edgemm.recipe import Recipe


def load(recipe: Recipe, runs: Path) -> Artifact:
    """Freeze the model and record its FP32 outputs on the verification split.

    The artifact holds model/ (as its family saves it), calibration.json (ids of the calibration samples,
    from the train split), reference.npz: ids str[n], groups str[n], labels int64[n], logits float32[n,A].
    """
    directory = resolve(recipe.model)
    family = find_family(directory)
    files = {name: sha256_file(directory / name) for name in FILES}

    def make(out: Path) -> None:
        log(f"load {recipe.model}: FP32 outputs on the verification split of {recipe.data}")
        calibration, verification = split(recipe.data, recipe.calibration, recipe.seed, recipe.verify.limit)
        model = read_model(family, directory)
        answers = {a: i for i, a in enumerate(family.program(model)["output"]["labels"])}
        if unknown := sorted({s.label for s in verification} - answers.keys()):
            raise InputError(
                f"{recipe.data} has answers that the model does not know: {', '.join(unknown[:10])}",
                fix=f"the model knows {', '.join(answers)}",
            )
        (out / "model").mkdir()
        for name in FILES:
            shutil.copyfile(directory / name, out / "model" / name)
        (out / "calibration.json").write_text(json.dumps([s.id for s in calibration]), encoding="utf-8")
        np.savez(
            out / "reference.npz",
            ids=np.array([s.id for s in verification]),
            groups=np.array([s.group for s in verification]),
            labels=np.array([answers[s.label] for s in verification]),
            logits=family.predict(model, directory, verification),
        )

    data = {"name": recipe.data, "calibration": recipe.calibration, "limit": recipe.verify.limit}
    return build(
        "source",
        runs,
        config={"family": family.__name__, "files": files, "data": data, "seed": recipe.seed},
        tools=("torch", "transformers", "easy-vqa"),
        make=make,
    )
