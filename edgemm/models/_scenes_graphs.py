"""The graphs of the scenes reasoner, for each of its tasks.

    image_encoder, text_encoder, audio_encoder   each run when its modality is there

answer                 questions on pictures and recordings
    given_text_image_audio .. given_audio        one for each subset of the modalities: what the levels take of it
    level_1, level_2, level_3                    the levels, the same for every subset
find_image, find_audio   captions and pictures, or recordings, in one space
    text_embedding, image_embedding or audio_embedding
    matcher                                      of pictures alone: does a caption belong to one?
caption                captions of pictures, word by word
    cross_cache, decoder                         see _decoder.py
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from torch import Tensor, nn

from edgemm.models import Component
from edgemm.models import Tensor as Spec
from edgemm.models._decoder import Settings, cache_ports, decoder
from edgemm.reasoner.captioner import BEGIN, END
from edgemm.reasoner.config import MODALITIES, ScenesConfig
from edgemm.reasoner.levels import FirstGraph, LastGraph, MiddleGraph
from edgemm.reasoner.scenes_model import Given, ScenesReasoner

MAX_BATCH = 64
SIZES = {"batch": MAX_BATCH}


def port(name: str, *shape: int | str) -> Spec:
    return Spec(name, "float32", ("batch", *shape))


IDS, MASK = (Spec(name, "int64", ("batch", "tokens")) for name in ("input_ids", "attention_mask"))


def tokens(model: ScenesReasoner) -> dict[str, Spec]:
    """What each encoder makes."""
    d = model.config.width
    return {
        "text": port("text_tokens", "tokens", d),
        "image": port("image_tokens", model.config.patches, d),
        "audio": port("audio_tokens", "frames", d),
    }


def lengths(model: ScenesReasoner) -> tuple[dict[str, int], dict[str, int]]:
    """The most words of the task's texts, and the most audio frames."""
    config = model.config
    return {"tokens": most_tokens(config)}, {"frames": config.frames(config.max_samples)}


def most_tokens(config: ScenesConfig) -> int:
    return config.question_tokens if config.task == "answer" else config.max_tokens


def encoders(model: ScenesReasoner, *names: str) -> list[Component]:
    config, made = model.config, tokens(model)
    words, frames = lengths(model)
    pixels, wave = port("pixel_values", 3, config.image_size, config.image_size), port("input_values", "samples")
    high, recording = {"input_ids": config.vocab_size}, {"samples": config.max_samples}
    found = {
        "image": Component("image_encoder", model.image_encoder, (pixels,), (made["image"],), SIZES),
        "text": Component("text_encoder", model.text_encoder, (IDS, MASK), (made["text"],), SIZES | words, high),
        "audio": Component(
            "audio_encoder",
            model.audio_encoder,
            (wave,),
            (made["audio"],),
            SIZES | recording | frames,
            min_sizes={"samples": config.min_samples},
        ),
    }
    return [found[name] for name in names]


def answering(model: ScenesReasoner) -> list[Component]:
    config = model.config
    d = config.width
    words, frames = lengths(model)
    encoded, made = tokens(model), encoders(model, "image", "text", "audio")
    question = port("question", "tokens", d), Spec("question_mask", "int64", ("batch", "tokens"))
    keys = port("image_keys", config.patches, d), port("audio_keys", "frames", d)
    present, gates = port("present", len(MODALITIES)), port("gates", len(MODALITIES))
    for count in range(len(encoded), 0, -1):  # the first whose inputs are there makes what the levels take
        for subset in combinations(encoded, count):
            inputs = [encoded[m] for m in subset]
            if "text" in subset:
                inputs.insert(1, MASK)
            used = SIZES | (words if "text" in subset else {}) | (frames if "audio" in subset else {})
            outputs = (*question, *keys, present)
            made.append(Component("_".join(["given", *subset]), Given(model), tuple(inputs), outputs, used))
    slots = {n: port(f"slots_{n}", config.slots, d) for n in (1, 2)}
    said = {n: port(f"words_{n}", "tokens", d) for n in (1, 2)}
    answer = {n: port("logits" if n == 3 else f"exit_{n}", len(config.answers)) for n in (1, 2, 3)}
    used = SIZES | words | frames
    smallest = {"frames": config.min_frames}
    shared = (question[1], *keys)
    first, middle, last = (model.level(i) for i in range(3))
    levels: list[tuple[nn.Module, tuple[Spec, ...], tuple[Spec, ...]]] = [
        (FirstGraph(first), (*question, *keys, present), (said[1], slots[1], gates, answer[1])),
        (MiddleGraph(middle), (said[1], *shared, gates, slots[1]), (said[2], slots[2], answer[2])),
        (LastGraph(last), (said[2], *shared, gates, slots[2]), (answer[3],)),
    ]
    for n, (graph, takes, makes) in enumerate(levels, 1):
        made.append(Component(f"level_{n}", graph, takes, makes, used, min_sizes=smallest))
    return made


