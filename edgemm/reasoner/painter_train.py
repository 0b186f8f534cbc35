"""Training of the painter on drawn scenes: first pictures as codes, then codes from captions.

Stage 1, pictures, trains the autoencoder; stage 2, captions, the decoder of codes on the codes of stage 1, which are
made once. At the end a recogniser that was trained apart judges as well.

Every epoch seeds itself from (seed, stage, epoch), so a run that was killed continues bit for bit.

Axes: N scenes, T tokens, K words.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.artifact import write_atomic
from edgemm.console import log, progress
from edgemm.errors import InputError
from edgemm.reasoner.corpus import build_tokenizer
from edgemm.reasoner.painter import Painter, PainterConfig
from edgemm.reasoner.recogniser import Recogniser, train_recogniser
from edgemm.reasoner.scenes_train import WARM_UP, batches
from edgemm.recipe import TrainPainter

COLUMNS = ("stage", "epoch", "seconds", "loss", "right")
STAGES = ("pictures", "captions")
NEEDS = ("scenes", "draw", "caption", "is_true", "seen")
AT_ONCE = 100  # pictures judged at a time
RECOGNISER_EPOCHS = 3


@dataclass(slots=True)
class Album:
    """Scenes as a painter sees them.

    scenes    of the world, those to learn from before those to judge by (`held` of them, whose like is never learned)
    images    uint8[N,S,S,3];  captions  of each;  ids int64[N,K]  their tokens, padded with 0
    places    int64[N,2*things]  x and y of each thing in the order of the caption, pixels; -1: no such thing
    """

    world: Any
    scenes: list[Any]
    images: NDArray[np.uint8]
    captions: list[str]
    ids: Tensor
    places: Tensor
    tokenizer: Tokenizer
    held: int

    @classmethod
    def build(cls, world: ModuleType, train: int, held: int, seed: int) -> Album:
        """Draw `train` scenes to learn from and `held` of the test split. InputError for data that draws none."""
        if lacking := [name for name in NEEDS if not hasattr(world, name)]:
            raise InputError(f"{world.__name__} has no {lacking[0]}()", fix="train on data that draws scenes: scenes")
        drawn = [s for split, n in (("train", train), ("test", held)) for s in islice(world.scenes(split, seed), n)]
        captions = [world.caption(s) for s in drawn]
        tokenizer = build_tokenizer(sorted(set(captions[:train])), ())
        rows = [e.ids for e in tokenizer.encode_batch(captions)]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = torch.tensor(values)
        places = torch.full((len(drawn), 2 * max(len(s.things) for s in drawn)), -1)
        for row, scene, said in zip(places, drawn, captions, strict=True):
            told = sorted((said.index(f"a {t.size} {t.name}"), t.x, t.y) for t in scene.things)
            spots = [xy for _, x, y in told for xy in (x, y)]
            row[: len(spots)] = torch.tensor(spots)
        images = np.stack([world.draw(s) for s in drawn])
        return cls(world, drawn, images, captions, ids, places, tokenizer, held)

    @property
    def training(self) -> list[int]:
        return list(range(len(self.scenes) - self.held))

    @property
    def validation(self) -> list[int]:
        return list(range(len(self.scenes) - self.held, len(self.scenes)))

    def pixels(self, index: list[int]) -> Tensor:
        """float32[N,3,S,S], -1..1."""
        return torch.from_numpy(self.images[index]).permute(0, 3, 1, 2).float() / 127.5 - 1

    def said(self, index: list[int]) -> tuple[Tensor, Tensor]:
        """The captions' ids and mask int64[N,K], as long as the longest."""
        ids = self.ids[index]
        ids = ids[:, : int((ids != 0).sum(1).max())]
        return ids, (ids != 0).long()


