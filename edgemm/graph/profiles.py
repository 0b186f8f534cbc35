"""Optimization profiles: the range of shapes of each input that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemm.errors import InputError
from edgemm.target import Target

Range = tuple[int, int, int]
Profile = dict[str, dict[str, list[int]]]


def profiles(program: Mapping[str, Any], target: Target) -> dict[str, Profile]:
    """{component: {input: {"min", "opt", "max": shape}}} of every input, from program.json and `target.shapes`.

    Raises InputError where the target asks for more than a graph was exported for: TensorRT would build it,
    and the engine would be wrong outside that range.
    """
    return {c["name"]: _profile(c, program["output"], target) for c in program["components"]}


def _profile(component: Mapping[str, Any], output: Mapping[str, Any], target: Target) -> Profile:
    sizes: dict[str, Range] = {}
    for port in component["inputs"]:
        for axis in port["shape"]:
            if isinstance(axis, str) and axis not in sizes:
                sizes[axis] = _range(axis, component, target)
    if component["name"] == output.get("decoder"):
        _decoding(sizes, component, output, target)
    found: Profile = {}
    for port in component["inputs"]:
        ranges = [sizes[axis] if isinstance(axis, str) else (axis,) * 3 for axis in port["shape"]]
        found[port["name"]] = {key: [r[i] for r in ranges] for i, key in enumerate(("min", "opt", "max"))}
    return found


def _range(axis: str, component: Mapping[str, Any], target: Target) -> Range:
    low, high = component.get("min_sizes", {}).get(axis, 1), component["max_sizes"].get(axis)
    if axis in target.shapes:
        given = target.shapes[axis]
        if high is None or given[0] < low or given[2] > high:
            raise InputError(
                f"{target.name}: shapes.{axis} = {list(given)} is wider than {component['name']} was exported for, "
                f"{low} to {high}",
                fix=f"keep shapes.{axis} within that range",
            )
        return given
    if axis == "batch":
        return 1, 1, 1
    assert high is not None, f"{component['name']}: {axis} has no largest size"
    return low, high, high


def _decoding(sizes: dict[str, Range], component: Mapping[str, Any], output: Mapping[str, Any], target: Target) -> None:
    """A token loop adds one token to a cache that grows: tuned for one token and half a cache."""
    shapes = {port["name"]: port["shape"] for port in component["inputs"]}
    tokens, past = shapes[output["ids"]][1], shapes[output["cache"][0][0]][2]
    for axis, opt in ((tokens, 1), (past, sizes[past][2] // 2)):
        if axis not in target.shapes:
            sizes[axis] = sizes[axis][0], max(opt, sizes[axis][0]), sizes[axis][2]
    low, opt, high = (a + b for a, b in zip(sizes[tokens], sizes[past], strict=True))
    sizes[shapes[output["mask"]][1]] = low, opt, high
