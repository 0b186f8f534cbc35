"""Training of the painter on drawn scenes: pictures as codes, plans from captions, codes from plans.

Stage 1, pictures, trains the autoencoder. The rest learns of each caption the plainest scene of which the same can be
said: in stage 2, plans, what stands where, token by token, and of which thing each word of the caption is ("left of"
means nothing without); in stage 3, codes, those that the autoencoder makes of its picture. At the end a recogniser that
was trained apart judges as well.

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
from collections.abc import Callable
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
from edgemm.reasoner.album import Album
from edgemm.reasoner.painter import Painter, PainterConfig
from edgemm.reasoner.recogniser import Recogniser, as_pixels, train_recogniser
from edgemm.reasoner.scenes_train import WARM_UP, batches
from edgemm.training import TrainPainter

COLUMNS = ("stage", "epoch", "seconds", "loss", "right")
STAGES = {  # parts of the model that learn
    "pictures": ("pictures",),
    "plans": ("text_encoder", "embed", "layers", "head", "mentioned"),
    "codes": ("filling",),
}
AT_ONCE = 100  # pictures judged at a time
RECOGNISER_EPOCHS = 3


def train_painter(world: ModuleType, recipe: TrainPainter, seed: int, out: Path) -> tuple[Painter, Tokenizer]:
    """Train on scenes that `world` draws; `out` gets checkpoint.pt after each epoch and log.csv; a second call resumes.

    `out` gets judged.json, too: see `judge`.
    Raises InputError for data that draws no scenes.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(seed)
    album = Album.build(world, recipe.scenes, recipe.validation_scenes, seed)
    sizes = {"vocab_size": album.tokenizer.get_vocab_size(), "things": max(map(len, album.told)), "kinds": album.kinds}
    model = Painter(PainterConfig.from_dict({**sizes, "image_size": album.images.shape[1], **recipe.model}))
    run = _Run(model, album, recipe, seed, out)
    run.stage("pictures", recipe.picture_epochs)
    run.stage("plans", recipe.plan_epochs)
    run.stage("codes", recipe.code_epochs)
    recogniser = train_recogniser(world, album.scenes[: recipe.recogniser_scenes], RECOGNISER_EPOCHS, seed)
    judged = judge(model.eval(), album, recogniser)
    log("held-out captions: " + ", ".join(f"{name.replace('_', ' ')} {share:.4f}" for name, share in judged.items()))
    write_atomic(out / "judged.json", (json.dumps(judged, indent=1) + "\n").encode())
    return model.eval(), album.tokenizer


