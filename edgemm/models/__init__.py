"""Model families, one a file, found by a checkpoint's `model_type`. What each file provides:

load(directory) -> nn.Module            from config.json and the weights, in FP32, eval mode
save(model, directory, source)          config, weights and the other files of `source`; shapes may be pruned
components(model) -> [Component]        graphs to export, in the order they run
attentions(model) -> [AttentionBlock]   every attention layer; head pruning shrinks those with q, k, v, o
token_layers(model) -> [TokenLayer]     where image tokens can leave (see _key_tokens.py); in some families
TASKS, for_task(directory, task, out)   what a model can be for; writes it for one of them to `out`; in some families
program(model, directory) -> dict       pre- and post-processing as data, see edgemm/runtime/program.py

Families whose weights are a transformers checkpoint share _transformers.py. Neurons of feed-forward blocks, and
channels inside residual blocks, are found in all of them by _hidden_units.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgemm import plugins
from edgemm.errors import InputError
from edgemm.models._graph import caller
from edgemm.runtime.session import Session

# trained here: no checkpoints of transformers
OWN = ("reasoner", "scenes_reasoner", "scenes_painter", "scenes_watcher")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
Dtype = Literal["float32", "int64", "int32", "bool"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named input or output. `shape` holds sizes, and names for the dynamic axes."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Component:
    """One graph: a module whose keyword arguments are `inputs` and whose result is `outputs`.

    module     a torch module that gives one tensor or a tuple; or the path of an ONNX file
    max_sizes  largest size of each dynamic axis
    high       ids of an integer input are under this, by name of the input; masks need no entry: they are ones
    min_sizes  smallest size of a dynamic axis, where it is over 1
    state      (input, output) that go round, of a component that takes its other inputs chunk by chunk
    """

    name: str
    module: nn.Module | Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_sizes: dict[str, int]
    high: dict[str, int] = field(default_factory=dict)
    min_sizes: dict[str, int] = field(default_factory=dict)
    state: tuple[str, str] | None = None

    def example(self, batch: int, *, small: bool = False) -> dict[str, torch.Tensor]:
        """Seeded inputs of `batch` rows, every other dynamic axis at its largest, or `small`: at 5 or its smallest."""
        rng = torch.Generator().manual_seed(0)

        def size(axis: int | str) -> int:
            if axis == "batch" or isinstance(axis, int):
                return batch if axis == "batch" else int(axis)
            return min(self.max_sizes[axis], max(5, self.min_sizes.get(axis, 1))) if small else self.max_sizes[axis]

        def value(port: Tensor) -> torch.Tensor:
            shape = [size(axis) for axis in port.shape]
            if port.dtype == "float32":
                return torch.randn(shape, generator=rng)
            high = self.high.get(port.name)
            ids = torch.randint(0, high, shape, generator=rng) if high else torch.ones(shape, dtype=torch.int64)
            return ids.to(getattr(torch, port.dtype))

        return {port.name: value(port) for port in self.inputs}

    def spec(self) -> dict[str, Any]:
        """Its entry in program.json."""
        return {
            "name": self.name,
            "inputs": [asdict(p) for p in self.inputs],
            "outputs": [asdict(p) for p in self.outputs],
            "max_sizes": self.max_sizes,
            **({"min_sizes": self.min_sizes} if self.min_sizes else {}),
            **({"state": self.state} if self.state else {}),
        }


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """Multi-head attention made of four Linear layers; head h owns rows h*d..(h+1)*d of q, k, v and columns of o.

    A cross-attention may have no head left: only the bias of o remains, and its graph computes no q, k and v.
    name        dotted path in the model
    kind        self: one modality; cross: queries of one, keys of another; merged: one sequence of several
    queries     modality of the queries;  keys  modality of the keys and values ("text+image" when merged)
    q, k, v, o  None where they are not four layers of their own: such a layer is listed and not pruned
    resize      tells the module its new number of heads
    """

    name: str
    kind: Literal["self", "cross", "merged"]
    queries: str
    keys: str
    heads: int
    head_dim: int
    q: nn.Linear | None = None
    k: nn.Linear | None = None
    v: nn.Linear | None = None
    o: nn.Linear | None = None
    resize: Callable[[int], None] | None = None

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """q, k, v, o of a layer that can be pruned."""
        assert self.q and self.k and self.v and self.o
        return self.q, self.k, self.v, self.o

    def keep(self, heads: list[int]) -> None:
        """Shrink to `heads`, in place: q, k, v lose rows and o loses columns; nothing is masked.

        No heads at all are for cross-attention alone.
        """
        assert heads or self.kind == "cross"
        q, k, v, o = self.linears
        assert self.resize
        places = [h * self.head_dim + i for h in sorted(heads) for i in range(self.head_dim)]
        rows = torch.tensor(places, dtype=torch.int64)
        for linear in (q, k, v):
            linear.weight = nn.Parameter(linear.weight.detach()[rows].clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
            linear.out_features = len(rows)
        o.weight = nn.Parameter(o.weight.detach()[:, rows].clone())
        o.in_features = len(rows)
        self.resize(len(heads))


def model_files(directory: Path) -> list[str]:
    """The files that make a model: JSON beside safetensors, or beside the pickles where there is no safetensors."""
    names = sorted(p.name for p in directory.iterdir() if p.is_file())
    weights = [n for n in names if n.endswith(".safetensors")] or [
        n for n in names if n.startswith("pytorch_model") and n.endswith(".bin")
    ]
    graphs = [n for n in names if n.endswith(".onnx")]
    vocabularies = [n for n in names if n.endswith((".txt", ".model"))]
    return [*(n for n in names if n.endswith(".json")), *vocabularies, *weights, *graphs]


def tokenizer_of(family: ModuleType, directory: Path) -> bytes | None:
    """tokenizer.json by which the runtime tokenizes as the model's own tokenizer does; None where there is none."""
    path = directory / "tokenizer.json"
    if family.__name__.rpartition(".")[2] in (*OWN, "onnx"):
        return path.read_bytes() if path.is_file() else None
    from edgemm.models._processors import tokenizer_json

    return None if (content := tokenizer_json(directory)) is None else content.encode()


