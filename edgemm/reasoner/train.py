"""Training of the reference model: perception first, then reasoning.

Stage 1 trains both encoders to say which colours and shapes an image holds, by the likeness of an
image token to the word's in a question; those labels follow from the training questions and answers. It aligns the
two spaces, so that what is learned of matching one word holds for all. Stage 2 trains everything on the
questions, with the perception loss kept beside it. Questions are drawn so that each answer to a question
is equally likely: seven of eight "is there a red shape?" are "no".

Every epoch seeds itself from (seed, stage, epoch), so a resumed run continues bit for bit.
"""

from __future__ import annotations

import csv
import ctypes
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.console import log, progress
from edgemm.data import Sample
from edgemm.reasoner.corpus import UNKNOWN, Corpus
from edgemm.reasoner.model import Reasoner, ReasonerConfig
from edgemm.training import Train

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def train(samples: list[Sample], recipe: Train, seed: int, out: Path) -> tuple[Reasoner, Tokenizer]:
    """Train on `samples`; `out` gets checkpoint.pt after each epoch and log.csv; a second call resumes."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(seed)
    corpus = Corpus.build(samples, recipe.validation_images, seed)
    config = ReasonerConfig(answers=corpus.answers, vocab_size=corpus.tokenizer.get_vocab_size(), **recipe.model)
    model = Reasoner(config)
    perception = Perception()
    run = _Run(model, perception, corpus, recipe, seed, out)
    for stage, epochs in (("perception", recipe.perception_epochs), ("reasoning", recipe.reasoning_epochs)):
        run.stage(stage, epochs)
    return model.eval(), corpus.tokenizer


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors for the next step: handing them back costs half of an epoch in page faults."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            mallopt(parameter, value)


class Perception(nn.Module):
    """Is the concept in the image? The likeness of its word to the image token most like it.

    A soft maximum over positions, so that the place of a red circle becomes like "red" and its
    background does not: what cross-attention then looks for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, image_tokens: Tensor, words: Tensor) -> Tensor:
        """image_tokens [N,P,D], words [C,D] -> logits [N,C]."""
        likeness = self.scale * (image_tokens @ words.T) / words.shape[-1] ** 0.5
        return likeness.logsumexp(1) - math.log(likeness.shape[1]) + self.bias


