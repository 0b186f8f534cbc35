"""Training of the watcher on drawn clips: what stands where in a frame, what happens to things, then answers.

Stage 1, frames, teaches the frame encoder what stands in each cell of single frames. Stage 2, things, teaches each
latent what has happened to the thing that it is of, and when, on the tokens of stage 1, which are made once. Stage 3,
clips, goes on with that beside the answers; a thing's name in a question learns to tell the same of it. In its second
half some clips begin with a memory that other clips have filled, and windows are shorter at times: for the slots.

Every epoch seeds itself from (seed, stage, epoch), so a run that was killed continues bit for bit.

Axes: N clips, F frames, P cells, W words, Q names.
"""

from __future__ import annotations

import csv
import io
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.artifact import write_atomic
from edgemm.console import log, progress
from edgemm.reasoner.reel import Reel
from edgemm.reasoner.scenes_train import WARM_UP, batches
from edgemm.reasoner.watcher import EVENTS, Watcher, WatcherConfig
from edgemm.training import TrainWatcher

STAGES = ("frames", "things", "clips")
STILLS = 6  # frames of a clip that stage 1 learns from
AT_ONCE = 32  # clips
RARE = 8.0  # how much what is there counts beside what isn't: little of what could be is
RATES = {"frames": 1.0, "things": 2.0, "clips": 1.0}  # of the recipe's learning rate
GOES_ON = 0.5  # share of clips that are shown after others, in the second half of the last stage
TOLD = 0.5  # weight of what names tell, beside that of the answers and of what latents tell, which is 1
ASKED = 4  # questions after each chunk of each clip