def find_family(directory: Path) -> ModuleType:
    """The family module of a model directory, by the model_type of its config.json."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"{directory}: no config.json with a model_type", fix="give a model directory") from e
    if (name := str(model_type).replace("-", "_")) not in (known := plugins.names("models")):
        code = ", and its own code (auto_map) is not run" if "auto_map" in config else ""
        raise InputError(
            f"{directory}: model_type {model_type!r} is not known{code}",
            fix=f"known: {', '.join(known)}; any other model goes in as an .onnx file (edgemm compress model.onnx) "
            "or as a Python factory (edgemm compress package.module:factory)",
        )
    weights = ".onnx" if name == "onnx" else ".safetensors"
    if not any(n.endswith(weights) for n in model_files(directory)):
        pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
        # transformers reads its own with weights_only=True, which runs nothing from them
        if pickles and (name in OWN or not pickles[0].startswith("pytorch_model")):
            raise InputError(
                f"{directory}: {pickles[0]} is a pickle, which can run any code when it is read",
                fix="save the weights as model.safetensors",
            )
        if not pickles:
            graphs = "; or compress the .onnx file itself" if any(directory.glob("*.onnx")) else ""
            raise InputError(
                f"{directory}: no weights (model.safetensors)", fix=f"put model.safetensors beside config.json{graphs}"
            )
    return plugins.plugin("models", name)


def is_torch(directory: Path) -> bool:
    """Whether the model's components are torch modules, and not graphs from outside."""
    return not any(name.endswith(".onnx") for name in model_files(directory))


def read_model(family: ModuleType, directory: Path) -> Any:
    """`family.load` with its failures named; NaN in the weights is one."""
    try:
        model = family.load(directory)
    except UnpicklingError as e:
        raise InputError(
            f"{directory}: the weights are a pickle that runs code when it is read", fix="save model.safetensors"
        ) from e
    except (
        SafetensorError,
        StrictDataclassError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
        OSError,
    ) as e:
        raise InputError(f"{directory}: weights and config don't fit: {e}", fix="save both again together") from e
    if isinstance(model, nn.Module):
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise InputError(f"{directory}: {name} holds NaN or infinity", fix="train or convert the model again")
    return model


def whole_program(family: ModuleType, model: Any, directory: Path) -> dict[str, Any]:
    """program.json of the model as it is, before a backend and its settings are chosen."""
    return {"components": [c.spec() for c in family.components(model)], **family.program(model, directory)}


def open_fp32(family: ModuleType, model: Any, directory: Path) -> Session:
    """A session over the model as the user brought it: FP32, in torch (a graph from outside: in ONNX Runtime)."""
    components = {c.name: c for c in family.components(model)}
    settings = {"threads": torch.get_num_threads(), "precision": "f32"}
    program = {**whole_program(family, model, directory), "backend": "onnxruntime", "settings": settings}
    tokenizer = tokenizer_of(family, directory)
    files = {} if tokenizer is None else {"tokenizer.json": tokenizer}
    session = Session(files, program, str(directory), lambda spec: caller(components[spec["name"]], directory))
    for name, component in components.items():
        if isinstance(component.module, Path):  # what can't be loaded is known at once, and not by the first input
            session.components[name].load()
    return session


def sizes(family: ModuleType, model: Any) -> tuple[int, int]:
    """(parameters, multiply-adds of one input at its largest size)."""
    components: list[Component] = family.components(model)
    modules = [c.module for c in components if isinstance(c.module, nn.Module)]
    parameters = {p.data_ptr(): p.numel() for m in modules for p in m.parameters()}  # tied ones once
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        for component, module in zip(components, modules, strict=True):
            module(**component.example(batch=1))
    return sum(parameters.values()), counter.get_total_flops() // 2
