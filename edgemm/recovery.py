"""Recovery: a pruned model learns again what the FP32 model says, by a short distillation on the train split.

It learns the FP32 model's answers and not the labels, so that it needs none (Hinton et al. 2015, arXiv 1503.02531). A
module beside the stages: it is a part of pruning, with an artifact of its own, so that other settings of `recover` find
the pruned model in the cache. The student is its family's components, joined by the names of their tensors; it learns
as it will run, without dropout and with the statistics of its batch norms as they are.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.artifact import Artifact, build, canonical, sha256_text, source_digest
from edgemm.console import log, progress
from edgemm.data import Sample, digest, is_random, split
from edgemm.errors import InputError
from edgemm.models import Component, find_family, open_fp32, read_model
from edgemm.recipe import Recipe, Recover
from edgemm.runtime.session import Session

Tensors = dict[str, Tensor]
LEARNED = ("labels", "embeddings", "features")  # kinds of output


def check(recipe: Recipe, kind: str, torch_modules: bool) -> None:
    """InputError unless there is something to recover, and to learn it from. `kind` of program.json's output."""
    if not torch_modules:
        raise InputError(
            f"{recipe.name}: recover needs torch modules, and {recipe.model} came as a graph", fix="leave it out"
        )
    if not recipe.prune:
        raise InputError(f"{recipe.name}: recover, and nothing was pruned", fix="add a pass to prune, or leave it out")
    if is_random(recipe):
        raise InputError(f"{recipe.name}: recover can't learn from {recipe.data}", fix="give --data, or leave it out")
    if kind not in LEARNED:
        raise InputError(
            f"{recipe.name}: recover does not know how a model learns that writes text",
            fix=f"leave it out; it is for models that give {', '.join(LEARNED)}",
        )


def recover(pruned: Artifact, source: Artifact, recipe: Recipe, options: Recover, runs: Path) -> Artifact:
    """The model of `pruned` after distillation from that of `source`; the artifact holds what `pruned` does.

    While it learns, `runs` holds a checkpoint, from which the same call goes on to the same bytes.
    """
    program = pruned.json("program.json")
    samples, _ = split(recipe.model_copy(update={"calibration": options.samples}), lambda: program)
    config = {"recover": options.model_dump(mode="json"), "data": digest(samples), "seed": recipe.seed}
    place = sha256_text(canonical([pruned.digest, source.digest, source_digest(), config]))
    checkpoint = runs / f"recover-{place[:16]}" / "checkpoint.pt"

    def make(out: Path) -> None:
        family = find_family(pruned.path / "model")
        student = read_model(family, pruned.path / "model")
        teacher = read_model(family, source.path / "model")
        log(f"recover {recipe.model}: FP32 outputs on {len(samples)} samples of the train split")
        session = open_fp32(family, teacher, source.path / "model")
        targets = session.outputs([s.query for s in samples])
        _Lesson(session, samples, targets, options, recipe.seed).teach(student, family.components(student), checkpoint)
        family.save(student, out / "model", pruned.path / "model")
        for name in ("program.json", "pruning.json"):
            shutil.copyfile(pruned.path / name, out / name)

    made = build("pruned", runs, parents=[pruned, source], config=config, tools=("torch", "transformers"), make=make)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return made


