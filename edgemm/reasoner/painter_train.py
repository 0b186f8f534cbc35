"""Training of the painter on drawn scenes: first pictures as codes, then codes from captions.

Stage 1, pictures, trains the autoencoder. The decoder of codes learns of each caption the plainest scene of which the
same can be said, on codes of stage 1, which are made once: in stage 2, places, only where things stand, which is a
twentieth of the tokens and the part that takes understanding; in stage 3, captions, the codes as well. Both ask the
words, too, of which thing each is: "left of" means nothing without. At the end a recogniser that was trained apart
judges as well.

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

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgemm.artifact import write_atomic
from edgemm.console import log, progress
from edgemm.reasoner.album import Album
from edgemm.reasoner.painter import Painter, PainterConfig
from edgemm.reasoner.recogniser import Recogniser, as_pixels, train_recogniser
from edgemm.reasoner.scenes_train import WARM_UP, batches
from edgemm.recipe import TrainPainter

COLUMNS = ("stage", "epoch", "seconds", "loss", "right")
STAGES = ("pictures", "places", "captions")
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
    sizes = {"vocab_size": album.tokenizer.get_vocab_size(), "things": album.places.shape[1] // 2}
    model = Painter(PainterConfig.from_dict({**sizes, "image_size": album.images.shape[1], **recipe.model}))
    run = _Run(model, album, recipe, seed, out)
    run.stage("pictures", recipe.picture_epochs)
    run.stage("places", recipe.place_epochs)
    run.stage("captions", recipe.caption_epochs)
    recogniser = train_recogniser(world, album.scenes[: recipe.recogniser_scenes], RECOGNISER_EPOCHS, seed)
    judged = judge(model.eval(), album, recogniser)
    log("held-out captions: " + ", ".join(f"{name.replace('_', ' ')} {share:.4f}" for name, share in judged.items()))
    write_atomic(out / "judged.json", (json.dumps(judged, indent=1) + "\n").encode())
    return model.eval(), album.tokenizer


class _Run:
    """All stages over one model, with a checkpoint after every epoch."""

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
        painting = name != "pictures"
        if painting and not self.tokens.numel():
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
            loss = self.redrawn(part) if stage == "pictures" else self.told(part, codes=stage == "captions")
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
        pixels = as_pixels(self.album.images[part])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            made = self.model.pictures(pixels)
        ground = pixels.flatten(2).median(2).values[..., None, None]
        weight = 1 + 4 * ((pixels - ground).abs().amax(1, keepdim=True) > 0.05)
        away = made.float() - pixels
        return ((away.abs() + away.square()) * weight).mean()

    def told(self, part: list[int], *, codes: bool) -> Tensor:
        """How unlikely are the places, the `codes` and what things words are of, after the captions, in equal parts."""
        places = self.model.config.places
        tokens = self.tokens[part] if codes else self.tokens[part, :places]
        begin = torch.full((len(part), 1), self.model.config.begin)
        # The fused kernel's backward pass takes six times as long in bfloat16 on CPUs (torch 2.13).
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16), sdpa_kernel(SDPBackend.MATH):
            ids, mask = self.album.said(part)
            words = self.model.text_encoder(ids, mask)
            logits = self.model.follow(torch.cat([begin, tokens[:, :-1]], 1), words, mask)
            mentioned = self.model.mentioned(words)
        unlikely = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
        mentions = self.album.mentions[part, : ids.shape[1]]
        binding = F.cross_entropy(mentioned.float().flatten(0, 1), mentions.flatten(), ignore_index=-1)
        return binding + unlikely[:, :places].mean() + (unlikely[:, places:].mean() if codes else 0)


@torch.inference_mode()
def tokens_of(model: Painter, album: Album, index: list[int]) -> Tensor:
    """What the decoder learns to write of these scenes, int64[N,places+cells]."""
    config = model.config
    places = album.places[index] + config.codes
    places[album.places[index] < 0] = config.nowhere
    codes = [model.pictures.rounded(as_pixels(album.plain[part]))[1] for part in batches(index, AT_ONCE)]
    return torch.cat([places, torch.cat(codes)], 1)


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


def share_placed(model: Painter, album: Album) -> float:
    """Of the validation scenes the share of which all things are placed as in the plainest scene."""
    wanted = tokens_of(model, album, album.validation)[:, : model.config.places]
    written = [model.write(*album.said(part), model.config.places) for part in batches(album.validation, AT_ONCE)]
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
    "places": share_placed,
    "captions": lambda model, album: share_true(album, painted(model, album, album.validation)),
}
