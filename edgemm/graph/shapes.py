"""Which axes of program.json's components are fixed for a target that takes one input at a time."""

from __future__ import annotations

from typing import Any

SHORT_TEXT = 64  # tokens


def fix_shapes(program: dict[str, Any]) -> None:
    """Batch 1, and the most tokens of a text that is short anyhow, in each port of the components of program.json.

    Other lengths stay dynamic: an image, a recording and a cache can't be padded without changing the answer,
    and padding a text far over its length costs more than fixed shapes save.
    """
    sizes = {"batch": 1}
    if (text := program.get("text")) and text.get("mask") and text["max_tokens"] <= SHORT_TEXT:
        ids = [p for c in program["components"] for p in c["inputs"] if p["name"] == text["ids"]]
        sizes |= {port["shape"][1]: text["max_tokens"] for port in ids if isinstance(port["shape"][1], str)}
    several = program["output"].get("beams", 1) > 1
    for component in program["components"]:
        if not (several and is_decoder(component, program)):
            for port in (*component["inputs"], *component["outputs"]):
                port["shape"] = [sizes.get(n, n) for n in port["shape"]]


def is_decoder(component: dict[str, Any], program: dict[str, Any]) -> bool:
    """Whether this is the component that writes text token by token."""
    output = program["output"]
    return output.get("kind") == "generation" and component["name"] == output.get("decoder", "decoder")