class _Lesson:
    """Samples, what the FP32 model says of them, and the order in which they are learned."""

    def __init__(
        self, session: Session, samples: list[Sample], targets: dict[str, Any], options: Recover, seed: int
    ) -> None:
        self.session, self.samples, self.options, self.seed = session, samples, options, seed
        self.output = session.output
        self.targets = {n: torch.from_numpy(v) for n, v in targets.items() if v.dtype.kind == "f"}
        groups = sorted({s.group for s in samples})
        random.Random(f"{seed} held back").shuffle(groups)
        self.held_back = set(groups[: max(1, round(options.held_back * len(groups)))])
        if len(groups) < 2:
            raise InputError("recover needs samples of two images, recordings or texts", fix="give more data")
        self.alike: dict[Any, list[int]] = defaultdict(list)  # by held back or not, and the shapes of their tensors
        for i, sample in enumerate(progress(samples, "shapes")):
            shapes = tuple((name, x.shape) for name, x in session.tensors(sample.query).items())
            self.alike[sample.group in self.held_back, shapes].append(i)

    def batches(self, held_back: bool, order: random.Random) -> list[list[int]]:
        """One epoch: every sample once, those of a batch of equal shapes, since not every model can be padded."""
        found = []
        for (held, _), indices in self.alike.items():
            if held == held_back:
                mixed, size = order.sample(indices, len(indices)), self.options.batch
                found += [mixed[i : i + size] for i in range(0, len(mixed), size)]
        order.shuffle(found)
        return found

    def loss(self, components: list[Component], batch: list[int]) -> Tensor:
        rows = [self.session.tensors(self.samples[i].query) for i in batch]
        known = {name: torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in rows[0]}
        for component in components:
            assert isinstance(component.module, nn.Module)
            if all(port.name in known for port in component.inputs):
                made = component.module(**{port.name: known[port.name] for port in component.inputs})
                parts = made if isinstance(made, tuple) else (made,)
                known |= {port.name: x for port, x in zip(component.outputs, parts, strict=True)}
        return distance(known, {name: x[batch] for name, x in self.targets.items()}, self.output)

    @torch.inference_mode()
    def judge(self, components: list[Component]) -> float:
        """Mean loss on the samples held back."""
        batches = self.batches(True, random.Random(0))
        total = sum(self.loss(components, batch).item() * len(batch) for batch in batches)
        return total / sum(map(len, batches))

    def teach(self, student: nn.Module, components: list[Component], checkpoint: Path) -> None:
        """Up to `steps` of AdamW; the student ends as it was when those held back liked it best."""
        options = self.options
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=options.weight_decay
        )
        if checkpoint.is_file():
            state = torch.load(checkpoint, weights_only=True)
            student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            log(f"recover goes on at step {state['step']}")
        else:
            state = {"step": 0, "best": copied(student), "loss": self.judge(components), "waited": 0}
            log(f"recover step 0/{options.steps}: loss {state['loss']:.5f} on samples held back")
        batches = self.order()
        for step in progress(range(state["step"], options.steps), "recover"):
            if state["waited"] >= options.patience:
                break
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate(step, options.steps)
            self.loss(components, batches[step]).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % options.every == 0 or step + 1 == options.steps:
                loss = self.judge(components)
                log(f"recover step {step + 1}/{options.steps}: loss {loss:.5f} on samples held back")
                better = loss < state["loss"]
                state["waited"] = 0 if better else state["waited"] + 1
                if better:
                    state |= {"best": copied(student), "loss": loss}
                state["step"] = step + 1
                write({**state, "student": student.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
        student.load_state_dict(state["best"])

    def order(self) -> list[list[int]]:
        """The batch of each step, by seed and epoch alone: what a resumed run meets, too."""
        found: list[list[int]] = []
        epoch = 0
        while len(found) < self.options.steps:
            found += self.batches(False, random.Random(f"{self.seed} {epoch}"))
            epoch += 1
        return found


def distance(made: Tensors, targets: Tensors, output: dict[str, Any]) -> Tensor:
    """Mean over a batch of how far what the student made is from what the FP32 model made, by the kind of output.

    labels      KL divergence of the answers' probabilities, or their cross-entropy where each is one of yes and no
    embeddings  1 - cosine, mean over the modalities;  features  squared error / mean square of the FP32 model's
    """
    if output["kind"] == "labels":
        student, teacher = made[output["tensor"]], targets["logits"]
        if output["activation"] == "sigmoid":
            return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
        return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    losses = []
    for name, teacher in targets.items():
        if output["kind"] == "embeddings":
            losses.append(1 - F.cosine_similarity(made[output["tensors"][name]], teacher, dim=-1).mean())
            continue
        if made[name].shape != teacher.shape:
            raise InputError(
                f"recover: {name} has {list(made[name].shape)} values where FP32's has {list(teacher.shape)}",
                fix="leave out key_tokens, or recover",
            )
        losses.append((made[name] - teacher).square().mean() / teacher.square().mean())
    return torch.stack(losses).mean()


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: up in a twentieth of all steps, then down a cosine."""
    return min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


def copied(student: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


def write(state: dict[str, Any], checkpoint: Path) -> None:
    """Whole or not at all, whenever the process is killed."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    temporary = checkpoint.with_suffix(".tmp")
    with temporary.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(checkpoint)
