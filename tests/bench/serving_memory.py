"""Memory of a server over 20,000 requests: resident size after 4,000 and at the end.

    make bench-serve
    .venv/bin/python tests/bench/serving_memory.py [BUNDLE] [--requests 20000]

Requests are files over HTTP from 16 connections, in thirds: an image and a question, the same with an image that was
never seen, and one that is refused (no image; a broken one; a text that is too long; a path that is not there).
The exit code is 1 when the server grew by more than 5 %, or answered anything with 5xx.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from edgemm import console
from edgemm.data.easy_vqa import samples

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.serving import serving

CONNECTIONS = 16
WARM = 0.2  # of the requests: by then caches are full
GROWTH = 1.05
BOUNDARY = "edgemm"


def form(image: bytes | None, text: str | None) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="'
    parts = []
    if image is not None:
        parts.append(f'{head}image"; filename="i.png"\r\n\r\n'.encode() + image + b"\r\n")
    if text is not None:
        parts.append(f'{head}text"\r\n\r\n{text}\r\n'.encode())
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    return f"POST /v1/answer HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n".encode() + (
        f"content-length: {len(body)}\r\n\r\n".encode() + body
    )


def requests(count: int) -> list[bytes]:
    rng, drawn = np.random.default_rng(0), samples("test")[:500]
    made = []
    for i in range(count):
        sample = drawn[i % len(drawn)]
        if i % 3 == 0:
            made.append(form(sample.image.read_bytes(), sample.text))
        elif i % 3 == 1:
            noise = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(noise, "PNG")
            made.append(form(noise.getvalue(), sample.text))
        else:
            bad = (form(None, "what?"), form(b"no image", "what?"), form(None, "what " * 99))
            made.append((*bad, b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")[i % 4])
    return made


async def send(address: str, todo: list[bytes], statuses: Counter[int]) -> None:
    """All of `todo` over CONNECTIONS connections that stay open."""
    pending = iter(todo)

    async def one() -> None:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        for request in pending:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
            statuses[int(head.split()[1])] += 1
        writer.close()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))


def resident_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("out/x86-openvino/reasoner-x86-openvino.edgemm"))
    parser.add_argument("--requests", type=int, default=20_000)
    arguments = parser.parse_args()
    todo, statuses = requests(arguments.requests), Counter[int]()
    warm = round(WARM * len(todo))
    with serving(arguments.bundle) as server:
        asyncio.run(send(server.http, todo[:warm], statuses))
        before = resident_mb(server.process.pid)
        begin = time.perf_counter()
        asyncio.run(send(server.http, todo[warm:], statuses))
        rate = (len(todo) - warm) / (time.perf_counter() - begin)
        after = resident_mb(server.process.pid)
    counts = {str(status): n for status, n in sorted(statuses.items())}
    console.result_line({"rss_mb": [round(before, 1), round(after, 1)], "statuses": counts, "per_s": round(rate)})
    return int(after > GROWTH * before or any(status >= 500 for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
