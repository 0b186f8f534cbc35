"""Full-size models as TensorRT-RTX engines: seconds, memory, and what runs in INT8, of each component.

    python tests/bench/tensorrt.py [clip vilt blip whisper ...]

Weights are random but for Whisper tiny.en, so nothing here is about accuracy. Each build must take under 30 s and 4 GB;
the exit code is 1 when one does not, or when a product that has Q/DQ does not run in INT8.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgemm.graph.profiles import profiles
from edgemm.plugins import validate
from edgemm.recipe import default_recipe, load_recipe
from edgemm.runtime.program import Program
from edgemm.stages.export import export
from edgemm.stages.load import load
from edgemm.stages.quantize import quantize
from edgemm.target import load_target
from tests.checkpoints import write
from tests.speech import whisper_checkpoint

MAX_SECONDS, MAX_GB = 30, 4
MODELS = ("clip", "vilt", "blip", "whisper")
BUILD = """
import json, resource, sys, time
from pathlib import Path
from edgemm.backends import tensorrt_rtx
from edgemm.target import load_target
graph, out, profile = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
tensorrt_rtx.library()
begin = time.perf_counter()
counts = tensorrt_rtx.compile_component(graph, out, profile, load_target("rtx"), {})
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # KiB; the engine is built in a child
print(json.dumps({**counts, "seconds": seconds, "gb": peak * 1024 / 1e9,
                  "megabytes": (out / f"{graph.stem}.engine").stat().st_size / 1e6}))
"""


def main(names: list[str]) -> int:
    """Build every component of `names` and print a line each; how many missed a limit."""
    target = load_target("rtx")
    missed = 0
    columns = (
        "seconds",
        "gb",
        "megabytes",
        "gemms",
        "quantized_gemms",
        "int8_gemms",
        "attention",
        "fused_attention",
        "float32_nodes",
    )
    print("engine".ljust(36), *(c.rjust(15) for c in columns), sep="")  # noqa: T201
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            runs = Path(place)
            model = str(whisper_checkpoint(runs / name) if name == "whisper" else write(name, runs / name, full=True))
            recipe = load_recipe(default_recipe(model), {"model": model, "data": "random:8", "calibration": 4})
            graphs = quantize(export(load(recipe, runs), recipe.export, runs), recipe, target, runs)
            program = validate(Program, graphs.json("program.json"), name).model_dump()
            shapes = profiles(program["components"], program["output"], target)
            for file in sorted(graphs.path.glob("*.onnx")):
                profile = json.dumps(shapes[file.stem.rpartition(".")[0]])
                command = [sys.executable, "-c", BUILD, str(file), place, profile]
                row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                cells = (f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
                print(f"{name} {file.stem}".ljust(36), *(c.rjust(15) for c in cells), sep="", flush=True)  # noqa: T201
                missed += (
                    row["seconds"] > MAX_SECONDS or row["gb"] > MAX_GB or row["int8_gemms"] != row["quantized_gemms"]
                )
    return missed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:] or list(MODELS)) else 0)
