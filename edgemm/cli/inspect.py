"""edgemm inspect"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from edgemm import console


def command(
    model: Annotated[str, typer.Argument(help="What compress takes, or an .edgemm file.")],
    links: Annotated[
        bool, typer.Option("--links", help="Show the magnitude of each attention link: layers x heads, by edge.")
    ] = False,
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME|FILE|random:N",
            help="With --links: measure what links carry on this data. Default: the norm of their weights.",
        ),
    ] = None,
    plot: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="With --links: draw the map into this .png or .svg file.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Hold a bundle to each rule of its format instead; exit 2 if one breaks.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Components with inputs and outputs; parameters, MACs and attention layers of a model; a bundle's certificate.

    The kind of an attention layer is self, cross or merged; queries -> keys are the modalities that it links.
    """
    from edgemm.errors import InputError
    from edgemm.inspection import inspect, link_map, plot_links

    if links:
        mapped = link_map(model, data)
        if plot:
            plot_links(mapped, plot)
        if json:
            console.result_json(mapped)
        else:
            edges = ((x["name"], f"{x['queries']} -> {x['keys']}", short(x["heads"])) for x in mapped["layers"])
            console.table(f"links by {mapped['score']}", ("layer", "edge", "heads"), edges)
            if mapped["fused"]:
                console.result(f"q, k and v are one matrix, heads not told apart: {', '.join(mapped['fused'])}")
        return
    if data or plot:
        raise InputError(f"{'--data' if data else '--plot'} is about links", fix="give --links too")
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


def short(values: list[float]) -> str:
    """Three digits each."""
    return "  ".join(f"{v:.3g}" for v in values)
