"""What the scenes reasoner learns by, a batch of scenes at a time.

Axes: N scenes, B questions, T tokens, P cells of the picture's grid, C concepts, D width, H wrong captions, A answers.

Alignment (stage 1): a caption is found by its picture and by its sound, and the other way, among the batch and among
captions that are just not true (InfoNCE); each cell of the grid is like the words of what stands there, and like no
others (the recogniser), and like the names of that thing alone (grounding); level 1 says of a caption and of each of
its words whether they hold of a picture (matching), and of a name where its thing stands (place). These make the rest
fast: a word finds what it names, and says where, before anything is asked.
Reasoning (stage 2): the answers of all three levels; beside them, on half of the scenes, InfoNCE, matching, grounding
and place, a triplet loss on the captions that are just not true, and captions written word by word.
Captions (stage 3): those alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.reasoner.alignment import info_nce, triplet
from edgemm.reasoner.corpus import UNKNOWN
from edgemm.reasoner.scenes_corpus import WRONG, ScenesCorpus
from edgemm.reasoner.scenes_model import ScenesReasoner
from edgemm.reasoner.train import Perception
from edgemm.training import TrainScenes

Keys = Mapping[str, Tensor]
GROUPS = 3
FIELDS = 3  # columns, and rows, in which things stand
SUBSETS = {  # modality dropout: which modalities a batch of questions is given, and how often
    ("text", "image"): 0.55,
    ("text", "image", "audio"): 0.15,
    ("text", "audio"): 0.12,
    ("text",): 0.03,
    ("image",): 0.05,
    ("audio",): 0.04,
    ("image", "audio"): 0.06,
}


@dataclass(frozen=True, slots=True)
class Read:
    """Captions of about one length. rows int64[n]: of which scenes; ids, mask int64[n,1+H,T]; words [n,1+H,T,D].

    holds   float32[n,1+H,T]: whether the claim that a token is of holds, see ScenesCorpus.holding
    """

    rows: Tensor
    ids: Tensor
    mask: Tensor
    words: Tensor
    holds: Tensor


class Losses(nn.Module):
    """The losses, with what they learn of their own: how strict the recogniser is."""

    def __init__(self, model: ScenesReasoner, corpus: ScenesCorpus, recipe: TrainScenes) -> None:
        super().__init__()
        self.model, self.corpus, self.recipe = model, corpus, recipe
        self.scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-1.0))
        self.hears = Perception()
        self.place = nn.Linear(model.config.width, 2 * FIELDS)
        self.nowhere = nn.Linear(model.config.width, 1)
        self.concepts = torch.tensor([corpus.tokenizer.token_to_id(c) for c in corpus.concepts])

    def alignment(self, index: list[int], keys: Keys, rng: random.Random) -> Tensor:
        """Of scenes with their image tokens [N,P,D] and audio tokens [N,F,D]."""
        model, read = self.model, self.captions(index)
        loss = self.contrast(index, read, keys)[0] + self.grounded(index, read, keys)
        known, vectors = self.words(read, rng)
        seen = self.scale * (keys["image"] @ vectors.T) / vectors.shape[-1] ** 0.5 + self.bias
        loss = loss + balanced(seen.float(), self.corpus.grid(index, model.config.side)[..., known])
        return loss + balanced(self.hears(keys["audio"], vectors).float(), self.corpus.holds(index)[:, known])

    def reasoning(self, index: list[int], keys: Keys, key: str, rng: random.Random) -> Tensor:
        """Of scenes with their tokens by modality, and questions drawn by `key`."""
        model, recipe = self.model, self.recipe
        (given,) = rng.choices(list(SUBSETS), list(SUBSETS.values()))
        used = {m: tokens for m, tokens in keys.items() if m in given}
        words = mask = None
        if "text" in given:
            texts, answers, _ = self.corpus.questions(index, recipe.questions_per_scene, key)
            asked = self.corpus.encode(texts)
            mask = asked.mask
            words = model.text_encoder(asked.ids, mask)
        else:
            answers = self.corpus.counts(index)
        logits = model.reason(words, mask, used).logits
        weights = [recipe.exit_weight] * (len(logits) - 1) + [1.0]
        loss = torch.stack(
            [w * F.cross_entropy(x.float(), answers) for w, x in zip(weights, logits, strict=True)]
        ).sum()
        beside = recipe.contrastive_weight, recipe.grounding_weight, recipe.triplet_weight, recipe.caption_weight
        if any(beside):
            index = index[: len(index) // 2 + 1]  # of all of them it would take longer than the answers do
            keys = {m: tokens[: len(index)] for m, tokens in keys.items()}
            read = self.captions(index)
            nce, far = self.contrast(index, read, keys)
            loss = loss + recipe.contrastive_weight * nce + recipe.grounding_weight * self.grounded(index, read, keys)
            loss = loss + recipe.triplet_weight * far + recipe.caption_weight * self.captioning(index, keys["image"])
        return loss

    def captions(self, index: list[int]) -> list[Read]:
        """Each scene's caption, then its wrong ones, read in GROUPS of about one length: little of them is padding."""
        own, wrong = self.corpus.captions(index), self.corpus.wrong_captions(index)
        said = [text for one, others in zip(own, wrong, strict=True) for text in (one, *others)]
        texts, holds = self.corpus.encode(said), self.corpus.holding(index, said).unflatten(0, (-1, 1 + WRONG))
        ids = texts.ids.unflatten(0, (len(index), 1 + WRONG))
        found = []
        for rows in (ids != 0).sum(2).amax(1).argsort(stable=True).chunk(GROUPS):
            chosen = ids[rows]
            chosen = chosen[..., : int((chosen != 0).sum(2).max())]
            mask = (chosen != 0).long()
            words = self.model.text_encoder(chosen.flatten(0, 1), mask.flatten(0, 1))
            length = chosen.shape[2]
            found.append(Read(rows, chosen, mask, words.unflatten(0, mask.shape[:2]), holds[rows, :, :length]))
        return found

    def contrast(self, index: list[int], read: list[Read], keys: Keys) -> tuple[Tensor, Tensor]:
        """InfoNCE of captions with pictures and with sounds, and the triplet loss of pictures."""
        pools, scale = self.model.contrast.pools, self.model.contrast.scale
        made = [pools["text"](r.words.flatten(0, 1), r.mask.flatten(0, 1)).unflatten(0, r.mask.shape[:2]) for r in read]
        text = torch.cat(made).float()[torch.cat([r.rows for r in read]).argsort()]
        image, audio = (pools[m](keys[m]).float() for m in ("image", "audio"))
        same = self.corpus.same(index)
        nce = info_nce(text[:, 0], image, scale, text[:, 1:], same) + info_nce(text[:, 0], audio, scale, same=same)
        return nce, triplet(image, text[:, 0], text[:, 1:])

    def grounded(self, index: list[int], read: list[Read], keys: Keys) -> Tensor:
        """What captions, a scene's own and wrong ones, have to do with its picture, in three parts.

        matching    level 1 says whether the caption belongs to the picture, and of each word whether its claim holds
        grounding   the word for a thing's shape is like the cells of that thing alone, and like none if it isn't there
        place       level 1 says of that word in which column and row the thing stands
        """
        match, total, count = self.model.match, torch.zeros(()), 0
        held, truth, seen, own, nowhere, said_of, stands = [], [], [], [], [], [], []
        for r in read:
            image = keys["image"][r.rows]
            words, mask = r.words.flatten(0, 1), r.mask.flatten(0, 1)
            said = self.model.reason(words, mask, {"image": image}, levels=1).words[0]
            right = torch.tensor([1, *[0] * WRONG]).repeat(len(r.rows))
            total = total + F.cross_entropy(match(said, mask).float(), right, reduction="sum")
            count += len(right)
            held.append(match.word(said)[..., 0].flatten())
            truth.append(r.holds.flatten())
            where, cells, places = self.corpus.mentions(
                [index[i] for i in r.rows.tolist()], r.ids, self.model.config.side
            )
            scene, text, at = where.unbind(1)
            like = r.words.flatten(1, 2) @ image.transpose(1, 2)
            seen.append(like.unflatten(1, r.mask.shape[1:])[scene, text, at])
            own.append(cells)
            nowhere.append(self.nowhere(r.words[scene, text, at]))
            said_of.append(self.place(said.unflatten(0, r.mask.shape[:2])[scene, text, at]))
            stands.append(places)
        likeness = self.scale * torch.cat(seen).float() / self.model.config.width**0.5 + self.bias
        found = torch.cat(said_of).float().unflatten(1, (2, FIELDS)).flatten(0, 1)
        return (
            total / count
            + balanced(torch.cat(held).float(), torch.cat(truth))
            + pointed(likeness, torch.cat(nowhere).float(), torch.cat(own))
            + F.cross_entropy(found, torch.cat(stands).flatten(), ignore_index=int(UNKNOWN))
        )

    def captioning(self, index: list[int], image: Tensor) -> Tensor:
        """Each word of scenes' captions after those before it, from their image tokens [N,P,D]."""
        ids = self.corpus.encode(self.corpus.captions(index)).ids
        logits = self.model.captioner(ids[:, :-1], image).float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)

    def words(self, read: list[Read], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Which concepts the scenes' captions name, int64 [C], and one of the mentions of each [C,D]."""
        places: list[list[tuple[int, int, int]]] = [[] for _ in self.concepts]
        for group, r in enumerate(read):
            for c, row, position in (r.ids[:, 0, None] == self.concepts[:, None]).nonzero()[:, [1, 0, 2]].tolist():
                places[c].append((group, row, position))
        drawn = [(c, *rng.choice(found)) for c, found in enumerate(places) if found]
        vectors = [read[group].words[row, 0, position] for _, group, row, position in drawn]
        return torch.tensor([c for c, *_ in drawn]), torch.stack(vectors)


def pointed(logits: Tensor, nowhere: Tensor, cells: Tensor) -> Tensor:
    """Cross-entropy of pointing at one of a thing's own cells, or nowhere if the thing is not there.

    logits [M,P] of the cells, and nowhere's [M,1];  cells [M,P] as ScenesCorpus.mentions has them
    """
    every = torch.cat([nowhere, logits.masked_fill(cells == UNKNOWN, -torch.inf)], 1)
    there = cells == 1
    right = torch.cat([~there.any(1, keepdim=True), there], 1)
    return (every.logsumexp(1) - every.masked_fill(~right, -torch.inf).logsumexp(1)).mean()


def balanced(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy in which what is there counts as much as what is not; UNKNOWN counts nothing."""
    each = F.binary_cross_entropy_with_logits(logits, truth.clamp(min=0), reduction="none")
    there, absent = truth == 1, truth == 0
    assert UNKNOWN < 0
    return (each[there].mean() + each[absent].mean()) / 2
