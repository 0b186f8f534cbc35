"""What a measurement, and the arithmetic of INT8, depend on: this machine."""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path
from typing import Literal, get_args

CPUINFO = Path("/proc/cpuinfo")
# How a CPU multiplies INT8, the newest first; with vnni or amx in the name, it adds in 32 bits at once.
Isa = Literal["amx", "avx512_vnni", "avx_vnni", "avx512", "avx2"]
FLAGS = {"amx": "amx_int8", "avx512": "avx512bw"}


def host() -> dict[str, str]:
    """CPU model and processors, instruction set for INT8, system."""
    cpu = platform.processor() or platform.machine()
    if names := _lines("model name"):
        cpu = f"{names[0]} x{len(names)}"
    return {
        "cpu": cpu,
        "isa": host_isa() or "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def host_isa() -> Isa | None:
    """Of this machine; None where it is none of x86's."""
    flags = {flag for line in _lines("flags")[:1] for flag in line.split()}
    return next((isa for isa in get_args(Isa) if FLAGS.get(isa, isa) in flags), None)


def adds_in_16_bits(isa: Isa | None) -> bool:
    """Whether INT8 products are added in pairs in int16, which saturates: see graph/saturation.py."""
    return isa in ("avx512", "avx2")


def release_memory() -> None:
    """Give freed memory back to the system; glibc keeps it, a tenth of the peak of a compression."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _lines(key: str) -> list[str]:
    """The values of a key of /proc/cpuinfo, one a processor."""
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return []
    rows = (line.partition(":") for line in text.splitlines())
    return [value.strip() for name, _, value in rows if name.strip() == key]
