"""Recipes and targets as files: found by name, read as YAML, single fields overridden by dotted path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from edgemm.errors import InputError
from edgemm.plugins import PACKAGE


class Strict(BaseModel):
    """Base of every file boundary: unknown keys are errors, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def read_yaml(folder: str, name: str) -> tuple[dict[str, Any], str]:
    """The mapping in a shipped file by NAME or in any file by path, and how errors should call it."""
    shipped = shipped_files(folder)
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else shipped.get(name)
    if path is None:
        raise InputError(
            f"no {folder[:-1]} named {name!r}", fix=f"use one of {', '.join(shipped)}, or the path of a .yaml file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {folder[:-1]} {path}: {e}", fix="give the path of a readable YAML file") from e
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}, not keys and values", fix="write `key: value` lines")
    return {"name": path.stem, **values}, str(path)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; InputError naming `where` when it is none."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as e:  # all of them PyYAML's
        raise InputError(f"{where} is not YAML: {e}", fix="correct it, or quote the value") from e


def shipped_files(folder: str) -> dict[str, Path]:
    """Name -> file of recipes/ or targets/: inside the installed package, beside it in a checkout."""
    for root in (PACKAGE / folder, PACKAGE.parent / folder):
        if files := sorted(root.glob("*.yaml")):
            return {f.stem: f for f in files}
    return {}


def override(values: dict[str, Any], overrides: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with each dotted PATH set; a path through something that is no mapping or list is an error."""
    for path, value in overrides.items():
        *parents, last = path.split(".")
        node: Any = values
        try:
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
            node[int(last) if isinstance(node, list) else last] = value
        except (ValueError, IndexError, TypeError, AttributeError) as e:
            raise InputError(
                f"--set {path}={value!r}: no such place in {where}", fix="give a dotted path that the file has"
            ) from e
    return values
