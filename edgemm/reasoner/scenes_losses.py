"""What the scenes reasoner learns by, a batch of scenes at a time.

Axes: N scenes, B questions, T tokens, P cells of the picture's grid, C concepts, D width, H wrong captions, A answers.

Alignment (stage 1): a caption is found by its picture and by its sound, and the other way, among the batch and among
captions that are just not true (InfoNCE); level 1 says whether a caption belongs to a picture (matching); and each
cell of the grid is like the words of what stands there, and like no others (the recogniser). The last is what makes
the rest fast: a word finds what it names from the first step of cross-attention on.
Reasoning (stage 2): the answers of all three levels; beside them, on half of the scenes, InfoNCE and matching, a
triplet loss on the captions that are just not true, and captions written word by word.
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
from edgemm.recipe import TrainScenes

Keys = Mapping[str, Tensor]
GROUPS = 3
SUBSETS = {  # modality dropout: which modalities a batch of questions is given, and how often
    ("text", "image"): 0.55,
    ("text", "image", "audio"): 0.15,
    ("text", "audio"): 0.15,
    ("text",): 0.03,
    ("image",): 0.05,
    ("audio",): 0.04,
    ("image", "audio"): 0.03,
}


@dataclass(frozen=True, slots=True)
class Read:
    """Captions of about one length. rows int64[n]: of which scenes; ids, mask int64[n,1+H,T]; words [n,1+H,T,D]."""

    rows: Tensor
    ids: Tensor
    mask: Tensor
    words: Tensor


class Losses(nn.Module):
    """The losses, with what they learn of their own: how strict the recogniser is."""

    def __init__(self, model: ScenesReasoner, corpus: ScenesCorpus, recipe: TrainScenes) -> None:
        super().__init__()
        self.model, self.corpus, self.recipe = model, corpus, recipe
        self.scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-1.0))
        self.hears = Perception()
        self.concepts = torch.tensor([corpus.tokenizer.token_to_id(c) for c in corpus.concepts])

    def alignment(self, index: list[int], keys: Keys, rng: random.Random) -> Tensor:
        """Of scenes with their image tokens [N,P,D] and audio tokens [N,F,D]."""
        model, read = self.model, self.captions(index)
        loss = self.contrast(index, read, keys)[0] + self.matching(read, keys, rng)
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
        if recipe.contrastive_weight or recipe.triplet_weight or recipe.caption_weight:
            index = index[: len(index) // 2 + 1]  # of all of them it would take longer than the answers do
            keys = {m: tokens[: len(index)] for m, tokens in keys.items()}
            read = self.captions(index)
            nce, far = self.contrast(index, read, keys)
            loss = loss + recipe.contrastive_weight * (nce + self.matching(read, keys, rng))
            loss = loss + recipe.triplet_weight * far + recipe.caption_weight * self.captioning(read, keys)
        return loss

    def captions(self, index: list[int]) -> list[Read]:
        """Each scene's caption, then its wrong ones, read in GROUPS of about one length: little of them is padding."""
        own, wrong = self.corpus.captions(index), self.corpus.wrong_captions(index)
        texts = self.corpus.encode([text for one, others in zip(own, wrong, strict=True) for text in (one, *others)])
        ids = texts.ids.unflatten(0, (len(index), 1 + WRONG))
        found = []
        for rows in (ids != 0).sum(2).amax(1).argsort(stable=True).chunk(GROUPS):
            chosen = ids[rows]
            chosen = chosen[..., : int((chosen != 0).sum(2).max())]
            mask = (chosen != 0).long()
            words = self.model.text_encoder(chosen.flatten(0, 1), mask.flatten(0, 1))
            found.append(Read(rows, chosen, mask, words.unflatten(0, mask.shape[:2])))
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

    def matching(self, read: list[Read], keys: Keys, rng: random.Random) -> Tensor:
        """Does the caption belong to the picture? Of each scene its own, a wrong one, and that of another scene."""
        total, count = torch.zeros(()), 0
        for r in read:
            n = len(r.rows)
            wrong = torch.tensor([rng.randrange(1, 1 + WRONG) for _ in range(n)])
            rows, first = torch.arange(n), torch.zeros(n, dtype=torch.int64)
            pick = [(rows, first), (rows, wrong), (rows.roll(1), first)]
            asked, mask = (torch.stack([x[at] for at in pick], 1).flatten(0, 1) for x in (r.words, r.mask))
            said = self.model.reason(asked, mask, {"image": keys["image"][r.rows]}, levels=1).words[0]
            truth = torch.tensor([1, 0, 0]).repeat(n)
            total = total + F.cross_entropy(self.model.match(said[:, 0]).float(), truth, reduction="sum")
            count += len(truth)
        return total / count

    def captioning(self, read: list[Read], keys: Keys) -> Tensor:
        """Each word of a scene's caption after those before it, from its picture."""
        total, count = torch.zeros(()), 0
        for r in read:
            ids = r.ids[:, 0]
            logits = self.model.captioner(ids[:, :-1], keys["image"][r.rows]).float()
            right = ids[:, 1:].flatten()
            total = total + F.cross_entropy(logits.flatten(0, 1), right, ignore_index=0, reduction="sum")
            count += int((right != 0).sum())
        return total / count

    def words(self, read: list[Read], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Which concepts the scenes' captions name, int64 [C], and one of the mentions of each [C,D]."""
        places: list[list[tuple[int, int, int]]] = [[] for _ in self.concepts]
        for group, r in enumerate(read):
            for c, row, position in (r.ids[:, 0, None] == self.concepts[:, None]).nonzero()[:, [1, 0, 2]].tolist():
                places[c].append((group, row, position))
        drawn = [(c, *rng.choice(found)) for c, found in enumerate(places) if found]
        vectors = [read[group].words[row, 0, position] for _, group, row, position in drawn]
        return torch.tensor([c for c, *_ in drawn]), torch.stack(vectors)


def balanced(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy in which what is there counts as much as what is not; UNKNOWN counts nothing."""
    each = F.binary_cross_entropy_with_logits(logits, truth.clamp(min=0), reduction="none")
    there, absent = truth == 1, truth == 0
    assert UNKNOWN < 0
    return (each[there].mean() + each[absent].mean()) / 2
