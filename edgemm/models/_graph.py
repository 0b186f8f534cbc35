"""Components as graphs: torch to ONNX, and calling either by name."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from edgemm.errors import InputError
from edgemm.runtime import onnxruntime
from edgemm.runtime.query import Array, Call, Tensors
from edgemm.runtime.session import Directory

if TYPE_CHECKING:
    from edgemm.models import Component


def onnx_export(component: Component, path: Path, opset: int) -> None:
    """torch.onnx (dynamo), with the dynamic axes that the component names.

    Raises InputError with torch's own words when the module can't be exported.
    """
    # The exporter prints its progress and warns of its own internals; an error still raises.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                component.module,  # type: ignore[arg-type]
                (),
                kwargs=component.example(batch=2),
                dynamo=True,
                dynamic_shapes=dynamic_shapes(component),
                input_names=[p.name for p in component.inputs],
                output_names=[p.name for p in component.outputs],
                opset_version=opset,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as e:
            raise InputError(
                f"{component.name}: torch can't export it: {str(e).strip()[:2000]}",
                fix="make its forward free of data-dependent control flow, and its inputs float32 or int64 tensors",
            ) from e
    program.save(str(path))
    onnx.checker.check_model(str(path), full_check=True)


def dynamic_shapes(component: Component) -> dict[str, dict[int, Any]]:
    """torch.export's description of the axes that stay dynamic, by input."""
    axes = {
        name: torch.export.Dim(name, min=component.min_sizes.get(name, 1), max=size)
        for name, size in component.max_sizes.items()
    }
    return {p.name: {i: axes[n] for i, n in enumerate(p.shape) if isinstance(n, str)} for p in component.inputs}


def caller(component: Component, directory: Path) -> Call:
    """What a backend's compiled component is, for the one that the user brought: named arrays to named arrays."""
    module = component.module
    if isinstance(module, Path):
        return onnxruntime.compile_component(
            Directory(directory), component.spec(), {"threads": torch.get_num_threads()}
        )

    def call(tensors: Tensors) -> dict[str, Array]:
        with torch.inference_mode():
            out = module(**{p.name: torch.from_numpy(np.asarray(tensors[p.name])) for p in component.inputs})
        parts = out if isinstance(out, tuple) else (out,)
        return {p.name: t.numpy() for p, t in zip(component.outputs, parts, strict=True)}

    return call


def check(component: Component, path: Path, tolerance: float) -> None:
    """Compare torch and ONNX Runtime on one row and on three, at the largest sizes and at small ones.

    Raises InputError when an output differs by more than `tolerance`, relative to its largest value.
    """
    onnx_call = onnxruntime.compile_component(Directory(path.parent), component.spec(), {"threads": 2})
    torch_call = caller(component, path.parent)
    for batch, small in ((1, False), (3, True)):
        inputs = {name: tensor.numpy() for name, tensor in component.example(batch, small=small).items()}
        expected, got = torch_call(inputs), onnx_call(inputs)
        for name, value in expected.items():
            error = float(np.abs(got[name] - value).max() / max(np.abs(value).max(), 1e-6))
            if not error <= tolerance:
                raise InputError(
                    f"{component.name}: {name} of the ONNX graph differs from torch by {error:.2e}",
                    fix=f"tolerance is {tolerance:.0e}",
                )
