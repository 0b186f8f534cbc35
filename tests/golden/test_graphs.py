"""What the compressed graphs are made of: kinds of nodes, and where Q/DQ stands.

EDGEMM_UPDATE_GOLDEN=1 pytest tests/golden writes the files anew.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import onnx
import pytest

GOLDEN = Path(__file__).parent / "graphs"


def histogram(path: Path) -> dict[str, object]:
    """Node counts, and for each kind of node how many of its inputs come from a DequantizeLinear."""
    graph = onnx.load(path).graph
    maker = {output: node.op_type for node in graph.node for output in node.output}
    kinds = Counter(node.op_type for node in graph.node)
    quantized = Counter(node.op_type for node in graph.node for i in node.input if maker.get(i) == "DequantizeLinear")
    return {"nodes": dict(sorted(kinds.items())), "inputs_from_dequantize": dict(sorted(quantized.items()))}


@pytest.mark.parametrize("component", ["image_encoder", "text_encoder", "fusion"])
@pytest.mark.parametrize("kind", ["graph", "quantized"])
def test_graph(main_job: Path, component: str, kind: str) -> None:
    runs = sorted((main_job / "out" / ".runs").glob(f"{kind}-*"))
    found = [histogram(run / f"{component}.onnx") for run in runs]
    path = GOLDEN / f"{kind}-{component}.json"
    text = json.dumps(sorted(found, key=json.dumps), indent=1) + "\n"
    if os.environ.get("EDGEMM_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_nothing_but_products_and_residual_sums_is_quantized() -> None:
    for path in GOLDEN.glob("quantized-*.json"):
        for found in json.loads(path.read_text(encoding="utf-8")):
            assert not {"Softmax", "LayerNormalization", "Gather", "Erf"} & found["inputs_from_dequantize"].keys()
