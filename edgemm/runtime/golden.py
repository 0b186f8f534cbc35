"""The golden inputs of a bundle and what the machine that packed it answered to them: does it still, here?

golden/inputs.json     a list of cases: `text`; `image` and `audio`, each the name of a file; `boxes`; `tensors`, the
                       names of the golden/<i>.<name>.npy of case i
golden/expected.npz    <i>.<output>: what came out of case i
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from edgemm.errors import InputError
from edgemm.plugins import validate
from edgemm.runtime.arrays import MADE, read_array, read_arrays
from edgemm.runtime.query import Query
from edgemm.runtime.session import Session
from edgemm.yaml_files import Strict

TOLERANCE = 0.05


class Case(Strict):
    text: str | None = None
    image: str | None = None
    audio: str | None = None
    boxes: tuple[tuple[int, int, int, int], ...] | None = None
    tensors: tuple[str, ...] = ()


class Cases(Strict):
    cases: Annotated[tuple[Case, ...], Field(min_length=1)]


def golden_error(session: Session, files: Mapping[str, bytes], where: str) -> float:
    """Largest difference to the expected outputs of the golden inputs, relative to the largest output; inf for NaN.

    Where the output is a text, the share of its letters that differ. `where` is what errors call the bundle.
    """
    worst = 0.0
    queries, expected = read_golden(files, where)
    for i, query in enumerate(queries):
        for name, value in session.outputs([query]).items():
            if f"{i}.{name}" not in expected:
                raise InputError(f"{where}: golden/expected.npz has no {i}.{name}", fix=MADE)
            worst = max(worst, _difference(value, expected[f"{i}.{name}"], text=name == "text"))
    return worst


def read_golden(files: Mapping[str, bytes], where: str) -> tuple[list[Query], dict[str, NDArray[Any]]]:
    """The golden inputs, and "<i>.<output>" -> expected value; InputError when one of them is absent or broken."""
    try:
        cases = json.loads(files["golden/inputs.json"])
        read = validate(Cases, {"cases": cases}, f"{where}: golden/inputs.json").cases
        queries = [_query(case, i, files, where) for i, case in enumerate(read)]
        return queries, read_arrays(files["golden/expected.npz"], f"{where}: golden/expected.npz")
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: golden/inputs.json is no JSON: {e}", fix=MADE) from e


def _query(case: Case, index: int, files: Mapping[str, bytes], where: str) -> Query:
    names = {name: f"golden/{index}.{name}.npy" for name in case.tensors}
    return Query(
        image=None if case.image is None else files[case.image],
        text=case.text,
        audio=None if case.audio is None else files[case.audio],
        boxes=case.boxes or None,
        tensors={name: read_array(files[n], f"{where}: {n}") for name, n in names.items()} or None,
    )


def _difference(got: NDArray[Any], want: NDArray[Any], *, text: bool) -> float:
    if got.shape != want.shape or got.dtype.kind != want.dtype.kind:
        return math.inf
    if got.dtype.kind == "U":
        return 1 - SequenceMatcher(None, str(want[0]), str(got[0])).ratio() if text else 0.0
    largest = float(np.abs(want).max(initial=0)) or 1.0  # expected zeros: the difference as it is
    error = float(np.abs(got.astype(np.float64) - want).max(initial=0)) / largest
    return error if math.isfinite(error) else math.inf
