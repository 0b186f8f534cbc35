"""The media of a query to the tensors that a model takes, by program.json's `image`, `text`, `audio` and `tensors`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgemm.errors import InputError
from edgemm.runtime.audio import audio_to_features
from edgemm.runtime.preprocess import image_to_pixels, read_tokenizer, text_to_tensors
from edgemm.runtime.query import Array, Encoded, Query


class Media:
    """Pre-processing of one model.

    files    name -> bytes: the tokenizer
    sources  modality -> the tensors made of it;  fixed  (tensor, axis) -> its size where it is fixed
    model    what an Encoded of this model says
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        program: dict[str, Any],
        sources: Mapping[str, set[str]],
        fixed: Mapping[tuple[str, int], int],
        model: str,
    ) -> None:
        self.files, self.program, self.sources, self.fixed, self.model = files, program, sources, fixed, model

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.files["tokenizer.json"], "tokenizer.json")

    def parts(self, query: Query) -> dict[tuple[str, Any], Callable[[], dict[str, Array]]]:
        """(modality, medium) -> how to pre-process it, for each modality that the query holds."""
        names = ("image", "text", "audio", "tensors")
        given = {name: value for name in names if (value := getattr(query, name)) is not None}
        for modality in given:
            if modality not in self.sources:
                raise InputError(f"the model takes no {modality}", fix=f"it takes {' and '.join(self.sources)}")
        if not given:
            raise InputError("there is nothing to run", fix=f"give {' and '.join(self.sources)}")
        parts: dict[tuple[str, Any], Callable[[], dict[str, Array]]] = {}
        for modality, value in given.items():
            if isinstance(value, Encoded):
                parts[modality, value] = partial(self._own, value, modality)
            elif modality == "image":
                parts[modality, value] = partial(self._image, value)
            elif modality == "audio":
                parts[modality, value] = partial(audio_to_features, value, self.program["audio"])
            elif modality == "tensors":
                parts[modality, id(value)] = partial(self._ready_made, value)
            elif not self.program["output"].get("text_prompt"):
                parts[modality, (value, query.boxes)] = partial(self._text, value, query.boxes)
        return parts

    def _own(self, encoded: Encoded, modality: str) -> dict[str, Array]:
        if (encoded.model, encoded.modality) != (self.model, modality):
            what = f"{modality} is {encoded.modality} that {encoded.model[:80]} encoded"
            raise InputError(what, fix=f"encode the {modality} with this session's model")
        return encoded.tensors

    def _image(self, image: Path | str | bytes) -> dict[str, Array]:
        spec = self.program["image"]
        return {spec["tensor"]: image_to_pixels(image, spec)}

    def _text(self, text: str, boxes: tuple[tuple[int, int, int, int], ...] | None = None) -> dict[str, Array]:
        spec = self.program["text"]
        return text_to_tensors(text, boxes, spec, self.tokenizer, self.fixed.get((spec["ids"], 1), 0))

    def _ready_made(self, tensors: dict[str, Array]) -> dict[str, Array]:
        wanted = self.sources["tensors"]
        if wanted != tensors.keys():
            raise InputError(f"tensors are {', '.join(tensors)}", fix=f"the model takes {', '.join(sorted(wanted))}")
        return {name: np.asarray(value)[None] for name, value in tensors.items()}
