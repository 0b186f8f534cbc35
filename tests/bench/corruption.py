"""10,000 forged, broken and replayed bundles against `install --require-signature`: none is taken, none crashes it.

python tests/bench/corruption.py [COUNT]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.corruptions import Forger, Forgery

MEMORY = Path("/dev/shm")  # each signature is brought to the disk: what is measured is not the disk


def main(count: int) -> int:
    """Prints one line of JSON; the exit code is 1 where something was accepted, crashed, or harmed the device."""
    start = time.monotonic()
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        forger = Forger(Path(folder))
        for i in range(count):
            forgery = forger.make(i)
            kinds[forgery.kind.partition(":")[0]] += 1
            if (outcome := forger.outcome(forgery)) != "refused":
                wrong.append(f"{i}: {forgery.kind}: {outcome}")
        unharmed = forger.unharmed()
        taken = forger.outcome(Forgery("untouched", forger.content[3], forger.signature[3])) == "accepted"
    seconds = round(time.monotonic() - start, 1)
    report = {
        "count": count,
        "wrong": wrong[:20],
        "unharmed": unharmed,
        "untouched taken": taken,
        "seconds": seconds,
        "kinds": dict(kinds),
    }
    sys.stdout.write(json.dumps({**report, "not refused": len(wrong)}) + "\n")
    return int(bool(wrong) or not unharmed or not taken)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
