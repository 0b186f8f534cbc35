"""Axes that are fixed for a target that takes one input at a time."""

from __future__ import annotations

from typing import Any

import pytest

from edgemm.graph.shapes import SHORT_TEXT, fix_shapes


def port(name: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "shape": ["batch", *shape]}


def shapes_of(max_tokens: int, **output: Any) -> dict[str, list[list[int | str]]]:
    """Shapes of each component's inputs and outputs, of a text encoder and of what comes after it."""
    ids, mask, words = port("ids", "tokens"), port("mask", "tokens"), port("words", "tokens", 8)
    components = [
        {"name": "text_encoder", "inputs": [ids, mask], "outputs": [words]},
        {
            "name": "fusion",
            "inputs": [port("words", "tokens", 8), port("wave", "frames")],
            "outputs": [port("y", 3)],
        },
        {"name": "decoder", "inputs": [port("words", "tokens", 8), port("written", "past")], "outputs": [port("next")]},
    ]
    text = {"ids": "ids", "mask": "mask", "max_tokens": max_tokens}
    fix_shapes(program := {"components": components, "text": text, "output": output})
    return {c["name"]: [p["shape"] for p in (*c["inputs"], *c["outputs"])] for c in program["components"]}


def test_a_short_text_has_its_most_tokens_in_every_component() -> None:
    found = shapes_of(SHORT_TEXT, kind="labels")
    assert found["text_encoder"] == [[1, SHORT_TEXT], [1, SHORT_TEXT], [1, SHORT_TEXT, 8]]
    assert found["fusion"] == [[1, SHORT_TEXT, 8], [1, "frames"], [1, 3]]


def test_a_long_text_keeps_its_length() -> None:
    assert shapes_of(SHORT_TEXT + 1, kind="labels")["fusion"][0] == [1, "tokens", 8]


@pytest.mark.parametrize(("beams", "batch"), [(1, 1), (3, "batch")])
def test_a_decoder_with_several_beams_keeps_its_batch(beams: int, batch: int | str) -> None:
    assert shapes_of(8, kind="generation", beams=beams)["decoder"][1] == [batch, "past"]