def train_painter(world: ModuleType, recipe: TrainPainter, seed: int, out: Path) -> tuple[Painter, Tokenizer]:
    """Train on scenes that `world` draws; `out` gets checkpoint.pt after each epoch and log.csv; a second call resumes.

    `out` gets judged.json, too: see `judge`.
    Raises InputError for data that draws no scenes.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(seed)
    album = Album.build(world, recipe.scenes, recipe.validation_scenes, seed)
    sizes = {"vocab_size": album.tokenizer.get_vocab_size(), "things": album.places.shape[1] // 2}
    model = Painter(PainterConfig.from_dict({**sizes, "image_size": album.images.shape[1], **recipe.model}))
    run = _Run(model, album, recipe, seed, out)
    run.stage("pictures", recipe.picture_epochs)
    run.stage("captions", recipe.caption_epochs)
    recogniser = train_recogniser(world, album.scenes[: recipe.recogniser_scenes], RECOGNISER_EPOCHS, seed)
    judged = judge(model.eval(), album, recogniser)
    log("held-out captions: " + ", ".join(f"{name.replace('_', ' ')} {share:.4f}" for name, share in judged.items()))
    write_atomic(out / "judged.json", (json.dumps(judged, indent=1) + "\n").encode())
    return model.eval(), album.tokenizer


class _Run:
    """Both stages over one model, with a checkpoint after every epoch."""

    def __init__(self, model: Painter, album: Album, recipe: TrainPainter, seed: int, out: Path) -> None:
        self.model, self.album, self.recipe, self.seed, self.out = model, album, recipe, seed, out
        self.tokens = torch.zeros(0)
        self.checkpoint = torch.load(p, weights_only=True) if (p := out / "checkpoint.pt").exists() else None
        if self.checkpoint is None:
            with (out / "log.csv").open("w", newline="") as f:
                csv.writer(f).writerow(COLUMNS)
        else:
            model.load_state_dict(self.checkpoint["model"])

    def stage(self, name: str, epochs: int) -> None:
        kept = self.checkpoint
        if kept and STAGES.index(kept["stage"]) > STAGES.index(name):
            return
        painting = name == "captions"
        if painting:
            self.model.pictures.requires_grad_(requires_grad=False)
            self.tokens = tokens_of(self.model.eval(), self.album, self.album.training)
        learned = self.model if painting else self.model.pictures
        optimizer = torch.optim.AdamW(
            [p for p in learned.parameters() if p.requires_grad],
            lr=self.rate(name),
            betas=(0.9, 0.98),
            weight_decay=self.recipe.weight_decay,
        )
        first = 0
        if kept and kept["stage"] == name:
            first = kept["epoch"] + 1
            optimizer.load_state_dict(kept["optimizer"])
            log(f"resume {name} at epoch {first + 1}")
        for epoch in range(first, epochs):
            begin = time.monotonic()
            loss = self.epoch(name, epoch, epochs, optimizer)
            pictures = painted if painting else recoded
            right = share_true(self.album, pictures(self.model.eval(), self.album, self.album.validation))
            seconds = time.monotonic() - begin
            log(f"{name} epoch {epoch + 1}/{epochs}: loss {loss:.4f}, right {right:.4f}, {seconds:.0f} s")
            state = io.BytesIO()
            torch.save(
                {"stage": name, "epoch": epoch, "model": self.model.state_dict(), "optimizer": optimizer.state_dict()},
                state,
            )
            write_atomic(self.out / "checkpoint.pt", state.getvalue())
            with (self.out / "log.csv").open("a", newline="") as f:
                csv.writer(f).writerow([name, epoch + 1, f"{seconds:.0f}", f"{loss:.5f}", f"{right:.5f}"])

    def epoch(self, stage: str, epoch: int, epochs: int, optimizer: torch.optim.Optimizer) -> float:
        recipe, model = self.recipe, self.model
        rng = random.Random(f"{self.seed} {stage} {epoch}")
        torch.manual_seed(rng.getrandbits(63))
        model.train()
        size = recipe.picture_batch if stage == "pictures" else recipe.caption_batch
        parts = batches(rng.sample(self.album.training, len(self.album.training)), size)
        parts = [part for part in parts if len(part) > 1]
        steps, total = epochs * len(parts), 0.0
        for step, part in enumerate(progress(parts, f"{stage} {epoch + 1}/{epochs}"), epoch * len(parts)):
            rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = self.rate(stage) * rate
            loss = self.redrawn(part) if stage == "pictures" else self.told(part)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total / len(parts)

    def rate(self, stage: str) -> float:
        """The largest learning rate."""
        return self.recipe.picture_rate if stage == "pictures" else self.recipe.caption_rate

    def redrawn(self, part: list[int]) -> Tensor:
        """How far pictures are from themselves by way of codes; things count as much as the ground around them."""
        pixels = self.album.pixels(part)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            made = self.model.pictures(pixels)
        ground = pixels.flatten(2).median(2).values[..., None, None]
        weight = 1 + 4 * ((pixels - ground).abs().amax(1, keepdim=True) > 0.05)
        away = made.float() - pixels
        return ((away.abs() + away.square()) * weight).mean()

    def told(self, part: list[int]) -> Tensor:
        """How unlikely the tokens of pictures are after their captions."""
        tokens = self.tokens[part]
        begin = torch.full((len(part), 1), self.model.config.begin)
        logits = self.model(torch.cat([begin, tokens[:, :-1]], 1), *self.album.said(part))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@torch.inference_mode()
def tokens_of(model: Painter, album: Album, index: list[int]) -> Tensor:
    """What the decoder learns to write of these scenes, int64[N,places+cells]."""
    config = model.config
    places = album.places[index] + config.codes
    places[album.places[index] < 0] = config.nowhere
    codes = [model.pictures.rounded(album.pixels(part))[1] for part in batches(index, AT_ONCE)]
    return torch.cat([places, torch.cat(codes)], 1)


def recoded(model: Painter, album: Album, index: list[int]) -> NDArray[np.uint8]:
    """Pictures by way of their own codes, uint8[N,S,S,3]."""
    with torch.inference_mode():
        pixels = torch.cat([model.pictures(album.pixels(part)) for part in batches(index, AT_ONCE)]).clamp(-1, 1)
    made: NDArray[np.uint8] = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return made


def painted(model: Painter, album: Album, index: list[int]) -> NDArray[np.uint8]:
    """Pictures from the captions, uint8[N,S,S,3]."""
    made: NDArray[np.uint8] = np.concatenate(
        [model.paint(*album.said(part)).numpy() for part in batches(index, AT_ONCE)]
    )
    return made


def judge(model: Painter, album: Album, recogniser: Recogniser) -> dict[str, float]:
    """Shares of the held-out captions: `by_rule` and `by_recogniser` those whose picture is as they say.

    recogniser_on_drawings   those that the recogniser takes the right picture for true, and so the most that it can say
    """
    pictures = painted(model, album, album.validation)
    captions = [album.captions[i] for i in album.validation]

    def by_recogniser(pictures: NDArray[np.uint8]) -> float:
        pairs = zip(captions, pictures, strict=True)
        return float(np.mean([album.world.is_true(c, recogniser.recognise(album.world, p)) for c, p in pairs]))

    return {
        "by_rule": share_true(album, pictures),
        "by_recogniser": by_recogniser(pictures),
        "recogniser_on_drawings": by_recogniser(album.images[album.validation]),
    }


def share_true(album: Album, pictures: NDArray[np.uint8]) -> float:
    """Of pictures for the validation scenes the share of which the caption is true, by rule on the pixels."""
    judged = zip(album.validation, pictures, strict=True)
    return float(np.mean([album.world.is_true(album.captions[i], album.world.seen(picture)) for i, picture in judged]))
