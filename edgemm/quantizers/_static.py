"""What the static quantizers share: options by layer, and which nodes a pattern means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TypeVar, get_args

import onnx
from pydantic import Field, model_validator

from edgemm.errors import InputError, ToolchainError
from edgemm.graph import layer_of, matches
from edgemm.graph.bypass import take_scales
from edgemm.yaml_files import Strict

S = TypeVar("S", bound="Static")


class Layer(Strict):
    """What differs for some layers: `ranges` and `smooth_quant` as for all of them."""

    ranges: str | None = None
    smooth_quant: float | None = Field(None, ge=-1, le=1)


class Static(Strict):
    """Options of every static quantizer; `ranges` has the observers that the library has."""

    keep_float: tuple[str, ...] = Field(
        (), description="what stays in float: ONNX op types, or glob patterns of nodes or layers"
    )
    layers: dict[str, Layer] = Field({}, description="what differs, by glob pattern of nodes or layers")

    @model_validator(mode="after")
    def _known_observers(self) -> Static:
        known = get_args(type(self).model_fields["ranges"].annotation)
        for pattern, layer in self.layers.items():
            if layer.ranges is not None and layer.ranges not in known:
                raise ValueError(f"layers.{pattern}.ranges: {layer.ranges!r} is not one of {', '.join(known)}")
        return self


def installed(package: str, extra: str) -> None:
    """ToolchainError unless a library is there; nothing is imported."""
    if find_spec(package) is None:
        raise ToolchainError(f"{package} is not installed", fix=f"pip install 'edgemm[{extra}]'")


def kept(model: onnx.ModelProto, patterns: Sequence[str], where: str = "keep_float") -> list[str]:
    """Names of the nodes whose op type, name or layer a pattern matches; InputError for one that matches none."""
    found: list[str] = []
    for pattern in patterns:
        nodes = [n.name for n in model.graph.node if matches(n, pattern)]
        if not nodes:
            known = sorted({name for n in model.graph.node for name in (n.name, n.op_type, layer_of(n)) if name})
            near = get_close_matches(pattern, known, n=3) or known[:3]
            raise InputError(f"quantize.{where}: {pattern!r} matches no node", fix=f"near: {', '.join(near)}")
        found += nodes
    return found


def alphas(model: onnx.ModelProto, layers: Mapping[str, Layer]) -> dict[str, float]:
    """SmoothQuant's alpha by name of the nodes of the layers that have one of their own."""
    pairs = ((p, layer.smooth_quant) for p, layer in layers.items() if layer.smooth_quant is not None)
    return {name: alpha for pattern, alpha in pairs for name in kept(model, [pattern], "layers")}


def by_layer(model: onnx.ModelProto, options: S, quantize: Callable[[S], onnx.ModelProto]) -> onnx.ModelProto:
    """What `quantize` makes with `options`, activations of single layers by the observer that is theirs.

    The library runs once an observer; scales of the layers that want it are taken from there.
    """
    wanted: dict[str, list[str]] = {}
    for pattern, layer in options.layers.items():
        names = kept(model, [pattern], "layers")
        if layer.ranges is not None:
            wanted.setdefault(layer.ranges, []).extend(names)
    made = quantize(options)
    for ranges, names in wanted.items():
        take_scales(made, quantize(options.model_copy(update={"ranges": ranges})), names)
    return made
