"""What families whose weights are a transformers checkpoint share: reading and writing the directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import logging

from edgemm.errors import InputError
from edgemm.models import AttentionBlock
from edgemm.models._key_tokens import TokenLayer, restore, specs
from edgemm.models._processors import FILES
from edgemm.models._shrunk import left, shrink

SIDE_FILES = (*FILES, "generation_config.json")
PRUNED = "pruned.json"
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")  # U8: masks; others are quantized or complex


def choose(directory: Path, classes: dict[str, type[PreTrainedModel]]) -> type[PreTrainedModel]:
    """The class that config.json's `architectures` names; InputError listing `classes` when it is none of them."""
    named = read_json(directory, "config.json").get("architectures") or ["(none)"]
    if named[0] not in classes:
        raise InputError(
            f"{directory}: architecture {named[0]!r} is not known",
            fix=f"known for this model_type: {', '.join(classes)}; any other goes in as an .onnx file "
            "(edgemm compress model.onnx) or as a Python factory (edgemm compress package.module:factory)",
        )
    return classes[named[0]]


def load(
    directory: Path,
    cls: type[PreTrainedModel],
    attentions: Callable[[Any], list[AttentionBlock]],
    prepare: Callable[[Any], object] = lambda model: None,
    unread: str | None = None,
    tokens: Callable[[Any], list[TokenLayer]] = lambda model: [],
    **options: Any,
) -> Any:
    """`cls.from_pretrained` in FP32 and eval mode, from this disk alone, and strictly: every tensor in its place.

    attentions  of the family; blocks, heads and units that an earlier pruning removed are removed before the weights
                are read
    prepare     what is done to a model once it is built, e.g. folding weight norm into the weights
    unread      prefix of tensors that `prepare` takes away: the weights may have them or not
    tokens      token_layers of a family that has it
    options     for from_pretrained, e.g. attn_implementation="eager"
    Pickles are read with weights_only=True, which runs no code from them. Raises InputError naming tensors
    that are missing, left over or of another shape, and for quantized weights.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of tensors: they are named below
    refuse_quantized(directory)
    if (directory / PRUNED).is_file():
        return _load_pruned(directory, cls, attentions, prepare, tokens, **options)
    model, info = cls.from_pretrained(
        directory,
        local_files_only=True,
        trust_remote_code=False,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # so that they are named below
        output_loading_info=True,
        **options,
    )
    for problem, names in (
        ("lack", info["missing_keys"]),
        ("have, and the model does not,", info["unexpected_keys"]),
        ("have in another shape", [m[0] if isinstance(m, tuple) else m for m in info["mismatched_keys"]]),
    ):
        if names := [n for n in map(str, names) if unread is None or not n.startswith(unread)]:
            raise InputError(
                f"{directory}: the weights {problem} {', '.join(sorted(names)[:10])} ({len(names)} tensors)",
                fix="save weights and config together, from the same model",
            )
    prepare(model.eval())
    return model


def refuse_quantized(directory: Path) -> None:
    """InputError for weights of a dtype that is no plain number: transformers would cast it to FP32 in silence."""
    if method := read_json(directory, "config.json").get("quantization_config"):
        raise InputError(
            f"{directory}: quantization_config = {method!r}"[:300], fix="give the checkpoint in FP32 or FP16"
        )
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if (dtype := file.get_slice(name).get_dtype()) not in DTYPES:
                    raise InputError(f"{directory}: {name} is {dtype}", fix="give the checkpoint in FP32 or FP16")


def _load_pruned(
    directory: Path,
    cls: type[PreTrainedModel],
    attentions: Callable[[Any], list[AttentionBlock]],
    prepare: Callable[[Any], object],
    tokens: Callable[[Any], list[TokenLayer]],
    **options: Any,
) -> Any:
    from safetensors.torch import load_file

    config = cls.config_class.from_pretrained(directory, **options)
    model = cls(config).eval()
    prepare(model)
    pruned = read_json(directory, PRUNED)
    shrink(model, attentions, pruned)
    restore(tokens(model), pruned.get("tokens", {}))
    missing, unexpected = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    if (missing := set(missing) - tied) or unexpected:
        raise InputError(
            f"{directory}: weights don't fit: {sorted(missing)[:5]} {sorted(unexpected)[:5]}",
            fix="prune the model again",
        )
    return model


def save(
    model: Any,
    directory: Path,
    source: Path,
    attentions: Callable[[Any], list[AttentionBlock]],
    tokens: Callable[[Any], list[TokenLayer]] = lambda model: [],
) -> None:
    """config.json, model.safetensors, the side files of `source`, and what blocks, heads, units, tokens are left."""
    model.save_pretrained(directory, save_original_format=False)  # old tensor names would not fit what is read below
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    pruned = {**left(model, attentions), "tokens": specs(tokens(model))}
    (directory / PRUNED).write_text(json.dumps(pruned, indent=1) + "\n", encoding="utf-8")


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object in the model's directory; InputError when there is none."""
    try:
        values = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{directory}: cannot read {name}: {e}", fix=f"put the model's {name} there") from e
    if not isinstance(values, dict):
        raise InputError(f"{directory}: {name} holds no JSON object", fix=f"put the model's {name} there")
    return values
