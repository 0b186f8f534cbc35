"""Training of the scenes reasoner: what the encoders see and hear first, then reasoning on it, then what it says.

Stage 1, alignment, trains the encoders, the contrastive pools and the first level; stage 2, reasoning, everything but
the encoders that stay frozen, whose tokens are then made once a scene; stage 3, captions, the captioner alone, which
nothing else looks at; see scenes_losses.py for all of them.

Every epoch seeds itself from (seed, stage, epoch), so a run that was killed continues bit for bit.
"""

from __future__ import annotations

import csv
import io
import math
import random
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.artifact import write_atomic
from edgemm.console import log, progress
from edgemm.errors import InputError
from edgemm.reasoner.config import MODALITIES, ScenesConfig
from edgemm.reasoner.scenes_corpus import ScenesCorpus
from edgemm.reasoner.scenes_losses import Losses
from edgemm.reasoner.scenes_model import ScenesReasoner
from edgemm.reasoner.scenes_validation import Figures, calibrate, validate
from edgemm.training import TrainScenes

WARM_UP = 100  # steps
CACHED = 256  # scenes encoded at a time
BEST = {"alignment": None, "reasoning": "accuracy", "captions": "captions"}  # by stage, what says which epoch is best


def train_scenes(world: ModuleType, recipe: TrainScenes, seed: int, out: Path) -> tuple[ScenesReasoner, ScenesCorpus]:
    """Train on scenes that `world` draws; `out` gets checkpoint.pt after each epoch and log.csv; a second call resumes.

    The corpus that comes back has the tokenizer, and the scenes that were held back.
    Raises InputError for data that draws no scenes, an unknown size, and a checkpoint of another training.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(seed)
    corpus = ScenesCorpus.build(world, recipe.scenes, recipe.validation_scenes, seed)
    words, longest = corpus.tokenizer.get_vocab_size(), max(corpus.lengths)
    sizes = {"answers": corpus.answers, "vocab_size": words, "audio_least": longest}
    if (
        unknown := recipe.model.keys() - {field.name for field in fields(ScenesConfig)}
        | recipe.model.keys() & sizes.keys()
    ):
        raise InputError(f"train_scenes.model has no {min(unknown)!r}", fix="use the names of reasoner/config.py")
    model = ScenesReasoner(ScenesConfig.from_dict({**recipe.model, **sizes}))
    run = _Run(model, corpus, recipe, seed, out)
    run.stage("alignment", recipe.alignment_epochs)
    run.stage("reasoning", recipe.reasoning_epochs)
    run.stage("captions", recipe.caption_epochs)
    run.finish()
    return model.eval(), corpus


class _Run:
    """All stages over one model, with a checkpoint after every epoch."""

    def __init__(self, model: ScenesReasoner, corpus: ScenesCorpus, recipe: TrainScenes, seed: int, out: Path) -> None:
        self.model, self.corpus, self.recipe, self.seed, self.out = model, corpus, recipe, seed, out
        self.losses = Losses(model, corpus, recipe)
        self.encoders = nn.ModuleDict(
            {"text": model.text_encoder, "image": model.image_encoder, "audio": model.audio_encoder}
        )
        for made in (model.text_encoder.bert, model.audio_encoder.wav2vec2):
            made.set_attn_implementation("eager")  # as model.attend does in training
        self.frozen: set[str] = set()
        self.cached: dict[str, Tensor] = {}
        self.best: dict[str, Any] = {}
        self.checkpoint = torch.load(p, weights_only=True) if (p := out / "checkpoint.pt").exists() else None
        if self.checkpoint is None:
            (out / "log.csv").unlink(missing_ok=True)
        elif self.checkpoint.get("of") != self.of():
            raise InputError(
                f"{out / 'checkpoint.pt'} is of another training", fix="name another directory with -o, or delete it"
            )

    def of(self) -> str:
        """What a checkpoint must be of to go on from it: all that a step hangs on."""
        return f"{self.recipe.model_dump_json(exclude={'threads'})} {self.seed}"

    def stage(self, name: str, epochs: int) -> None:
        stages = list(BEST)
        if self.checkpoint and stages.index(self.checkpoint["stage"]) > stages.index(name):
            return
        resumed = bool(self.checkpoint and self.checkpoint["stage"] == name)
        learning: nn.Module = self.losses
        if resumed:
            assert self.checkpoint
            self.losses.load_state_dict(self.checkpoint["losses"])
            self.best = self.checkpoint["best"]
        elif name == "captions":
            self.model.load_state_dict(self.best["model"])
        if name == "reasoning":
            self.freeze(self.recipe.unfreeze)
        elif name == "captions":
            self.freeze(())
            learning = self.model.captioner
        if not resumed:
            self.best = {**self.best, "score": -1.0, "epoch": -1}  # its model is what the stage goes on from
        optimizer = torch.optim.AdamW(
            [p for p in learning.parameters() if p.requires_grad],
            lr=self.recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=self.recipe.weight_decay,
        )
        first = 0
        if resumed:
            assert self.checkpoint
            first = self.checkpoint["epoch"] + 1
            optimizer.load_state_dict(self.checkpoint["optimizer"])
            log(f"resume {name} at epoch {first + 1}")
        for epoch in range(first, epochs):
            if BEST[name] and epoch - self.best["epoch"] > self.recipe.patience:
                log(f"{name}: no better for {self.recipe.patience} epochs")
                return
            begin = time.monotonic()
            loss = self.epoch(name, epoch, epochs, optimizer)
            figures = validate(self.model.eval(), self.corpus)
            if (judge := BEST[name]) and (score := getattr(figures, judge)) > self.best["score"]:
                state = {key: value.clone() for key, value in self.model.state_dict().items()}
                self.best = {"score": score, "epoch": epoch, "model": state}
            self.record(name, epoch, epochs, time.monotonic() - begin, loss, figures, optimizer)

    def record(
        self,
        name: str,
        epoch: int,
        epochs: int,
        seconds: float,
        loss: float,
        figures: Figures,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """The epoch on the screen, in checkpoint.pt and in log.csv."""
        values = figures.row()
        said = ", ".join(f"{n.replace('_', ' ')} {v:.4f}" for n, v in values.items())
        log(f"{name} epoch {epoch + 1}/{epochs}: loss {loss:.4f}, {said}, {seconds:.0f} s")
        state = io.BytesIO()
        kept = {"losses": self.losses.state_dict(), "optimizer": optimizer.state_dict(), "best": self.best}
        torch.save({"of": self.of(), "stage": name, "epoch": epoch, **kept}, state)
        write_atomic(self.out / "checkpoint.pt", state.getvalue())
        with (self.out / "log.csv").open("a", newline="") as f:
            rows = csv.writer(f)
            if not f.tell():
                rows.writerow(["stage", "epoch", "seconds", "loss", *values])
            rows.writerow([name, epoch + 1, f"{seconds:.0f}", f"{loss:.5f}", *(f"{v:.5f}" for v in values.values())])

    def finish(self) -> None:
        """The weights of the best epoch, each exit's confidence made true on scenes that were not learned from."""
        self.model.load_state_dict(self.best["model"])
        for made in (self.model.text_encoder.bert, self.model.audio_encoder.wav2vec2):
            made.set_attn_implementation("sdpa")
        calibrate(self.model.eval(), self.corpus, self.recipe.exit_loss)

    def freeze(self, unfrozen: Iterable[str]) -> None:
        """Stop the encoders that are not to learn on, and make their tokens of every scene once."""
        self.frozen = set(self.encoders) - set(unfrozen)
        self.model.eval()
        for name in self.frozen:
            self.encoders[name].requires_grad_(requires_grad=False)
        for name in (self.frozen & set(MODALITIES)) - self.cached.keys():
            with torch.no_grad():
                made = [self.tokens(name, part) for part in batches(self.corpus.training, CACHED)]
            longest = max(t.shape[1] for t in made)
            self.cached[name] = torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in made])

    def tokens(self, name: str, index: list[int]) -> Tensor:
        """Of an encoder, for these scenes; bfloat16 under `bf16`."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            if name == "image":
                made = self.model.image_encoder(self.corpus.pixels(index))
            else:
                made = self.model.audio_encoder(self.corpus.waves(index, self.model.config.min_samples))
        return made.bfloat16() if self.recipe.bf16 else made

    def keys(self, index: list[int]) -> dict[str, Tensor]:
        """Tokens by modality, of the encoder or as they were cached; of sounds only as long as the longest."""
        made = {m: self.tokens(m, index) for m in MODALITIES if m not in self.cached}
        made |= {m: tokens[index] for m, tokens in self.cached.items()}
        config = self.model.config
        frames = config.frames(self.corpus.samples(index, config.min_samples))
        return {**made, "audio": made["audio"][:, :frames]}

    def epoch(self, stage: str, epoch: int, epochs: int, optimizer: torch.optim.Optimizer) -> float:
        recipe = self.recipe
        rng = random.Random(f"{self.seed} {stage} {epoch}")
        torch.manual_seed(rng.getrandbits(63))
        self.losses.train()
        for name in self.frozen:
            self.encoders[name].eval()
        parts = batches(rng.sample(self.corpus.training, len(self.corpus.training)), recipe.scenes_per_batch)
        parts = [part for part in parts if len(part) > 1]
        steps, total = epochs * len(parts), 0.0
        for step, part in enumerate(progress(parts, f"{stage} {epoch + 1}/{epochs}"), epoch * len(parts)):
            rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                keys = self.keys(part)
                if stage == "alignment":
                    loss = self.losses.alignment(part, keys, rng)
                elif stage == "reasoning":
                    loss = self.losses.reasoning(part, keys, f"{stage} {epoch}", rng)
                else:
                    loss = self.losses.captioning(part, keys["image"])
            loss.backward()
            nn.utils.clip_grad_norm_(self.losses.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total / len(parts)


def batches(index: list[int], size: int) -> list[list[int]]:
    return [index[i : i + size] for i in range(0, len(index), size)]
