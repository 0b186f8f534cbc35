"""File name = YAML name: a plug-in is a module of its group's folder, imported on use."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edgemm.errors import InputError

PACKAGE = Path(__file__).parent
Model = TypeVar("Model", bound=BaseModel)


def names(group: str) -> list[str]:
    """The plug-ins of a group: a folder listing that imports nothing."""
    return sorted(p.stem for p in (PACKAGE / group).glob("*.py") if not p.stem.startswith("_"))


def plugin(group: str, name: str) -> ModuleType:
    """Import `edgemm.<group>.<name>`; InputError when there is no such file."""
    if name not in (known := names(group)):
        raise InputError(f"no {group} named {name!r}", fix=f"use one of {', '.join(known)}")
    return importlib.import_module(f"edgemm.{group}.{name}")


def options(group: str, name: str, values: dict[str, Any], where: str) -> Any:
    """A plug-in's `Options`, validated; `where` is the dotted path that an error names."""
    return validate(plugin(group, name).Options, values, where)


def validate(model: type[Model], values: Any, where: str) -> Model:
    """`model.model_validate` whose first error becomes an InputError with the value and a fix."""
    try:
        return model.model_validate(values)
    except ValidationError as e:
        raise _explain(e, model, where) from e


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> InputError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return InputError(f"{where}: {path} = {first['input']!r}: {first['msg']}", fix=f"correct {path} in {where}")
    owner: Any = model
    for part in first["loc"][:-1]:
        owner = _field_model(owner, part)
    known = sorted(f.alias or n for n, f in owner.model_fields.items()) if owner else []
    key = str(first["loc"][-1])
    near = get_close_matches(key, known, n=1)
    fix = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"{where}: unknown key {path!r} = {first['input']!r}", fix=f"{fix}known: {', '.join(known)}")


def _field_model(owner: Any, part: int | str) -> Any:
    """The pydantic model behind one step of an error's path, through lists and optionals."""
    if isinstance(part, int):
        return owner
    field = owner.model_fields.get(part) if owner else None
    pending = [field.annotation] if field else []
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        pending.extend(getattr(kind, "__args__", ()))
    return None
