"""A long video through a model that watches: what a frame costs and what the process holds as it gets longer.

    .venv/bin/python tests/bench/long_video.py BUNDLE [--frames 10000] [--every 1000]

The video is drawn clips one after the other, made as they are needed. At the end of each, questions are asked twice: of
the memory that has seen all, and of one that has seen its last chunk alone. The exit code is 1 when a frame costs
more than 1.2 times as much at the end as at the beginning, or the process has grown by more than 5 % since then.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from edgemm import console
from edgemm.data import scenes
from edgemm.runtime.session import load_bundle
from edgemm.runtime.watching import Watch

SLOWER, GROWTH = 1.2, 1.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    given = parser.parse_args()
    session, rng = load_bundle(given.bundle), random.Random(0)
    watch, clips = Watch(session), scenes.clips("test", 0)
    labels: dict[str, list[str]] = defaultdict(list)
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    warm_up = scenes.frames(next(clips))
    for _ in range(20):  # compiled, and with its buffers, before anything counts
        Watch(session).see(warm_up)
    marks: list[tuple[int, float, float, float]] = []
    spent: list[float] = []
    block: list[bool] = []
    while watch.frames < given.frames:
        clip = next(clips)
        frames = scenes.frames(clip)
        begin = time.perf_counter()
        watch.see(frames)
        spent.append((time.perf_counter() - begin) * 1e3 / len(frames))
        last = Watch(session)
        last.see(frames[-watch.chunk :])
        for question in scenes.clip_questions(clip, rng):
            labels[question.kind].append(question.answer)
            for name, seen in (("all", watch), ("last chunk", last)):
                right[question.kind, name].append(seen.ask(question.text).answer == question.answer)
            block.append(right[question.kind, "all"][-1])
        if watch.frames >= (len(marks) + 1) * given.every:
            marks.append((watch.frames, statistics.median(spent), rss_mb(), statistics.mean(block)))
            spent, block = [], []
    assert watch.state is not None
    console.table(
        f"{given.bundle.name}: a video of {watch.frames} frames, a state of {watch.state.nbytes} bytes",
        ("frames", "ms a frame", "of the first", "MB of process", "answers right"),
        [(n, f"{ms:.3f}", f"{ms / marks[0][1]:.2f}", f"{mb:.0f}", f"{share:.3f}") for n, ms, mb, share in marks],
    )
    console.table(
        "answers right, by kind of question",
        ("kind", "n", "most frequent answer", "last chunk alone", "all chunks"),
        [(k, len(v), *(f"{x:.3f}" for x in (most(v), *shares(right, k)))) for k, v in labels.items()],
    )
    return int(marks[-1][1] > SLOWER * marks[0][1] or marks[-1][2] > GROWTH * marks[0][2])


def most(answers: list[str]) -> float:
    return Counter(answers).most_common(1)[0][1] / len(answers)


def shares(right: dict[tuple[str, str], list[bool]], kind: str) -> list[float]:
    return [statistics.mean(right[kind, name]) for name in ("last chunk", "all")]


def rss_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


if __name__ == "__main__":
    sys.exit(main())
