"""What scenes look and sound like: pictures drawn with Pillow, a tone pattern for each thing, captions read aloud."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import wave
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edgemm.data._scene_world import COLOURS, SIDE, SIZES, Scene, Thing
from edgemm.errors import ToolchainError
from edgemm.runtime.audio import read_audio

GROUND = (60, 60, 60)
RATE = 16_000  # samples a second
SECONDS = {"small": 0.2, "big": 0.4}  # how long a thing sounds
GAP = 0.1  # seconds of silence between things
LOWEST, STEP = 300.0, 2 ** (1 / 3)  # pitch of the first colour, Hz; from each colour to the next
EDGE = 0.005  # seconds in which a tone swells and dies down: no clicks
WORDS_A_MINUTE = "160"
A, B = 0.35, 0.45  # half the width of the cross's arms; how far the star's inner corners are from its centre
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "star": [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate((1, B) * 5)],
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "cross": [
        *[(-A, -1), (A, -1), (A, -A), (1, -A), (1, A), (A, A)],
        *[(A, 1), (-A, 1), (-A, A), (-1, A), (-1, -A), (-A, -A)],
    ],
}  # corners, in units of the size


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene -> uint8[64,64,3], RGB; a thing is of its colour throughout, the rest is GROUND."""
    return paint(scene.things)


def paint(things: Iterable[Thing]) -> NDArray[np.uint8]:
    """A picture of things, later ones over earlier ones -> uint8[64,64,3], RGB."""
    image = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen = ImageDraw.Draw(image)
    for thing in things:
        r, colour = SIZES[thing.size], COLOURS[thing.colour]
        if thing.shape == "circle":
            pen.ellipse((thing.x - r, thing.y - r, thing.x + r, thing.y + r), colour)
        else:
            pen.polygon([(thing.x + r * x, thing.y + r * y) for x, y in OUTLINES[thing.shape]], colour)
    return np.array(image)


def tones(scene: Scene) -> NDArray[np.float32]:
    """A scene as sound -> float32[n], 16 kHz mono, full scale 1.

    Things in turn from left to right, in one column from top to bottom, with 0.1 s of silence between them: the pitch
    is the colour, the course the shape, the length the size.
    """
    silence = np.zeros(round(GAP * RATE), np.float32)
    pieces = [piece for thing in scene.in_order for piece in (silence, tone(thing))]
    return np.concatenate(pieces[1:])


def tone(thing: Thing) -> NDArray[np.float32]:
    """circle: steady; square: two beats; triangle: rising; diamond: falling; star: trilling; cross: three beats."""
    seconds = SECONDS[thing.size]
    at = np.arange(round(seconds * RATE)) / RATE
    course = at / seconds
    pitch = np.full(len(at), LOWEST * STEP ** list(COLOURS).index(thing.colour))
    loudness = 0.5 * np.minimum(1, np.minimum(at, seconds - at) / EDGE)
    if thing.shape in ("square", "cross"):
        beats = 2 if thing.shape == "square" else 3
        loudness *= (course * beats % 1) < 0.6
    elif thing.shape in ("triangle", "diamond"):
        rise = course - 0.5 if thing.shape == "triangle" else 0.5 - course
        pitch *= STEP ** (0.8 * rise)
    elif thing.shape == "star":
        pitch *= STEP ** (0.4 * np.sin(2 * np.pi * 25 * at))
    return (loudness * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)).astype(np.float32)


def spoken(text: str) -> NDArray[np.float32]:
    """A text read aloud -> float32[n], 16 kHz mono, full scale 1. Raises ToolchainError without espeak-ng."""
    if not shutil.which("espeak-ng"):
        raise ToolchainError("espeak-ng is not installed", fix="apt-get install espeak-ng")
    command = ["espeak-ng", "-v", "en-us", "-s", WORDS_A_MINUTE, "--stdout", text]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise ToolchainError(f"espeak-ng: {done.stderr.decode().strip()}", fix="apt-get install espeak-ng")
    return read_audio(done.stdout, RATE)


def png(picture: NDArray[np.uint8]) -> bytes:
    """uint8[H,W,3] as a PNG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def wav(sound: NDArray[np.float32]) -> bytes:
    """float32[n] at 16 kHz, full scale 1, as a WAV of 16 bits."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, RATE, len(sound), "NONE", ""))
        file.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()
