"""Data sets, one a file. Each has `samples(split) -> list[Sample]` for the splits "train" and "test".

One may have `captions(split) -> list[Sample]`, too: media with what is said of them, for models that embed or
are asked nothing; and `watched(split)`: videos as the tensor `frames`, with questions.

Calibration, tuning and training read "train"; only verify and evaluate read "test". Two files are no
data sets of their own: manifest.py reads the user's files, noise.py makes some.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgemm import plugins
from edgemm.artifact import canonical, sha256_file, sha256_text
from edgemm.errors import InputError
from edgemm.recipe import Recipe
from edgemm.runtime.query import Query


@dataclass(frozen=True, slots=True)
class Sample:
    """One input with its answer; what a model or a data set does not have is None.

    id       unique in its split
    group    samples of one group share media: the cluster of the paired bootstrap
    image    file of the image, or its bytes;  audio  the same of a recording
    text     question, caption or words
    label    the right answer, or the transcript
    kind     what sort of sample it is, for tables
    boxes    a box [x0,y0,x1,y1] in 0..1000 for each word of `text`
    tensors  inputs that come ready made, by name, without the batch axis
    """

    id: str
    group: str
    image: Path | bytes | None = None
    text: str | None = None
    label: str | None = None
    kind: str = ""
    audio: Path | bytes | None = None
    boxes: tuple[tuple[int, int, int, int], ...] | None = None
    tensors: dict[str, NDArray[Any]] | None = field(default=None, compare=False)

    @property
    def query(self) -> Query:
        return Query(self.image, self.text, self.audio, self.boxes, self.tensors)


Program = Callable[[], dict[str, Any]]


def split(recipe: Recipe, program: Program) -> tuple[list[Sample], list[Sample]]:
    """(calibration, verification) of `recipe.data`, which never share a sample's media.

    recipe.data  NAME: a data set of this folder, calibration drawn by the seed from its train split and the
                 verification from its test split; random:N: seeded noise, N of each; else a file, see manifest.py
    program      gives the model's program.json, whose inputs random data follows
    """
    check_data(recipe)
    assert recipe.data
    if is_random(recipe):
        train, test = _random(recipe, program)
    elif not Path(recipe.data).exists():
        module = plugins.plugin("data", recipe.data)
        draw, watched = module.samples, {"frames"}
        if hasattr(module, "watched") and {t["tensor"] for t in program().get("tensors", ())} == watched:
            draw = module.watched
        elif hasattr(module, "captions") and (of_captions(program()) or not program().get("text")):
            draw = module.captions
        train, test = (_fit(draw(part), program()) for part in ("train", "test"))
    else:
        path = Path(recipe.data)
        found = _read_once(path, path.stat().st_mtime_ns, recipe.data_tolerance)
        train, test = (_fit(found[part], program()) for part in ("train", "test"))
    for name, rows in (("calibrate", train), ("verify", test)):
        if not rows:
            raise InputError(f"{recipe.data} has no samples to {name} on", fix="give more rows, or a split column")
    return stratified(train, recipe.calibration, recipe.seed), test[: recipe.verify.limit]


def stratified(samples: list[Sample], n: int, seed: int) -> list[Sample]:
    """`n` of the samples, drawn by `seed`: of each modality subset, text length and recording length its share.

    Lengths are in quarters of the samples that have such a medium: characters of a text, bytes of a recording. A
    stratum with less than one sample's share takes part by chance of the largest remainder.
    """
    if n >= len(samples):
        return samples
    lengths = [_lengths(s) for s in samples]
    known = [sorted(row[i] for row in lengths if row[i] >= 0) for i in range(2)]
    strata: dict[Any, list[Sample]] = defaultdict(list)
    for sample, row in zip(samples, lengths, strict=True):
        quarters = tuple(4 * bisect_left(k, v) // len(k) if v >= 0 else -1 for v, k in zip(row, known, strict=True))
        strata[quarters, sample.image is None, sample.tensors is None].append(sample)
    share = n / len(samples)
    takes = {key: int(share * len(rows)) for key, rows in strata.items()}
    by_remainder = sorted(strata, key=lambda key: (takes[key] - share * len(strata[key]), str(key)))
    for key in by_remainder[: n - sum(takes.values())]:
        takes[key] += 1
    rng = random.Random(seed)
    drawn = [s for key in sorted(strata, key=str) for s in rng.sample(strata[key], takes[key])]
    return rng.sample(drawn, n)


def _lengths(sample: Sample) -> tuple[int, int]:
    """Characters of the text and bytes of the recording; -1 for a medium that is not there."""
    audio = sample.audio
    size = -1 if audio is None else audio.stat().st_size if isinstance(audio, Path) else len(audio)
    return -1 if sample.text is None else len(sample.text), size


@cache
def _read_once(path: Path, changed_ns: int, tolerance: float) -> dict[str, list[Sample]]:
    """Every medium is decoded to see that it is whole: once, though five stages ask."""
    del changed_ns
    return plugins.plugin("data", "manifest").read(path, tolerance)


def _fit(samples: list[Sample], program: dict[str, Any]) -> list[Sample]:
    """The samples without what the model does not take; those of which no medium would be left are left out.

    For models that embed or paint, a caption is the text that belongs to the medium, and no right answer.
    """
    if of_captions(program):
        samples = [replace(s, text=s.text or s.label) for s in samples]
    takes = {name: bool(program.get(name)) for name in ("image", "text", "audio")}
    fitted = [
        replace(
            s,
            image=s.image if takes["image"] else None,
            text=s.text if takes["text"] else None,
            audio=s.audio if takes["audio"] else None,
            boxes=s.boxes if takes["text"] else None,
        )
        for s in samples
    ]
    if not (takes["image"] or takes["audio"]):
        return fitted
    pairs = zip(fitted, samples, strict=True)
    return [s for s, whole in pairs if s.image or s.audio or not (whole.image or whole.audio)]


def of_captions(program: dict[str, Any]) -> bool:
    """Whether the model embeds, or paints: texts are captions, and no questions."""
    return program["output"]["kind"] == "embeddings" or bool(program["output"].get("picture"))


def check_data(recipe: Recipe) -> None:
    """InputError unless the recipe names data that is there."""
    if recipe.data is None:
        raise InputError(
            f"{recipe.model} needs data to calibrate and to be judged on",
            fix="--data FILE (JSON Lines, CSV or Parquet with columns image, audio, text, label), or "
            "--data random:64 for latency alone",
        )
    if is_random(recipe):
        count = recipe.data.partition(":")[2]
        if not count.isdecimal() or not 1 <= int(count) <= 100_000:
            raise InputError(f"--data random:{count}: {count!r} is no number of samples", fix="--data random:64")
        return
    sets = [n for n in plugins.names("data") if n not in ("manifest", "noise")]
    if recipe.data not in sets and not Path(recipe.data).exists():
        raise InputError(f"no data {recipe.data!r}", fix=f"use {', '.join(sets)}, random:N, or the path of a data file")


def _random(recipe: Recipe, program: Program) -> tuple[list[Sample], list[Sample]]:
    count = int((recipe.data or "").partition(":")[2])
    draw = plugins.plugin("data", "noise").samples
    return draw(program(), count, 2 * recipe.seed), draw(program(), count, 2 * recipe.seed + 1)


def is_random(recipe: Recipe) -> bool:
    """Whether the data is noise, of which no accuracy can be told."""
    return (recipe.data or "").startswith("random:")


def digest(*splits: list[Sample]) -> str:
    """SHA-256 of all that makes samples what they are: ids, groups, texts, answers and the bytes of their media."""
    of_file = cache(sha256_file)

    def content(medium: Path | bytes | None) -> str | None:
        if isinstance(medium, Path):
            return of_file(medium)
        return None if medium is None else hashlib.sha256(medium).hexdigest()

    def tensors(sample: Sample) -> list[str]:
        ready = sorted((sample.tensors or {}).items())
        return [name + hashlib.sha256(value.tobytes()).hexdigest() for name, value in ready]

    rows = [
        [(s.id, s.group, s.text, s.label, s.boxes, content(s.image), content(s.audio), tensors(s)) for s in part]
        for part in splits
    ]
    return sha256_text(canonical(rows))