def train_watcher(world: ModuleType, recipe: TrainWatcher, seed: int, out: Path) -> tuple[Watcher, Tokenizer]:
    """Train on clips that `world` makes; `out` gets checkpoint.pt after each epoch and log.csv; a second call resumes.

    log.csv has the shares of held-out clips' questions that are answered right, by kind of question.
    Raises InputError for data that makes no clips.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(seed)
    reel = Reel.build(world, recipe.clips, recipe.validation_clips, seed)
    ids = tuple(reel.tokenizer.token_to_id(word) for word in reel.words)
    known = {"answers": reel.answers, "words": reel.words, "word_ids": ids}
    sizes = {"vocab_size": reel.tokenizer.get_vocab_size(), "image_size": reel.frames(0).shape[2]}
    model = Watcher(WatcherConfig.from_dict({**sizes, **recipe.model, **known}))
    run = _Run(model, reel, recipe, seed, out)
    run.stage("frames", recipe.frame_epochs)
    run.stage("things", recipe.thing_epochs)
    run.stage("clips", recipe.clip_epochs)
    return model.eval(), reel.tokenizer


class _Run:
    """Both stages over one model, with a checkpoint after every epoch."""

    def __init__(self, model: Watcher, reel: Reel, recipe: TrainWatcher, seed: int, out: Path) -> None:
        self.model, self.reel, self.recipe, self.seed, self.out = model, reel, recipe, seed, out
        self.tokens = self.cells = self.where = self.facts = self.named = self.stills = self.grids = torch.zeros(0)
        self.left: dict[int, Tensor] = {}  # what the clips before left in the memory, by its window
        self.varied = False  # whether clips go on and windows differ
        self.checkpoint = torch.load(p, weights_only=True) if (p := out / "checkpoint.pt").exists() else None
        if self.checkpoint is None:
            with (out / "log.csv").open("w", newline="") as f:
                csv.writer(f).writerow(["stage", "epoch", "seconds", "loss", "accuracy"])
        else:
            model.load_state_dict(self.checkpoint["model"])

    def stage(self, name: str, epochs: int) -> None:
        kept = self.checkpoint
        if kept and STAGES.index(kept["stage"]) > STAGES.index(name):
            return
        if name != "frames":
            self.model.frame_encoder.requires_grad_(requires_grad=False)
            self.model.text_encoder.bert.set_attn_implementation("eager")  # as model.attend does in training
        learned = self.model.frame_encoder if name == "frames" else self.model
        rate = self.recipe.learning_rate * RATES[name]
        optimizer = torch.optim.AdamW([p for p in learned.parameters() if p.requires_grad], rate, weight_decay=0.02)
        first = 0
        if kept and kept["stage"] == name:
            first = kept["epoch"] + 1
            optimizer.load_state_dict(kept["optimizer"])
            log(f"resume {name} after epoch {first}")
        if first < epochs and name == "frames":
            self.draw_stills()
        elif first < epochs and not len(self.tokens):
            self.draw_clips()
        for epoch in range(first, epochs):
            begin = time.monotonic()
            loss = self.epoch(name, epoch, epochs, optimizer)
            right = validate(self.model.eval(), self.reel, self.held) if name == "clips" else {}
            seconds = time.monotonic() - begin
            kinds = " ".join(f"{kind} {share:.4f}" for kind, share in right.items())
            log(f"{name} epoch {epoch + 1}/{epochs}: loss {loss:.4f} {kinds}, {seconds:.0f} s")
            state, parts = io.BytesIO(), {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"stage": name, "epoch": epoch, **parts}, state)
            write_atomic(self.out / "checkpoint.pt", state.getvalue())
            with (self.out / "log.csv").open("a", newline="") as f:
                row = [name, epoch + 1, f"{seconds:.0f}", f"{loss:.5f}", kinds]
                csv.writer(f).writerow(row)
        self.stills = self.grids = torch.zeros(0)

    def epoch(self, stage: str, epoch: int, epochs: int, optimizer: torch.optim.Optimizer) -> float:
        recipe = self.recipe
        rng = random.Random(f"{self.seed} {stage} {epoch}")
        torch.manual_seed(rng.getrandbits(63))
        self.model.train()
        self.left.clear()
        self.varied = stage == "clips" and epoch >= epochs // 2
        index = list(range(len(self.stills))) if stage == "frames" else self.reel.training
        size = {"frames": recipe.frame_batch, "things": recipe.thing_batch, "clips": recipe.clip_batch}[stage]
        parts = [part for part in batches(rng.sample(index, len(index)), size) if len(part) > 1]
        if stage != "frames":
            self.model.frame_encoder.eval()
        steps, total = epochs * len(parts), 0.0
        for step, part in enumerate(progress(parts, f"{stage} {epoch + 1}/{epochs}"), epoch * len(parts)):
            rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * RATES[stage] * rate
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                loss = self.loss(stage, part, random.Random(f"{self.seed} {stage} {epoch} {part}"))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total / len(parts)

    def draw_stills(self) -> None:
        """STILLS frames of each clip, bytes, and what stands in their cells."""
        reel, rng = self.reel, random.Random(f"{self.seed} stills")
        stills, grids = [], []
        for i in reel.training:
            drawn = reel.world.frames(reel.clips[i])
            for frame in rng.sample(range(len(drawn)), STILLS):
                stills.append(drawn[frame])
                grids.append(reel.grid(i, frame, self.model.config.side))
        self.stills, self.grids = torch.from_numpy(np.stack(stills)).permute(0, 3, 1, 2), torch.stack(grids).bool()

    def draw_clips(self) -> None:
        """What is kept of each clip's frames, where things are in them, what has happened to them after each chunk."""
        reel, config = self.reel, self.model.config
        self.tokens, self.cells = tokens_of(self.model.eval(), reel, reel.training)
        self.held = tokens_of(self.model, reel, reel.validation)
        stops = [int(at[-1]) for at in self.model.chunks(self.tokens.shape[1])]
        self.where = torch.stack([reel.where(i, config.side) for i in reel.training])
        self.facts = torch.stack([torch.stack([reel.facts(i, stop) for stop in stops]) for i in reel.training])
        self.named = torch.tensor([reel.named(i) for i in reel.training])

    def seen(self, part: list[int]) -> Tensor:
        """How far what the frame encoder tells of each cell is from what stands there."""
        right = self.grids[part].float()
        encoder = self.model.frame_encoder
        grid = encoder(self.stills[part].float() / 127.5 - 1)
        told = encoder.there(grid).float(), encoder.what(grid).float()
        there = right[..., :1]
        weight = 1 + (RARE - 1) * there
        where = F.binary_cross_entropy_with_logits(told[0], there, weight)
        what = F.binary_cross_entropy_with_logits(told[1], right[..., 1:], reduction="none").mean(-1, True)
        return where + (what * there).sum() / there.sum().clamp(min=1)

    def loss(self, stage: str, part: list[int], rng: random.Random) -> Tensor:
        """Of a batch of stills, or of clips."""
        if stage == "frames":
            return self.seen(part)
        own = self.model.config.window
        states, loss = self.remembered(part, rng.choice(self.recipe.windows or (own,)) if self.varied else own)
        return loss if stage == "things" else loss + self.answered(part, states, rng)

    def remembered(self, part: list[int], window: int) -> tuple[list[Tensor], Tensor]:
        """The memory after each chunk, and how wrong is what latents tell of the things that they are of."""
        model, config = self.model, self.model.config
        tokens, cells = self.tokens[part].float(), self.cells[part].long()
        facts, where = self.facts[part], self.where[part].long()
        states, wrong = [self.begun(len(part), window)], []
        for k, at in enumerate(model.chunks(tokens.shape[1])):
            states.append(model.remember(tokens[:, at], cells[:, at], states[-1]))
            latents = states[-1][:, (window - 1) * config.latents : window * config.latents]
            own = cells[:, at, : config.seeds, None] == where[:, at, None]
            clip, latent, thing = own.flatten(1, 2).nonzero(as_tuple=True)
            wrong.append(mistaken(model.facts(latents[clip, latent]), facts[clip, k, thing]))
        self.left[window] = states[-1].detach()
        return states[1:], torch.stack(wrong).mean()

    def begun(self, clips: int, window: int) -> Tensor:
        """Memories that clips begin with: empty, or as other clips have left them."""
        state = self.model.empty(clips, window)
        if not self.varied or window not in self.left:
            return state
        before = self.left[window][torch.randint(len(self.left[window]), [clips])]
        return torch.where(torch.rand(clips, 1, 1) < GOES_ON, before, state)

    def answered(self, part: list[int], states: list[Tensor], rng: random.Random) -> Tensor:
        """How unlikely the right answers are after each chunk, and how wrong is what names tell of their things."""
        model, reel = self.model, self.reel
        stops = [int(at[-1]) for at in model.chunks(self.tokens.shape[1])]
        asked = [reel.drawn(i, stop, rng) for stop in stops for i in part for _ in range(ASKED)]
        ids, mask = reel.encode([q.text for q in asked])
        right = torch.tensor([reel.answers.index(q.answer) for q in asked])
        words = model.look(model.text_encoder(ids, mask), mask, torch.cat(states))
        row, at, name = reel.mentions(ids).unbind(1)
        clip, chunk = row // ASKED % len(part), row // ASKED // len(part)
        thing = (self.named[part][clip] == name[:, None]).int().argmax(1)
        wrong = mistaken(model.recalled(words[row, at]), self.facts[part][clip, chunk, thing])
        return F.cross_entropy(model.answered(words, mask).float(), right) + TOLD * wrong


