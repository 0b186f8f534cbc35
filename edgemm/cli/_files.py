"""`list`, `show NAME` and `check FILE`, the same for recipes and targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel

from edgemm import console
from edgemm.plugins import plugin
from edgemm.recipe import Recipe, check_plugins
from edgemm.target import Target
from edgemm.yaml_files import shipped_files


def group(folder: str, load: Callable[[str], BaseModel]) -> typer.Typer:
    """The command group of the YAML files in `folder`, which `load` reads and validates."""
    app = typer.Typer(help=f"List, show and check {folder}.", no_args_is_help=True)

    @app.command("list")
    def list_() -> None:
        """The names that come with edgemm."""
        rows = [(name, getattr(load(name), "description", "")) for name in shipped_files(folder)]
        console.table(folder, ("name", "description"), rows)

    @app.command()
    def show(name: Annotated[str, typer.Argument(help="Name or file.")]) -> None:
        """Everything a file says, defaults included, as YAML."""
        values = load(name).model_dump(mode="json", by_alias=True)
        console.result(yaml.safe_dump(values, sort_keys=False).rstrip())

    @app.command()
    def check(file: Annotated[str, typer.Argument(help="Name or file.")]) -> None:
        """Exit 0 when the file is valid, 2 with the reason when it is not."""
        loaded = load(file)
        if isinstance(loaded, Recipe):
            check_plugins(loaded)
        if isinstance(loaded, Target):
            plugin("backends", loaded.backend)
        console.result(f"{file}: valid")

    return app
