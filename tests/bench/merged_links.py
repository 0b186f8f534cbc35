"""What it buys to split an edge off the scores of a merged sequence (ViLT-B/32's attention layer): next to nothing.

    .venv/bin/python tests/bench/merged_links.py

q, k, v and o stay, since each token is read by its own modality; only a block of the scores is not computed. Medians
over interleaved rounds, OpenVINO f32.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from edgemm import console
from edgemm.models import Component
from edgemm.models import Tensor as Port
from edgemm.models._decoder import attend, heads
from edgemm.models._graph import onnx_export

WIDTH, HEADS, WORDS, PATCHES, THREADS, ROUNDS, BLOCK = 768, 12, 40, 241, 2, 60, 5


class Merged(nn.Module):
    """Attention over words and patches; `blind`: which of the two does not see the other, if any."""

    def __init__(self, blind: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.blind = blind

    def forward(self, states: Tensor) -> Tensor:
        d = WIDTH // HEADS
        q, k, v = heads(self.q(states) * d**-0.5, d), heads(self.k(states), d), heads(self.v(states), d)
        words, patches, every = slice(WORDS), slice(WORDS, None), slice(None)
        if self.blind == "":
            return self.o(attend(q, k, v, None))
        seen = {"text -> image": (words, every), "image -> text": (every, patches)}[self.blind]
        parts = [
            attend(q[:, :, own], k[:, :, s], v[:, :, s], None) for own, s in zip((words, patches), seen, strict=True)
        ]
        return self.o(torch.cat(parts, 1))


def main() -> None:
    requests = {}
    port = Port("states", "float32", (1, WORDS + PATCHES, WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        for blind in ("", "text -> image", "image -> text"):
            path = Path(folder) / "layer.onnx"
            made = Port("made", "float32", port.shape)
            onnx_export(Component("layer", Merged(blind).eval(), (port,), (made,), {}), path, 18)
            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}
            requests[blind] = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
            requests[blind].infer([np.random.default_rng(0).standard_normal(port.shape, np.float32)])
    times: dict[str, list[float]] = {blind: [] for blind in requests}
    for round_ in range(ROUNDS):
        for blind in [*requests] if round_ % 2 else [*requests][::-1]:
            for _ in range(BLOCK):
                begin = time.perf_counter()
                requests[blind].infer()
                times[blind].append((time.perf_counter() - begin) * 1e3)
    whole = float(np.median(times[""]))
    rows = ((b or "none", f"{np.median(t):.2f}", f"{whole / np.median(t):.2f}x") for b, t in times.items())
    console.table("one merged attention layer", ("edge split off", "ms", "speed-up"), rows)


if __name__ == "__main__":
    main()
