"""New classes by soft prompts: a few learned vectors among the words that the text encoder reads; all else is frozen.

Axes: N examples, C labels, T tokens, D width, E embedding.

A label's prompt is [CLS], vectors that all labels share, its name, [SEP], and its picture or recording is the one whose
embedding is most like the prompt's (Lester et al. 2021; between media, Zhou et al. 2022). The name of a label that the
tokenizer doesn't know is learned as well. What comes out is an embedding a label: a device needs nothing of all this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from edgemm.errors import InputError
from edgemm.reasoner.model import additive_mask
from edgemm.reasoner.scenes_model import ScenesReasoner


class SoftPrompts(nn.Module):
    """The prompts of `labels`: `length` shared vectors, and a vector for each name that is not a word.

    They begin as the mean of all words; a name that is not a word as the mean of those that are.
    """

    def __init__(self, model: ScenesReasoner, tokenizer: Tokenizer, labels: Sequence[str], length: int) -> None:
        super().__init__()
        self.bert, self.pool = model.text_encoder.bert, model.contrast.pools["text"]
        table = self.bert.get_input_embeddings().weight.detach()
        ids = [tokenizer.encode(label).ids for label in labels]
        if long := [label for label, row in zip(labels, ids, strict=True) if len(row) != 3]:
            raise InputError(f"the label {long[0]!r} is not one word", fix="name each label with one word")
        begin, words, end = torch.tensor(ids).T
        unknown = words == tokenizer.token_to_id("[UNK]")
        start = table[words].clone()
        start[unknown] = (start[~unknown] if bool((~unknown).any()) else table).mean(0)
        self.begin, self.words, self.end = table[begin], start, table[end]
        self.unknown = unknown.float()[:, None]
        self.shared = nn.Parameter(table.mean(0).expand(length, -1).clone())
        self.names = nn.Parameter(torch.zeros_like(start))

    def forward(self) -> Tensor:
        """The embedding of each label's prompt [C,E], of length 1."""
        shared = self.shared.expand(len(self.words), -1, -1)
        names = self.words + self.names * self.unknown
        prompts = torch.cat([self.begin[:, None], shared, names[:, None], self.end[:, None]], 1)
        mask = torch.ones(prompts.shape[:2], dtype=torch.int64)
        hidden = self.bert(inputs_embeds=prompts, attention_mask=additive_mask(mask, prompts.dtype)).last_hidden_state
        embedded: Tensor = self.pool(hidden, mask)
        return embedded


def learn_prompts(
    model: ScenesReasoner,
    tokenizer: Tokenizer,
    embeddings: Tensor,
    labels: Sequence[str],
    *,
    length: int = 4,
    steps: int = 100,
    learning_rate: float = 0.02,
) -> tuple[tuple[str, ...], Tensor]:
    """embeddings [N,E] of pictures or recordings and the label of each -> the labels, and weights [C,E] to score them.

    Each label counts as much as the others, however many examples it has. The model's parameters stay as they are.
    Raises InputError for labels that are not one word each, and for fewer than two.
    """
    known = tuple(dict.fromkeys(labels))
    if len(known) < 2:
        raise InputError(f"{len(known)} labels to tell apart", fix="give examples of two labels or more")
    of = torch.tensor([known.index(label) for label in labels])
    each = 1 / torch.bincount(of).float()
    prompts, scale = SoftPrompts(model, tokenizer, known, length), model.contrast.scale.detach()
    learned = [prompts.shared, prompts.names]
    optimizer = torch.optim.Adam(learned, lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            loss = F.cross_entropy(scale * embeddings @ prompts().T, of, each)
            for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                parameter.grad = gradient
            optimizer.step()
    with torch.no_grad():
        return known, scale * prompts()
