"""The command line: one file a command, found by its name. Commands parse, call and print."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import typer

from edgemm import console
from edgemm.errors import EdgemmError, ToolchainError
from edgemm.plugins import names

INTERRUPTED = 130
TOOLCHAIN = {"easy_vqa", "jinja2", "matplotlib", "nncf", "onnx", "onnxruntime", "safetensors", "torch", "transformers"}


def main() -> None:
    """Entry point of `edgemm`."""
    for noisy in ("torchao", "torch.utils._pytree"):  # transformers loads torchao where it is; CUDA parts are missing
        logging.getLogger(noisy).setLevel(logging.ERROR)
    build_app()()


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="edgemm",
        help="Make a trained multimodal model run, provably as good, on a small machine.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_global_options)
    for name in names("cli"):
        module = importlib.import_module(f"edgemm.cli.{name}")
        if hasattr(module, "app"):
            _guard_group(module)
            app.add_typer(module.app, name=name)
        else:
            app.command(name.replace("_", "-"))(guard(module.command))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from edgemm import __version__

        console.result(__version__)
        raise typer.Exit


def _global_options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", callback=_print_version),
) -> None:
    del version


def _guard_group(module: ModuleType) -> None:
    for info in module.app.registered_commands:
        info.callback = guard(info.callback)


def guard(command: Callable[..., Any]) -> Callable[..., Any]:
    """End by the exit code of our own errors and of Ctrl-C; anything else is our bug and shows its traceback."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except EdgemmError as e:
            console.error(str(e))
            raise typer.Exit(e.exit_code) from e
        except ModuleNotFoundError as e:
            package = (e.name or "").partition(".")[0]
            if package not in TOOLCHAIN:
                raise
            console.error(str(ToolchainError(f"{package} is not installed", fix="pip install 'edgemm[compress]'")))
            raise typer.Exit(ToolchainError.exit_code) from e
        except KeyboardInterrupt as e:
            console.error("interrupted; what was finished is kept, and the same command goes on from there")
            raise typer.Exit(INTERRUPTED) from e

    return guarded


def assignments(values: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`--set PATH=VALUE` (values read as YAML) -> overrides of the recipe, overrides of the target."""
    from edgemm.errors import InputError
    from edgemm.yaml_files import parse_yaml

    recipe: dict[str, Any] = {}
    target: dict[str, Any] = {}
    for text in values:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise InputError(f"--set {text!r} is not PATH=VALUE", fix="for example --set prune.0.keep=0.5")
        parsed = parse_yaml(value, f"--set {text!r}")
        if path.startswith("target."):
            target[path.removeprefix("target.")] = parsed
        else:
            recipe[path] = parsed
    return recipe, target