class _Run:
    """The two stages over one model, with a checkpoint after every epoch."""

    def __init__(
        self, model: Reasoner, perception: Perception, corpus: Corpus, recipe: Train, seed: int, out: Path
    ) -> None:
        self.model, self.perception, self.corpus = model, perception, corpus
        self.recipe, self.seed, self.out = recipe, seed, out
        self.modules = nn.ModuleDict({"model": model, "perception": perception})
        self.checkpoint = torch.load(p, weights_only=True) if (p := out / "checkpoint.pt").exists() else None
        if self.checkpoint is None:
            with (out / "log.csv").open("w", newline="") as f:
                csv.writer(f).writerow(["stage", "epoch", "seconds", "loss", "validation_accuracy"])

    def stage(self, name: str, epochs: int) -> None:
        if self.checkpoint and self.checkpoint["stage"] == "reasoning" and name == "perception":
            return
        recipe = self.recipe
        learned = (
            self.modules
            if name == "reasoning"
            else nn.ModuleList([self.model.image_encoder, self.model.text_encoder, self.perception])
        )
        optimizer = torch.optim.AdamW(
            learned.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
        )
        first = 0
        if self.checkpoint and self.checkpoint["stage"] == name:
            first = self.checkpoint["epoch"] + 1
            self.modules.load_state_dict(self.checkpoint["modules"])
            optimizer.load_state_dict(self.checkpoint["optimizer"])
            if name == "reasoning" and self.checkpoint["accuracy"] >= recipe.stop_accuracy:
                return
            log(f"resume {name} at epoch {first + 1}")
        steps = math.ceil(len(self.corpus.training) / recipe.images_per_batch)
        for epoch in range(first, epochs):
            begin = time.monotonic()
            loss = self.epoch(name, epoch, epochs, steps, optimizer)
            accuracy = self.validate(name)
            seconds = time.monotonic() - begin
            log(
                f"{name} epoch {epoch + 1}/{epochs}: loss {loss:.4f}, validation accuracy {accuracy:.4f}, "
                f"{seconds:.0f} s"
            )
            state = {
                "stage": name,
                "epoch": epoch,
                "accuracy": accuracy,
                "modules": self.modules.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, self.out / "checkpoint.tmp")
            (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")
            with (self.out / "log.csv").open("a", newline="") as f:
                csv.writer(f).writerow([name, epoch + 1, f"{seconds:.0f}", f"{loss:.5f}", f"{accuracy:.5f}"])
            if name == "reasoning" and accuracy >= recipe.stop_accuracy:
                return

    def epoch(self, stage: str, epoch: int, epochs: int, steps: int, optimizer: torch.optim.Optimizer) -> float:
        recipe, corpus = self.recipe, self.corpus
        rng = random.Random(f"{self.seed} {stage} {epoch}")
        torch.manual_seed(rng.getrandbits(63))
        order = rng.sample(corpus.training, len(corpus.training))
        batches = [order[i : i + recipe.images_per_batch] for i in range(0, len(order), recipe.images_per_batch)]
        self.modules.train()
        total = 0.0
        for step, batch in enumerate(progress(batches, f"{stage} {epoch + 1}/{epochs}")):
            at = (epoch * steps + step) / (epochs * steps)
            rate = min(1.0, at * epochs * steps / 100) * 0.5 * (1 + math.cos(math.pi * at))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            loss = self.loss(stage, batch, rng)
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total / len(batches)

    def loss(self, stage: str, batch: list[int], rng: random.Random) -> Tensor:
        corpus, recipe = self.corpus, self.recipe
        pixels = corpus.pixels(batch)
        for axis in (2, 3):  # a shape's name and colour survive mirroring
            if rng.random() < 0.5:
                pixels = pixels.flip(axis)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            image_tokens = self.model.image_encoder(pixels)
            seen = self.perception(image_tokens, self.words(rng)).float()
            holds = corpus.holds[batch]
            known = holds != UNKNOWN
            loss = F.binary_cross_entropy_with_logits(seen[known], holds[known]) if known.any() else seen.sum() * 0
            if stage == "perception":
                return loss
            asked = [rng.choices(corpus.asked[i], corpus.weights[i], k=recipe.questions_per_image) for i in batch]
            logits = self.answer([[q for q, _ in group] for group in asked], image_tokens)
        answers = torch.tensor([a for group in asked for _, a in group])
        return F.cross_entropy(logits.float(), answers) + recipe.perception_weight * loss

    def words(self, rng: random.Random) -> Tensor:
        """The concepts' tokens [C,D], each as it reads in a question drawn from those that name it."""
        drawn = [rng.choice(places) for places in self.corpus.mentions]
        ids = self.corpus.questions[[question for question, _ in drawn]]
        hidden = self.model.text_encoder(ids, (ids != 0).long())
        return hidden[torch.arange(len(drawn)), [position for _, position in drawn]]

    def answer(self, asked: list[list[int]], image_tokens: Tensor) -> Tensor:
        """Logits [sum of questions, A]; each distinct question and each image is encoded once."""
        flat = torch.tensor([q for group in asked for q in group])
        distinct, index = flat.unique(return_inverse=True)
        ids = self.corpus.questions[distinct]
        ids = ids[:, : int((ids != 0).sum(1).max())]
        mask = (ids != 0).long()
        return self.model.fusion(self.model.text_encoder(ids, mask)[index], mask[index], image_tokens)

    @torch.inference_mode()
    def validate(self, stage: str) -> float:
        """Share of right answers on the held-out training images (of known concepts in stage 1)."""
        self.modules.eval()
        corpus, right, count = self.corpus, 0, 0
        for i in corpus.validation:
            image_tokens = self.model.image_encoder(corpus.pixels([i]))
            if stage == "perception":
                holds = corpus.holds[i]
                known = holds != UNKNOWN
                seen = self.perception(image_tokens, self.words(random.Random(i)))[0] > 0
                right, count = right + int((seen == (holds > 0))[known].sum()), count + int(known.sum())
            else:
                asked = corpus.asked[i]
                guess = self.answer([[q for q, _ in asked]], image_tokens).argmax(1)
                answers = torch.tensor([a for _, a in asked])
                right, count = right + int((guess == answers).sum()), count + len(asked)
        return right / max(count, 1)
