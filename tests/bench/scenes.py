"""The scenes reasoner compressed for each of its tasks, each proved by all that its task is judged by; both scorecards.

    .venv/bin/python tests/bench/scenes.py [MODEL] [-o DIR] [--set PATH=VALUE]...

DIR gets a directory of reports a task, the bundles TASK.edgemm, and fp32.md and int8.md: all figures of the FP32 graphs
and of the bundles, on 1,000 test scenes. The exit code is the worst of `edgemm compress`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgemm.console import table

METRICS = {
    "answer": ("accuracy", "macro_f1"),
    "find_image": ("recall_at_1", "recall_at_5", "recall_at_10"),
    "find_audio": ("recall_at_1", "recall_at_5", "recall_at_10"),
    "caption": ("exact_match", "bleu"),
}
OTHERS = ("--recipe", "scenes_reasoner-int8", "--set", "target.budgets.min_speedup=null")  # not pruned, hardly faster


def edgemm(*arguments: str | Path) -> int:
    return subprocess.run([sys.executable, "-m", "edgemm", *map(str, arguments)], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="scenes_reasoner")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="for compress")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/scenes"))
    given = parser.parse_args()
    more = [argument for value in given.set for argument in ("--set", value)]
    codes, rows = [], []
    for task, metrics in METRICS.items():
        out = given.output / task
        judged = f"verify.metrics={json.dumps([{'use': name} for name in metrics])}"
        how = () if task == "answer" else OTHERS
        judging = "--set", f"task={task}", "--set", judged
        codes.append(edgemm("compress", given.model, *how, *judging, *more, "-o", out))
        (target,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["targets"]
        rows += rows_of(task, target)
        for bundle in (out / "x86-openvino").glob("*.edgemm"):
            shutil.copyfile(bundle, given.output / f"{task}.edgemm")
    table("compressed for x86-openvino", ("task", "verdict", "faster", "size", "metric", "FP32", "INT8", "bound"), rows)
    edgemm("evaluate", given.model, "--card", given.output / "fp32.md")
    if not any(codes):
        edgemm("evaluate", given.output, "--card", given.output / "int8.md")
    return max(codes)


def rows_of(task: str, target: dict[str, Any]) -> list[tuple[str, ...]]:
    latency, size = target["latency"], target["size"]
    low, high = latency["speedup_ci95"]
    faster = f"{latency['speedup_p50']:.2f}x ({low:.2f} to {high:.2f})"
    whole = (target["verdict"], faster, f"{size['compressed_bytes'] / size['fp32_bytes']:.2f}")
    rows = []
    for i, row in enumerate(target["accuracy"]):
        figures = (row["fp32"], row["compressed"], row["drop_ci95_upper"])
        rows.append((task if i == 0 else "", *(whole if i == 0 else ("", "", "")), row["metric"]))
        rows[-1] = (*rows[-1], *(f"{x:.4f}" for x in figures))
    return rows


if __name__ == "__main__":
    sys.exit(main())
