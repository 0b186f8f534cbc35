"""edgemm: makes a trained multimodal model run, provably as good, on the small machine where it is needed."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemm.pipeline import compress
    from edgemm.recheck import verify_bundle as verify
    from edgemm.runtime.session import load_bundle

# ONNX Runtime's own wheels send events to its maker and keep an id of the machine, unless this is set at their start.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__version__ = "0.1.0"
__all__ = ["compress", "load_bundle", "verify"]

_HOMES = {
    "compress": ("edgemm.pipeline", "compress"),
    "load_bundle": ("edgemm.runtime.session", "load_bundle"),
    "verify": ("edgemm.recheck", "verify_bundle"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgemm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
