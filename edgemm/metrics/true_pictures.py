"""Share of pictures of which their captions are true, read by the rule of the drawn scenes: edgemm/data/scenes.py."""

from __future__ import annotations

import numpy as np

from edgemm.errors import InputError
from edgemm.metrics._answers import Outputs, Targets, Values, required
from edgemm.plugins import plugin

UNIT = "share"
OUTPUTS = ("picture",)


def values(outputs: Outputs, reference: Outputs, targets: Targets) -> Values:
    """1 where a picture shows the things that its caption names, no others, and each stands where it says.

    Raises InputError for a target that is missing, or no caption of scenes.
    """
    world, captions = plugin("data", "scenes"), required(targets)
    if strange := [caption for caption in captions if world.is_true(caption, [])]:
        raise InputError(
            f"{strange[0]!r} names nothing that a scene has"[:200],
            fix="write captions as `edgemm.data.scenes` does: a small red circle and a big blue square",
        )
    pictures = zip(captions, outputs["picture"], strict=True)
    return np.array([world.is_true(caption, world.seen(picture)) for caption, picture in pictures], np.float64)