class _Run:
    """All stages over one model, with a checkpoint after every epoch."""

    def __init__(self, model: Painter, album: Album, recipe: TrainPainter, seed: int, out: Path) -> None:
        self.model, self.album, self.recipe, self.seed, self.out = model, album, recipe, seed, out
        self.plans = torch.tensor([model.config.plan(things) for things in album.told])
        self.codes = torch.zeros(0)
        self.checkpoint = torch.load(p, weights_only=True) if (p := out / "checkpoint.pt").exists() else None
        if self.checkpoint is None:
            with (out / "log.csv").open("w", newline="") as f:
                csv.writer(f).writerow(COLUMNS)
        else:
            model.load_state_dict(self.checkpoint["model"])

    def stage(self, name: str, epochs: int) -> None:
        kept = self.checkpoint
        stages = list(STAGES)
        if kept and stages.index(kept["stage"]) > stages.index(name):
            return
        if name == "codes":
            self.codes = codes_of(self.model.eval(), self.album)
        optimizer = torch.optim.AdamW(
            [p for part in STAGES[name] for p in self.model.get_submodule(part).parameters()],
            lr=self.option(name, "rate"),
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
            right = JUDGES[name](self.model.eval(), self.album)
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
        model = self.model
        rng = random.Random(f"{self.seed} {stage} {epoch}")
        torch.manual_seed(rng.getrandbits(63))
        model.train()
        loss_of = {"pictures": self.redrawn, "plans": self.told, "codes": self.filled}[stage]
        parts = batches(rng.sample(self.album.training, len(self.album.training)), self.option(stage, "batch"))
        parts = [part for part in parts if len(part) > 1]
        steps, total = epochs * len(parts), 0.0
        for step, part in enumerate(progress(parts, f"{stage} {epoch + 1}/{epochs}"), epoch * len(parts)):
            rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = self.option(stage, "rate") * rate
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
                loss = loss_of(part)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total / len(parts)

    def option(self, stage: str, name: str) -> Any:
        """Of the recipe: the largest learning rate, or the batch, of a stage."""
        return getattr(self.recipe, f"{stage.removesuffix('s')}_{name}")

    def redrawn(self, part: list[int]) -> Tensor:
        """How far pictures are from themselves by way of codes; things count as much as the ground around them."""
        pixels = as_pixels(self.album.images[part])
        made = self.model.pictures(pixels)
        ground = pixels.flatten(2).median(2).values[..., None, None]
        weight = 1 + 4 * ((pixels - ground).abs().amax(1, keepdim=True) > 0.05)
        away = made.float() - pixels
        return ((away.abs() + away.square()) * weight).mean()

    def told(self, part: list[int]) -> Tensor:
        """How unlikely the plans are after the captions, and of which thing each word is."""
        plans = self.plans[part]
        ids, mask = self.album.said(part)
        words = self.model.text_encoder(ids, mask)
        begun = F.pad(plans[:, :-1], (1, 0), value=self.model.config.begin)
        unlikely = F.cross_entropy(self.model.follow(begun, words, mask).float().flatten(0, 1), plans.flatten())
        mentions = self.album.mentions[part, : ids.shape[1]].flatten()
        return unlikely + F.cross_entropy(self.model.mentioned(words).float().flatten(0, 1), mentions, ignore_index=-1)

    def filled(self, part: list[int]) -> Tensor:
        """How unlikely the codes are after the plans."""
        logits = self.model.filling(self.plans[part]).float()
        return F.cross_entropy(logits.flatten(0, 2), self.codes[part].flatten())


@torch.inference_mode()
def codes_of(model: Painter, album: Album) -> Tensor:
    """Of the plainest scenes to learn from, int64[N,P,C]."""
    parts = batches(album.training, AT_ONCE)
    return torch.cat([model.pictures.rounded(as_pixels(album.plain[part]))[1] for part in parts])


def recoded(model: Painter, album: Album, index: list[int]) -> NDArray[np.uint8]:
    """Pictures by way of their own codes, uint8[N,S,S,3]."""
    with torch.inference_mode():
        pixels = torch.cat([model.pictures(as_pixels(album.images[part])) for part in batches(index, AT_ONCE)]).clamp(
            -1, 1
        )
    made: NDArray[np.uint8] = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return made


def painted(model: Painter, album: Album, index: list[int]) -> NDArray[np.uint8]:
    """Pictures from the captions, uint8[N,S,S,3]."""
    made: NDArray[np.uint8] = np.concatenate(
        [model.paint(*album.said(part)).numpy() for part in batches(index, AT_ONCE)]
    )
    return made


def share_planned(model: Painter, album: Album) -> float:
    """Of the validation scenes the share of which the plan is that of the plainest scene."""
    wanted = torch.tensor([model.config.plan(album.told[i]) for i in album.validation])
    written = [model.write(*album.said(part)) for part in batches(album.validation, AT_ONCE)]
    return float((torch.cat(written) == wanted).all(1).float().mean())


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


JUDGES: dict[str, Callable[[Painter, Album], float]] = {
    "pictures": lambda model, album: share_true(album, recoded(model, album, album.validation)),
    "plans": share_planned,
    "codes": lambda model, album: share_true(album, painted(model, album, album.validation)),
}
