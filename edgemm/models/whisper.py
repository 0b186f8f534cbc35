"""Whisper: speech to text. https://arxiv.org/abs/2212.04356

Components: audio_encoder (which makes the keys and values of the cross-attention, too: whoever runs one needs the
other) and decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperAttention
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from edgemm.errors import InputError
from edgemm.models import AttentionBlock, Component, Tensor, _transformers
from edgemm.models._decoder import (
    MAX_BATCH,
    BartKeys,
    BartLayer,
    Settings,
    bart_attention,
    cache_ports,
    decoder,
    read_settings,
)

CLASSES = {"WhisperForConditionalGeneration": WhisperForConditionalGeneration}
FREQUENCY_MAX = 8000.0  # fixed in WhisperFeatureExtractor
MERGED = "merged_padding"  # in config.json of a pruned model


class WhisperSettings(Settings):
    """Whisper's own part of generation_config.json."""

    no_timestamps_token_id: int | None = None
    lang_to_id: dict[str, int] | None = None
    task_to_id: dict[str, int] | None = None
    language: str | None = None
    task: str | None = None
    forced_decoder_ids: list[tuple[int, int | None]] | None = None


class AudioEncoder(nn.Module):
    """input_features float32[B,M,F] -> key and value of each cross-attention."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.model.encoder
        cross = (layer.encoder_attn for layer in model.model.decoder.layers)
        self.cross = nn.ModuleList(BartKeys(attention) for attention in cross if attention.num_heads)

    def forward(self, input_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.keys(self.encoder(input_features).last_hidden_state)

    def keys(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for keys in self.cross for tensor in keys(states))


class MergedPaddingEncoder(AudioEncoder):
    """An AudioEncoder that takes the recording and the beginning of the silence after it, not 30 s.

    input_features float32[B,M,F], which end with two positions of silence -> keys and values of n + m positions, and
    what is added to the scores of the decoder's queries, float32[B,1,1,n+m].

    Whisper pads every recording to P = 1500 positions, and what the padding holds differs by the embedding of its
    position alone. Of the P - n positions that were not given, m stay, one for `stride`: each has the weight of those
    it stands for, whose logarithm is added to the scores of its key (proportional attention; ToMe, arXiv 2210.09461).
    The decoder looks at what stays as it is: n + m keys.
    """

    def __init__(self, model: Any, stride: int) -> None:
        super().__init__(model)
        self.stride = stride

    def forward(self, input_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoder, total = self.encoder, self.encoder.embed_positions.num_embeddings
        states = nn.functional.gelu(encoder.conv1(input_features))
        states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
        given = states.shape[1]
        left = total - given
        merged = left // self.stride + 1  # one at least, of no weight where nothing is left: the graph has no branch
        silence = states[:, given - 2 : given - 1].expand(-1, merged, -1)  # the last one saw the edge
        middles = given + ((2 * torch.arange(merged) + 1) * left).div(2 * merged, rounding_mode="floor")
        positions = torch.cat([torch.arange(given), middles.clamp(max=total - 1)])
        states = torch.cat([states, silence], 1) + encoder.embed_positions.weight[positions]
        weight = torch.full((merged,), 1.0) * left / merged
        bias = torch.cat([torch.zeros(given), weight.clamp(min=1e-6).log()])[None, None, None]
        for layer in encoder.layers:
            states = layer(states, bias)
        return *self.keys(encoder.layer_norm(states)), bias.expand(states.shape[0], -1, -1, -1)


class Embed(nn.Module):
    def __init__(self, tokens: nn.Embedding, positions: nn.Embedding) -> None:
        super().__init__()
        self.tokens, self.positions = tokens, positions

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + nn.functional.embedding(positions, self.positions.weight)


def load(directory: Path) -> Any:
    cls = _transformers.choose(directory, CLASSES)
    return _transformers.load(directory, cls, attentions, attn_implementation="eager")


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    config, parts = model.config, model.model.decoder
    positions, merged = config.max_source_positions, getattr(config, MERGED, None)
    frames: int | str = "frames" if merged else 2 * positions
    features = Tensor("input_features", "float32", ("batch", config.num_mel_bins, frames))
    own, cross = (
        [(a.num_heads, a.head_dim) for a in (getattr(layer, name) for layer in parts.layers)]
        for name in ("self_attn", "encoder_attn")
    )
    made = cache_ports("cross", cross, "keys" if merged else positions)
    if merged:
        made = (*made, Tensor("cross_bias", "float32", ("batch", 1, 1, "keys")))
    encoder, sizes, least = AudioEncoder(model), {"batch": MAX_BATCH}, {}
    if merged:
        encoder, least = MergedPaddingEncoder(model, merged["stride"]), {"frames": 8}
        sizes |= {"frames": 2 * positions}
    return [
        Component("audio_encoder", encoder.eval(), (features,), made, sizes, min_sizes=least),
        decoder(
            Embed(parts.embed_tokens, parts.embed_positions),
            [BartLayer(layer, normalize_first=True) for layer in parts.layers],
            nn.Sequential(parts.layer_norm, model.proj_out),
            own,
            made,
            vocabulary=config.vocab_size,
            positions=config.max_target_positions,
            keys=positions if merged else 0,
        ),
    ]


def merge_padding(model: Any, stride: int, tail: float) -> None:
    """Let the encoder take the recording and `tail` s of silence, and one position for `stride` of what follows."""
    setattr(model.config, MERGED, {"stride": stride, "tail": tail})


def attentions(model: Any) -> list[AttentionBlock]:
    """Every attention layer, in the order they run."""
    blocks = []
    for name, module in model.named_modules():
        if isinstance(module, WhisperAttention):
            queries = "audio" if ".encoder." in name else "text"
            keys = "audio" if name.endswith("encoder_attn") else queries
            blocks.append(bart_attention(name, module, queries, keys))
    return blocks


def program(model: Any, directory: Path) -> dict[str, Any]:
    """Audio of up to 30 s to text: of English speech where the checkpoint knows several languages and names none."""
    settings: WhisperSettings = read_settings(model, directory, WhisperSettings)
    prompt = prompt_of(settings, getattr(model.config, "forced_decoder_ids", None))
    positions = model.config.max_target_positions
    # max_length is without the prompt, as transformers' Whisper counts. Where nothing says how many tokens, it
    # would stop after 20; here a transcript may take all positions.
    wanted = settings.max_new_tokens or settings.max_length or positions
    limit = min(wanted, positions - len(prompt))
    return {
        "audio": audio_spec(model, directory),
        "output": settings.generation(len(model.model.decoder.layers), prompt, limit),
    }


def audio_spec(model: Any, directory: Path) -> dict[str, Any]:
    """How audio becomes input_features; InputError when the feature extractor is absent or not the model's."""
    try:
        extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
    except OSError as e:
        raise InputError(f"{directory}: no preprocessor_config.json", fix="put the model's file there") from e
    config = model.config
    wanted = config.num_mel_bins, 2 * config.max_source_positions
    if (made := (extractor.feature_size, extractor.nb_max_frames)) != wanted:
        raise InputError(
            f"{directory}: preprocessor_config.json makes {made[0]} mels x {made[1]} frames",
            fix=f"the model takes {wanted[0]} x {wanted[1]}: put its own preprocessor_config.json there",
        )
    if extractor.dither:
        raise InputError(
            f"{directory}: preprocessor_config.json sets dither = {extractor.dither}, which is random",
            fix="set it to 0",
        )
    return {
        "tensor": "input_features",
        "sampling_rate": extractor.sampling_rate,
        "seconds": extractor.chunk_length,
        "pad": "silence",
        **({"tail": merged["tail"]} if (merged := getattr(config, MERGED, None)) else {}),
        "mel": {
            "n_fft": extractor.n_fft,
            "hop_length": extractor.hop_length,
            "n_mels": extractor.feature_size,
            "fmax": FREQUENCY_MAX,
        },
    }


