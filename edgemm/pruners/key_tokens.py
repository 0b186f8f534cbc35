"""Top-K sparse attention: from one layer on, only the image tokens stay that its queries look at most.

Which ones is decided for each input, by the question or the class token; how many is fixed. They leave before keys and
values are projected, and everything after the layer is as much smaller. Passes for heads that come later do not change
the choice, and those that came before have made it cheaper.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from pydantic import Field

from edgemm.errors import InputError
from edgemm.models._key_tokens import KeyTokens, TokenLayer
from edgemm.yaml_files import Strict


class Options(Strict):
    """`keep`: how many image tokens stay, a class token not counted;  `layer`: the first that has them alone.

    merge   average each token that goes into the most similar one that stays, instead of dropping it
    """

    keep: int = Field(ge=1)
    layer: int = Field(0, ge=0)
    merge: bool = False


def prune(family: ModuleType, model: Any, run: Callable[[], object], options: Options) -> dict[str, Any]:
    """Attach the choice in place, for families with `token_layers`; no head leaves.

    Raises InputError for other families, a layer that the model has not, and a `keep` above the tokens that are there.
    """
    del run  # what stays is chosen for each input
    layers: list[TokenLayer] = family.token_layers(model) if hasattr(family, "token_layers") else []
    if not layers:
        raise InputError(
            f"key_tokens: no layer of this {family.__name__.rpartition('.')[2]} says which image tokens matter",
            fix="remove this pass; it is for reasoner and for image encoders of CLIP's and ViT's build",
        )
    if options.layer >= len(layers):
        raise InputError(
            f"key_tokens: layer = {options.layer}: the model has {len(layers)} layers", fix=f"0 to {len(layers) - 1}"
        )
    layer = layers[options.layer]
    there = min([layer.tokens, *(x.kept.keep for x in layers[: options.layer] if x.kept)])
    if options.keep > there:
        raise InputError(
            f"key_tokens: keep = {options.keep}: only {there} tokens reach {layer.name}", fix=f"keep at most {there}"
        )
    layer.attach(KeyTokens.of(layer.attention, options.keep, merge=options.merge))
    return {}