class Embedding(nn.Module):
    """A pool as a graph, its input by the name of the modality's tokens."""

    def __init__(self, model: ScenesReasoner, modality: str) -> None:
        super().__init__()
        self.pool = model.contrast.pools[modality]


class TextEmbedding(Embedding):
    def forward(self, text_tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """text_tokens [B,T,D], attention_mask int64 [B,T] -> text_embeds [B,E]."""
        return self.pool(text_tokens, attention_mask)


class ImageEmbedding(Embedding):
    def forward(self, image_tokens: Tensor) -> Tensor:
        """image_tokens [B,P,D] -> image_embeds [B,E]."""
        return self.pool(image_tokens)


class AudioEmbedding(Embedding):
    def forward(self, audio_tokens: Tensor) -> Tensor:
        """audio_tokens [B,F,D] -> audio_embeds [B,E]."""
        return self.pool(audio_tokens)


class Matcher(nn.Module):
    """The first level and the head that says whether a caption belongs to a picture."""

    def __init__(self, model: ScenesReasoner) -> None:
        super().__init__()
        self.level, self.match = model.level(0), model.match

    def forward(self, text_tokens: Tensor, attention_mask: Tensor, image_tokens: Tensor) -> Tensor:
        """text_tokens [B,T,D], attention_mask int64 [B,T], image_tokens [B,P,D] -> match [B,2]."""
        present = image_tokens.new_tensor([[1.0, 0.0]]).expand(text_tokens.shape[0], -1)
        words = self.level.run(text_tokens, attention_mask, {"image": image_tokens}, present, None)[0]
        return self.match(words, attention_mask)


def finding(model: ScenesReasoner, modality: str) -> list[Component]:
    words, frames = lengths(model)
    encoded, e = tokens(model), model.config.embedding
    graph = {"image": ImageEmbedding, "audio": AudioEmbedding}[modality](model, modality)
    used = SIZES | (frames if modality == "audio" else {})
    said = encoded["text"], MASK
    made = [
        *encoders(model, modality, "text"),
        Component(f"{modality}_embedding", graph, (encoded[modality],), (port(f"{modality}_embeds", e),), used),
        Component("text_embedding", TextEmbedding(model, "text"), said, (port("text_embeds", e),), SIZES | words),
    ]
    if modality == "image":
        match = port("match", 2)
        made.append(Component("matcher", Matcher(model), (*said, encoded["image"]), (match,), SIZES | words))
    return made


class CrossCache(nn.Module):
    """The keys and values that all words of a caption share."""

    def __init__(self, model: ScenesReasoner) -> None:
        super().__init__()
        self.captioner = model.captioner

    def forward(self, image_tokens: Tensor) -> tuple[Tensor, ...]:
        """image_tokens [B,P,D] -> cross_key_i, cross_value_i [B,H,P,d] of each layer."""
        return tuple(part for pair in self.captioner.cross(image_tokens) for part in pair)


def captioning(model: ScenesReasoner) -> list[Component]:
    config, image, captioner = model.config, tokens(model)["image"], model.captioner
    layers = list(captioner.layers)
    own, other = (
        [(a.heads, a.head_dim) for a in (getattr(layer, f"{kind}_attention") for layer in layers)]
        for kind in ("self", "cross")
    )
    cross = cache_ports("cross", other, config.patches)
    sizes = {"vocabulary": config.vocab_size, "positions": config.max_tokens}
    writer = decoder(captioner.embed, layers, captioner.head, own, cross, **sizes)
    return [*encoders(model, "image"), Component("cross_cache", CrossCache(model), (image,), cross, SIZES), writer]


GRAPHS = {
    "answer": answering,
    "find_image": lambda model: finding(model, "image"),
    "find_audio": lambda model: finding(model, "audio"),
    "caption": captioning,
}


def output(model: ScenesReasoner) -> dict[str, Any]:
    """program.json's `output`."""
    config = model.config
    if config.task in ("find_image", "find_audio"):
        modality = config.task.removeprefix("find_")
        tensors = {modality: f"{modality}_embeds", "text": "text_embeds"}
        match = {"match": "match"} if modality == "image" else {}
        return {"kind": "embeddings", "tensors": tensors, "scale": float(model.contrast.scale.detach()), **match}
    if config.task == "caption":
        return Settings(eos_token_id=END).generation(len(model.captioner.layers), [BEGIN], config.max_tokens)
    exits = [{"tensor": f"exit_{n}", "confidence": c} for n, c in enumerate(config.exits, 1) if c <= 1]
    return {"kind": "labels", "tensor": "logits", "labels": list(config.answers), "exits": exits}