def prompt_of(settings: WhisperSettings, forced: list[Any] | None = None) -> list[int]:
    """The ids that a text begins with: start, language, task, no timestamps, each where the checkpoint has it.

    forced   config.json's forced_decoder_ids, for checkpoints that have none in generation_config.json

    Follows transformers' generation_whisper.py:_retrieve_init_tokens, but takes English where that detects.
    """
    prompt: list[int | None] = [settings.start]
    language, task = settings.language, settings.task
    if language is None and task is None:
        prompt += [token for _, token in settings.forced_decoder_ids or forced or ()]
    if language is None and settings.lang_to_id and prompt[1:2] in ([], [None]):
        language = "en"
    if language is not None:
        prompt[1:2] = [_language_id(language, settings.lang_to_id or {})]
    tasks = settings.task_to_id or {}
    if task is not None and task not in tasks:
        raise InputError(f"generation_config.json: task = {task!r}", fix=f"known: {', '.join(tasks)}")
    if task is not None or (language is not None and tasks and not set(tasks.values()) & set(prompt)):
        prompt.append(tasks[task or "transcribe"])
    if settings.no_timestamps_token_id not in (None, prompt[-1]):
        prompt.append(settings.no_timestamps_token_id)
    return [token for token in prompt if token is not None]


def _language_id(language: str, known: dict[str, int]) -> int:
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    token = code if code.startswith("<|") else f"<|{code}|>"
    if token not in known:
        raise InputError(f"generation_config.json: language = {language!r}", fix=f"known: {', '.join(known)}")
    return known[token]
