"""edgemm targets"""

from __future__ import annotations

from edgemm.cli._files import group
from edgemm.target import load_target

app = group("targets", load_target)
