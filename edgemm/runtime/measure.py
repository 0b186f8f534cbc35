"""Latency and memory of compiled models, as they run on the device.

`python -m edgemm.runtime.measure DIRECTORY INPUTS.npz` runs a model in a process of its own and prints its
peak resident memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgemm.errors import ToolchainError
from edgemm.runtime.query import Tensors
from edgemm.runtime.session import Session, open_directory

WARM_UP = 20
BLOCK = 10
RESAMPLES = 5_000
MEMORY_RUNS = 5
T = TypeVar("T")


def abba(
    a: Callable[[T], object], b: Callable[[T], object], inputs: Sequence[T], rounds: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Time two models in turn -> ms[rounds, 2 * BLOCK] of each.

    A round is four blocks A B B A of BLOCK inferences, so a drift of the machine falls on both alike.
    Warm-up inferences are thrown away.
    """
    for call in (a, b):
        for i in range(WARM_UP):
            call(inputs[i % len(inputs)])

    def block(call: Callable[[T], object]) -> list[float]:
        times = []
        for i in range(BLOCK):
            tensors = inputs[i % len(inputs)]
            begin = time.perf_counter()
            call(tensors)
            times.append((time.perf_counter() - begin) * 1e3)
        return times

    of_a, of_b = [], []
    for _ in range(rounds):
        first, second, third, fourth = block(a), block(b), block(b), block(a)
        of_a.append(first + fourth)
        of_b.append(second + third)
    return np.array(of_a), np.array(of_b)


def ratio_interval(a: NDArray[np.float64], b: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % interval of median(a) / median(b), by a bootstrap over rounds [rounds, samples]."""
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(a), len(a))
        ratios.append(np.median(a[rows]) / np.median(b[rows]))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def peak_memory_mb(directory: Path, tensors: Tensors) -> float:
    """Peak resident memory, in MB (10^6 bytes), of a fresh process that loads only the runtime and runs the model.

    tensors   a pre-processed input
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **dict[str, Any](tensors))
        command = [sys.executable, "-m", "edgemm.runtime.measure", str(directory), str(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolchainError(f"the model in {directory} does not run by itself: {done.stderr}", fix="edgemm doctor")
    return float(json.loads(done.stdout)["peak_mb"])


def _run_alone(directory: Path, inputs: Path) -> dict[str, float]:
    session: Session = open_directory(directory)
    with np.load(inputs) as stored:
        tensors = {name: stored[name] for name in stored.files}
    for _ in range(MEMORY_RUNS):
        session.complete(tensors)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak_mb": peak_kib * 1024 / 1e6}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run_alone(Path(sys.argv[1]), Path(sys.argv[2]))))
