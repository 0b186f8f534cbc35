"""edgemm inspect"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from edgemm import console


def command(
    model: Annotated[str, typer.Argument(help="What compress takes, or an .edgemm file.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="Hold a bundle to each rule of its format instead; exit 2 if one breaks.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Components with inputs and outputs; parameters, MACs and attention layers of a model; a bundle's certificate.

    The kind of an attention layer is self, cross or merged; queries -> keys are the modalities that it links.
    """
    from edgemm.inspection import inspect

    if strict:
        from edgemm.conformance import conformance, raise_broken

        rules = conformance(model)
        if json:
            console.result_json({"rules": [asdict(rule) for rule in rules]})
        else:
            rows = ((r.name, r.level, "yes" if r.kept else "no", r.detail) for r in rules)
            console.table(model, ("rule", "level", "kept", "detail"), rows)
        raise_broken(rules, model)
        return

    found = inspect(model)
    if json:
        console.result_json(found)
        return

    def ports(values: list[dict[str, Any]]) -> str:
        return ", ".join(f"{p['name']}{list(p['shape'])}" for p in values)

    components = ((c["name"], ports(c["inputs"]), ports(c["outputs"])) for c in found["components"])
    console.table(model, ("component", "inputs", "outputs"), components)
    if modalities := found.get("modalities"):
        macs = "MACs not counted" if found["macs"] is None else f"{found['macs']:,} MACs"
        console.result(f"{' + '.join(modalities)} to {found['output']}: {found['parameters']:,} parameters, {macs}")
    if layers := found.get("attention"):
        columns = ("attention", "kind", "queries", "keys", "heads", "width of a head")
        console.table("attention", columns, ([*row.values()] for row in layers))
    if hidden := found.get("hidden_units"):
        console.table("hidden units", ("block", "units"), ([*row.values()] for row in hidden))
    if certificate := found.get("certificate"):
        rows = ((a["metric"], a["fp32"], a["compressed"], a["drop_ci95_upper"]) for a in certificate["accuracy"])
        console.table(certificate["verdict"], ("metric", "FP32", "compressed", "bound on the drop"), rows)
