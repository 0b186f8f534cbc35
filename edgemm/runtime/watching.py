"""A bundle that watches: frames go in chunk by chunk, in constant memory; questions are answered at any moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgemm.errors import InputError
from edgemm.runtime.preprocess import FORMATS
from edgemm.runtime.query import Answer, Array, Encoded
from edgemm.runtime.recurrence import read_chunks
from edgemm.runtime.session import Session

FRAMES = "frames"  # what the component that watches is given
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
Frame = NDArray[np.uint8]


class Watch:
    """What was seen so far of one video, and the session that sees it. Raises InputError for a model that can't."""

    def __init__(self, session: Session) -> None:
        watching = [c for c in session.components.values() if c.spec["state"]]
        if not watching or session.sources.get("tensors") != {FRAMES}:
            raise InputError("the model watches no video", fix="use a bundle of a scenes_watcher")
        self.session, self.component, self.frames = session, watching[0], 0
        shapes = {port["name"]: port["shape"] for port in self.component.spec["inputs"]}
        self.chunk, self.side = int(shapes[FRAMES][1]), int(shapes[FRAMES][-1])
        self.before, self.after = self.component.spec["state"]
        self.state: Array | None = None

    def see(self, frames: Iterable[Frame]) -> None:
        """Go on with these frames, uint8[S,S,3] each, as many a second as in training; they are read by chunks."""
        waiting = iter(frames)
        while chunk := list(islice(waiting, self.chunk)):
            for frame in chunk:
                if frame.shape != (self.side, self.side, 3) or frame.dtype != np.uint8:
                    raise InputError(
                        f"a frame is {frame.dtype}{list(frame.shape)}", fix=f"give uint8[{self.side},{self.side},3]"
                    )
            pixels = np.stack(chunk).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
            known = {FRAMES: pixels[None]}
            if self.state is not None:
                known[self.before] = self.state
            self.state = read_chunks(self.component, known)[self.after]
            self.frames += len(chunk)

    def ask(self, text: str) -> Answer:
        """The answer by what was seen so far. InputError before the first frame."""
        if self.state is None:
            raise InputError("nothing was seen yet", fix="give frames first")
        return self.session.run(text=text, tensors=Encoded("tensors", {self.after: self.state}, self.session.model))


def frames_of(path: Path, side: int) -> Iterator[Frame]:
    """The images of a directory in the order of their names, or square frames one below the other in one image.

    -> uint8[side,side,3] each, read when it is asked for. Raises InputError.
    """
    if not path.is_dir():
        strip = _read(path)
        width = strip.width
        if strip.height % width:
            raise InputError(
                f"{path}: {strip.height} rows of pixels, {width} wide, are no square frames",
                fix="give a directory of frames, or one image of square ones, one below the other",
            )
        for top in range(0, strip.height, width):
            yield _fitted(strip.crop((0, top, width, top + width)), side)
        return
    paths = sorted(p for p in path.glob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"{path} has no images", fix=f"give a directory of frames: {', '.join(SUFFIXES)}")
    for frame in paths:
        yield _fitted(_read(frame), side)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"{path} can't be read as an image: {e}", fix="give PNG or JPEG files") from e


def _fitted(image: Image.Image, side: int) -> Frame:
    return np.asarray(image if image.size == (side, side) else image.resize((side, side)))
