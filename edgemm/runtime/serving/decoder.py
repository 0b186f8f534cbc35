"""A decoder as a component of the server: the whole token loop of one row is one call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgemm.runtime.component import Compile
from edgemm.runtime.generation import generate
from edgemm.runtime.query import Array, Tensors
from edgemm.runtime.serving.engine import Engine

IDS, PROMPT = "generated_ids", "prompt_ids"


class Decoder(Engine):
    """Reads what encoders made, and the prompt where the text begins with one; makes int64[1,n] ids.

    output   program.json's, of kind generation;  own  the decoder's inputs that the token loop makes
    """

    def __init__(
        self, spec: dict[str, Any], compile_: Compile, streams: int, output: dict[str, Any], own: set[str]
    ) -> None:
        super().__init__(spec, compile_, (1,), streams, fixed=False)
        self.output = output
        self.inputs = [name for name in self.inputs if name not in own]
        if output["text_prompt"]:
            self.inputs.append(PROMPT)
        self.outputs = {IDS: (1, "ids")}

    def _time(self, row: Tensors, size: int) -> float:
        """Once: it may take seconds."""
        begin = time.perf_counter()
        self.run(0, [row])
        return time.perf_counter() - begin

    def run(self, stream: int, rows: Sequence[Tensors]) -> tuple[list[dict[str, Array]], int, int]:
        made = []
        call = self._call(stream, None, None)
        for row in rows:
            prompt = [*self.output["prompt"], *row.get(PROMPT, np.zeros((1, 0), np.int64))[0].tolist()]
            known: Mapping[str, Any] = {name: value for name, value in row.items() if name != PROMPT}
            made.append({IDS: np.array([generate(call, self.spec, self.output, known, prompt)], np.int64)})
        return made, sum(value.size for row in rows for value in row.values()), 0
