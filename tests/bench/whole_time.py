"""From a model to its verdict: seconds of each step, and the memory, for 88 million parameters and 300 samples.

    .venv/bin/python tests/bench/whole_time.py [-o DIR]

ViT-B/32 of random weights, whose head is fitted to the colours of easy-VQA's training images, so that there are answers
to lose; 300 images of its train split give ranges, and 300 of its test split judge. The limits are 4 minutes on two
cores, and 4 GB of memory of the largest process; the exit code is 1 when one is missed. What edgemm logs says where the
time goes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgemm.console import table

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests import colours

MAX_SECONDS, MAX_GB = 240, 4
SAMPLES = 300
VERDICTS = (0, 4, 5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="directory of the reports; default: none is kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model = colours.checkpoint(root / "vit-b-32", 224, patch_size=32, initializer_range=0.04)
        parameters = (model / "model.safetensors").stat().st_size / 4e6  # of 4 bytes each
        data = colours.manifest(root / "colours.jsonl", SAMPLES)
        out = arguments.output or root / "out"
        command = [sys.executable, "-m", "edgemm", "compress", str(model), "--data", str(data)]
        begin = time.monotonic()
        done = subprocess.run(
            [*command, "--set", f"calibration={SAMPLES}", "--set", f"verify.limit={SAMPLES}", "-o", str(out)],
            check=False,
        )
        seconds = time.monotonic() - begin
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9  # KiB
        (target,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["targets"]
        (accuracy,), latency = target["accuracy"], target["latency"]
        share = target["int8_share"][-1]
    figures = {
        "parameters, millions": f"{parameters:.0f}",
        "seconds (limit 240)": f"{seconds:.0f}",
        "memory, GB (limit 4)": f"{memory:.2f}",
        "verdict": target["verdict"],
        "accuracy": f"{accuracy['fp32']:.4f} to {accuracy['compressed']:.4f}, bound {accuracy['drop_ci95_upper']:.4f}",
        "faster": "{:.2f}x ({:.2f} to {:.2f})".format(latency["speedup_p50"], *latency["speedup_ci95"]),
        "share in INT8, its ceiling": f"{share['share']:.3f}, {share['ceiling']:.2f}x",
    }
    table("ViT-B/32, from the checkpoint to the verdict", ("", "seen"), figures.items())
    return int(done.returncode not in VERDICTS or seconds > MAX_SECONDS or memory > MAX_GB)


if __name__ == "__main__":
    sys.exit(main())
