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
        self.cross = nn.ModuleList(BartKeys(layer.encoder_attn) for layer in model.model.decoder.layers)

    def forward(self, input_features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = self.encoder(input_features).last_hidden_state
        return tuple(tensor for keys in self.cross for tensor in keys(states))


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
    features = Tensor("input_features", "float32", ("batch", config.num_mel_bins, 2 * config.max_source_positions))
    own, cross = (
        [(a.num_heads, a.head_dim) for a in (getattr(layer, name) for layer in parts.layers)]
        for name in ("self_attn", "encoder_attn")
    )
    made = cache_ports("cross", cross, config.max_source_positions)
    return [
        Component("audio_encoder", AudioEncoder(model).eval(), (features,), made, {"batch": MAX_BATCH}),
        decoder(
            Embed(parts.embed_tokens, parts.embed_positions),
            [BartLayer(layer, normalize_first=True) for layer in parts.layers],
            nn.Sequential(parts.layer_norm, model.proj_out),
            own,
            made,
            vocabulary=config.vocab_size,
            positions=config.max_target_positions,
        ),
    ]


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
        "output": settings.generation(model.config.decoder_layers, prompt, limit),
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
