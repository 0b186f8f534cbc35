"""Share of answers that are the FP32 model's own: what can be said without labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

UNIT = "share"


def values(outputs: NDArray[Any], reference: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64]:
    """1 where the best answer is the FP32 model's."""
    del labels
    return (outputs.argmax(1) == reference.argmax(1)).astype(np.float64)