def mistaken(told: Tensor, facts: Tensor) -> Tensor:
    """How wrong what is told of things is, [M,1+2E] each: see `Reel.facts`."""
    told, flags = told.float(), 1 + len(EVENTS)
    happened = facts[:, 1:flags]
    flagged = F.binary_cross_entropy_with_logits(told[:, :flags], facts[:, :flags], reduction="none").sum(1).mean()
    since = F.smooth_l1_loss(told[:, flags:], facts[:, flags:], reduction="none", beta=0.1)
    return flagged + 4 * (since * happened).sum() / len(facts)


@torch.inference_mode()
def tokens_of(model: Watcher, reel: Reel, index: list[int]) -> tuple[Tensor, Tensor]:
    """What is kept of clips' frames: tokens float16[N,F,K,C] and their cells uint8[N,F,K]."""
    made = []
    for part in progress(batches(index, AT_ONCE), "frames of clips"):
        tokens, cells = model.encode(torch.stack([reel.frames(i) for i in part]))
        made.append((tokens.half(), cells.byte()))
    tokens, cells = (torch.cat(parts) for parts in zip(*made, strict=True))
    return tokens, cells


@torch.inference_mode()
def validate(model: Watcher, reel: Reel, kept: tuple[Tensor, Tensor], window: int | None = None) -> dict[str, float]:
    """Share of the held-out clips' questions that are answered right: "all", and by kind.

    kept  what `tokens_of` has made of those clips;  window  of the memory, the model's own unless given
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for part in batches(list(range(len(reel.validation))), AT_ONCE):
        tokens, cells = kept[0][part].float(), kept[1][part].long()
        state = model.empty(len(part), window)
        for at in model.chunks(tokens.shape[1]):
            state = model.remember(tokens[:, at], cells[:, at], state)
        asked = [(at, q) for at, i in enumerate(part) for q in reel.questions(reel.validation[i], "validation")]
        ids, mask = reel.encode([q.text for _, q in asked])
        logits = model.read(model.text_encoder(ids, mask), mask, state[torch.tensor([at for at, _ in asked])])
        for (_, question), best in zip(asked, logits.argmax(1).tolist(), strict=True):
            for kind in ("all", question.kind):
                right[kind].append(reel.answers[best] == question.answer)
    return {kind: float(np.mean(values)) for kind, values in right.items()}
