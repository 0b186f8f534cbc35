"""Recovery: a pruned model learns again what the FP32 model says, by a short distillation on the train split.

It learns the FP32 model's answers and not the labels, so that it needs none (Hinton et al. 2015, arXiv 1503.02531), and
what each layer reads on the way there (TinyBERT; Jiao et al. 2020, arXiv 1909.10351), which a small set can teach. A
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
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.artifact import Artifact, build, canonical, sha256_text, source_digest
from edgemm.console import log, progress
from edgemm.data import Sample, digest, is_random, split
from edgemm.errors import InputError
from edgemm.models import find_family, open_fp32, read_model
from edgemm.models._hidden_units import that_run
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
        session = open_fp32(family, teacher, source.path / "model")
        lesson = _Lesson(session, samples, options, recipe.seed)
        log(f"recover {recipe.model}: {options.model_dump_json()}, {len(samples)} samples of {recipe.data}")
        lesson.teach(Watched(family, student), Watched(family, teacher), checkpoint)
        family.save(student, out / "model", pruned.path / "model")
        for name in ("program.json", "pruning.json"):
            shutil.copyfile(pruned.path / name, out / name)

    made = build("pruned", runs, parents=[pruned, source], config=config, tools=("torch", "transformers"), make=make)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return made


class Watched:
    """A model as its components in a row, and what each of its blocks reads while they run.

    Blocks are attention layers and pairs of layers with hidden units: what they read keeps its width when they shrink.
    """

    def __init__(self, family: ModuleType, model: nn.Module) -> None:
        self.model, self.components = model, family.components(model)
        self.read: Tensors = {}
        blocks = {b.name: b.q for b in family.attentions(model) if b.q} | {
            h.name: h.makes for h in that_run(family, model)
        }
        for name, layer in blocks.items():
            layer.register_forward_pre_hook(partial(self._see, name))

    def _see(self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.read[name] = inputs[0]

    def run(self, given: Tensors) -> tuple[Tensors, Tensors]:
        """(what the components make of `given`, what passed between and inside them), by name."""
        made: Tensors = {}
        for component in self.components:
            known = given | made
            done = all(port.name in known for port in component.outputs)  # by the graph of another set of modalities
            if not done and all(port.name in known for port in component.inputs):
                out = component.module(**{port.name: known[port.name] for port in component.inputs})
                parts = out if isinstance(out, tuple) else (out,)
                made |= {port.name: x for port, x in zip(component.outputs, parts, strict=True)}
        return made, made | self.read


class _Lesson:
    """Samples, and the order in which they are learned."""

    def __init__(self, session: Session, samples: list[Sample], options: Recover, seed: int) -> None:
        self.session, self.samples, self.options, self.seed = session, samples, options, seed
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

    def given(self, batch: list[int]) -> Tensors:
        rows = [self.session.tensors(self.samples[i].query) for i in batch]
        return {name: torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in rows[0]}

    def loss(self, student: Watched, teacher: Watched, batch: list[int]) -> Tensor:
        """How far the answers are from FP32's, and the way to them, weighed by `features`."""
        given = self.given(batch)
        with torch.no_grad():
            wanted, way = teacher.run(given)
        made, own_way = student.run(given)
        errors = [
            (own_way[name] - x).square().mean() / x.square().mean()
            for name, x in way.items()
            if x.is_floating_point() and own_way[name].shape == x.shape
        ]
        return distance(made, wanted, self.session.output) + self.options.features * torch.stack(errors).mean()

    @torch.inference_mode()
    def judge(self, student: Watched, teacher: Watched) -> float:
        """Mean distance of the answers to the samples held back."""
        total, count = 0.0, 0
        for batch in self.batches(True, random.Random(0)):
            given = self.given(batch)
            made, wanted = student.run(given)[0], teacher.run(given)[0]
            total += distance(made, wanted, self.session.output).item() * len(batch)
            count += len(batch)
        return total / count

    def teach(self, student: Watched, teacher: Watched, checkpoint: Path) -> None:
        """Up to `steps` of AdamW; the student ends as it was when those held back liked it best."""
        options, model = self.options, student.model
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=options.weight_decay
        )
        if checkpoint.is_file():
            state = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            log(f"recover goes on at step {state['step']}")
        else:
            state = {"step": 0, "best": copied(model), "loss": self.judge(student, teacher), "waited": 0}
            log(f"recover step 0/{options.steps}: loss {state['loss']:.5f} on samples held back")
        batches = self.order()
        for step in progress(range(state["step"], options.steps), "recover"):
            if state["waited"] >= options.patience:
                break
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate(step, options.steps)
            self.loss(student, teacher, batches[step]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % options.every == 0 or step + 1 == options.steps:
                loss = self.judge(student, teacher)
                log(f"recover step {step + 1}/{options.steps}: loss {loss:.5f} on samples held back")
                better = loss < state["loss"]
                state["waited"] = 0 if better else state["waited"] + 1
                if better:
                    state |= {"best": copied(model), "loss": loss}
                state["step"] = step + 1
                write({**state, "student": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
        model.load_state_dict(state["best"])

    def order(self) -> list[list[int]]:
        """The batch of each step, by seed and epoch alone: what a resumed run meets, too."""
        found: list[list[int]] = []
        epoch = 0
        while len(found) < self.options.steps:
            found += self.batches(False, random.Random(f"{self.seed} {epoch}"))
            epoch += 1
        return found


def distance(made: Tensors, wanted: Tensors, output: dict[str, Any]) -> Tensor:
    """Mean over a batch of how far what the student made is from what the FP32 model made, by the kind of output.

    labels      KL divergence of the answers' probabilities, or their cross-entropy where each is one of yes and no
    embeddings  1 - cosine, mean over the modalities;  features  squared error / mean square of the FP32 model's
    """
    if output["kind"] == "labels":
        student, teacher = made[output["tensor"]], wanted[output["tensor"]]
        if output["activation"] == "sigmoid":
            return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
        return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
    if output["kind"] == "embeddings":
        names = output["tensors"].values()
        return torch.stack([1 - F.cosine_similarity(made[n], wanted[n], dim=-1).mean() for n in names]).mean()
    for name in output["tensors"]:
        if made[name].shape != wanted[name].shape:
            raise InputError(
                f"recover: {name} has shape {list(made[name].shape)} where FP32's has {list(wanted[name].shape)}",
                fix="leave out key_tokens, or recover",
            )
    errors = [(made[n] - wanted[n]).square().mean() / wanted[n].square().mean() for n in output["tensors"]]
    return torch.stack(errors).mean()


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: up in a twentieth of all steps, then down a cosine."""
    return min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


def copied(model: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write(state: dict[str, Any], checkpoint: Path) -> None:
    """Whole or not at all, whenever the process is killed."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    temporary = checkpoint.with_suffix(".tmp")
    with temporary.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(checkpoint)
