"""What the scenes reasoner gets right on scenes that it did not learn from, and how sure it may be of its exits.

Axes: N scenes, B questions, A answers, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgemm.reasoner.scenes_corpus import WRONG, ScenesCorpus
from edgemm.reasoner.scenes_model import ScenesReasoner

EACH = 4  # questions of a scene
BATCH = 50  # scenes at a time
TEMPERATURES = torch.logspace(-1, 1, 81)


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares of 1 on the validation scenes, seen and not heard.

    accuracy        of the last level's answers;  exit_1, exit_2  of the earlier ones'
    kinds           of the last level's answers, by kind of question
    recall_at_1     captions that find their picture among all
    hard_negatives  pictures that are more like their caption than like each that is just not true
    matching        the same, by level 1's match and not by similarity
    captions        captions written that are true
    """

    accuracy: float
    exit_1: float
    exit_2: float
    recall_at_1: float
    hard_negatives: float
    matching: float
    captions: float
    kinds: dict[str, float]

    def row(self) -> dict[str, float]:
        """All of them by name, those of kinds last."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kinds"}
        return named | self.kinds


@torch.inference_mode()
def validate(model: ScenesReasoner, corpus: ScenesCorpus) -> Figures:
    """The figures of a model in eval mode."""
    logits, answers, asked = answer(model, corpus)
    right = [(x.argmax(1) == answers).float() for x in logits]
    of_kind = {kind: torch.tensor([k == kind for k in asked]) for kind in corpus.kinds}
    texts, pictures, matched, true = [], [], [], 0
    for part in parts(corpus):
        own, wrong = corpus.captions(part), corpus.wrong_captions(part)
        said = corpus.encode([text for one, others in zip(own, wrong, strict=True) for text in (one, *others)])
        words = model.text_encoder(said.ids, said.mask)
        tokens = model.image_encoder(corpus.pixels(part))
        texts.append(model.contrast.pools["text"](words, said.mask).unflatten(0, (len(part), 1 + WRONG)))
        pictures.append(model.contrast.pools["image"](tokens))
        read = model.reason(words, said.mask, {"image": tokens}, levels=1).words[0]
        matched.append(model.match(read, said.mask)[:, 1].unflatten(0, (len(part), 1 + WRONG)))
        for i, ids in zip(part, model.captioner.write(tokens), strict=True):
            true += corpus.world.is_true(corpus.tokenizer.decode(ids), list(corpus.scenes[i].things))
    text, picture, match = torch.cat(texts), torch.cat(pictures), torch.cat(matched)
    found = (text[:, 0] @ picture.T).argmax(1) == torch.arange(len(text))
    alike = (text @ picture[:, :, None])[..., 0]
    return Figures(
        accuracy=float(right[-1].mean()),
        exit_1=float(right[0].mean()),
        exit_2=float(right[1].mean()),
        recall_at_1=float(found.float().mean()),
        hard_negatives=first_is_most(alike),
        matching=first_is_most(match),
        captions=true / len(corpus.validation),
        kinds={kind: float(right[-1][chosen].mean()) for kind, chosen in of_kind.items()},
    )


def first_is_most(scores: Tensor) -> float:
    """Share of rows [N,1+H] whose first value is over all others."""
    return float((scores[:, 0] > scores[:, 1:].amax(1)).float().mean())


def answer(
    model: ScenesReasoner, corpus: ScenesCorpus, given: tuple[str, ...] = ("text", "image")
) -> tuple[list[Tensor], Tensor, list[str]]:
    """Logits [B,A] of each level on the validation questions, the right answers int64 [B], the kinds of the questions.

    given   the modalities that the model gets; without text it is asked nothing, and says how many things there are
    """
    logits, answers, kinds = [], [], list[str]()
    for part in parts(corpus):
        keys, words, mask = {}, None, None
        if "image" in given:
            keys["image"] = model.image_encoder(corpus.pixels(part))
        if "audio" in given:
            keys["audio"] = model.audio_encoder(corpus.waves(part, model.config.min_samples))
        right = corpus.counts(part)
        if "text" in given:
            texts, right, asked_kinds = corpus.questions(part, EACH, "validation")
            asked = corpus.encode(texts)
            words, mask = model.text_encoder(asked.ids, asked.mask), asked.mask
            kinds += asked_kinds
        logits.append(model.reason(words, mask, keys).logits)
        answers.append(right)
    return [torch.cat(level) for level in zip(*logits, strict=True)], torch.cat(answers), kinds


@torch.inference_mode()
def by_subset(model: ScenesReasoner, corpus: ScenesCorpus) -> dict[str, float]:
    """Accuracy of the last level for each subset of the modalities, by their names joined with +."""
    names = ("text", "image", "audio")
    found = {}
    for given in (subset for n in (3, 2, 1) for subset in combinations(names, n)):
        logits, answers, _ = answer(model, corpus, given)
        found["+".join(given)] = float((logits[-1].argmax(1) == answers).float().mean())
    return found


@torch.inference_mode()
def calibrate(model: ScenesReasoner, corpus: ScenesCorpus, lost: float) -> None:
    """Each exit's temperature (of the least cross-entropy, Guo et al. 2017), and how sure who leaves there must be.

    lost   share of answers that exits may make wrong that the last level has right: half of it each
    """
    all_logits, answers, _ = answer(model, corpus)
    made = []
    for index, logits in enumerate(all_logits):
        temperature = best_temperature(logits, answers)
        model.level(index).exit.temperature.mul_(temperature)
        made.append(logits / temperature)
    *early, last = made
    found = [least_confidence(logits, last, answers, lost / len(early)) for logits in early]
    model.config = replace(model.config, exits=(found[0], found[1]))


def least_confidence(early: Tensor, last: Tensor, answers: Tensor, lost: float) -> float:
    """The lowest confidence at which leaving costs at most `lost` of all answers; 2 where every one costs more.

    early, last  logits [B,A] of an exit and of the last level;  answers  int64 [B]
    """
    confidence, order = early.softmax(1).amax(1).sort(descending=True)
    cost = ((last.argmax(1) == answers).float() - (early.argmax(1) == answers).float())[order].cumsum(0) / len(order)
    fine = cost.cummax(0).values <= lost
    return float(confidence[int(fine.sum()) - 1]) if bool(fine.any()) else 2.0


def best_temperature(logits: Tensor, answers: Tensor) -> float:
    """logits [B,A], answers int64 [B] -> what to divide the logits by."""
    losses = [float(F.cross_entropy(logits / t, answers)) for t in TEMPERATURES]
    return float(TEMPERATURES[int(torch.tensor(losses).argmin())])


def parts(corpus: ScenesCorpus) -> list[list[int]]:
    index = corpus.validation
    return [index[i : i + BATCH] for i in range(0, len(index), BATCH)]
