"""CLAP (Wu et al. 2023): sounds and texts in one space.

Checkpoints with feature fusion (config: enable_fusion) join four spectrograms of a long input. Here inputs are no
longer than the model's window, and of such transformers' processor gives the same spectrogram four times and says
that the input is long: so does the graph, from one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import ClapFeatureExtractor, ClapModel

from edgemm.errors import InputError
from edgemm.models import Component, Tensor, _transformers
from edgemm.models._dual_encoders import EAGER, MAX_BATCH, Tower, attentions, max_tokens, output, text_encoder
from edgemm.models._processors import feature_extractor, text_spec

PADS = {"repeatpad": "repeat", "pad": "silence"}


class AudioTower(Tower):
    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        return self.embed(input_features=input_features)


def load(directory: Path) -> Any:
    """ClapModel; any float width becomes FP32. `frames`: spectra that the feature extractor makes of an input.

    Raises InputError when model and feature extractor don't fit.
    """
    cls = _transformers.choose(directory, {"ClapModel": ClapModel})
    model = _transformers.load(directory, cls, attentions, **EAGER)
    audio, extractor = model.config.audio_config, read_extractor(directory)
    model.frames = int(extractor.nb_max_samples) // extractor.hop_length + 1
    most = audio.spec_size * (audio.spec_size // audio.num_mel_bins)
    if model.frames > most or extractor.feature_size != audio.num_mel_bins:
        raise InputError(
            f"{directory}: the feature extractor makes spectrograms of {model.frames} x {extractor.feature_size}",
            fix=f"the model takes at most {most} x {audio.num_mel_bins}: give the extractor that belongs to it",
        )
    if (swin := model.audio_model.audio_encoder).enable_fusion:
        swin.enable_fusion = False  # else it picks the long inputs of a batch by index, which can't be exported
        swin.patch_embed.forward = partial(fuse, swin.patch_embed)
    return model


def fuse(patches: Any, spectrogram: torch.Tensor, _long: None) -> torch.Tensor:
    """ClapAudioPatchEmbed.forward where all inputs are long and their four spectrograms the same [B,1,T,M]."""
    whole = patches.proj(spectrogram)
    parts = torch.cat([patches.mel_conv2d(spectrogram)] * 3, -1)
    fused = patches.fusion_model(whole, F.pad(parts, (0, whole.shape[-1] - parts.shape[-1])))
    return patches.norm(fused.flatten(2).transpose(1, 2) if patches.flatten else fused)


def read_extractor(directory: Path) -> Any:
    """The model's feature extractor; InputError when there is none or its padding is not known."""
    extractor = feature_extractor(ClapFeatureExtractor, directory)
    if extractor.padding not in PADS:
        raise InputError(f"{directory}: padding {extractor.padding!r} of audio", fix=f"known: {', '.join(PADS)}")
    return extractor


def save(model: Any, directory: Path, source: Path) -> None:
    _transformers.save(model, directory, source, attentions)


def components(model: Any) -> list[Component]:
    width = model.config.projection_dim
    features = Tensor("input_features", "float32", ("batch", 1, model.frames, model.config.audio_config.num_mel_bins))
    embeds = Tensor("audio_embeds", "float32", ("batch", width))
    tower = AudioTower(model.audio_model, model.audio_projection)
    return [
        Component("audio_encoder", tower, (features,), (embeds,), {"batch": MAX_BATCH}),
        text_encoder(model, width, max_tokens(model.config.text_config), mask=True),
    ]


def program(model: Any, directory: Path) -> dict[str, Any]:
    extractor = read_extractor(directory)
    fusion, tokens = extractor.truncation == "fusion", max_tokens(model.config.text_config)
    return {
        "audio": {
            "tensor": "input_features",
            "sampling_rate": extractor.sampling_rate,
            "seconds": extractor.max_length_s,
            "pad": PADS[extractor.padding],
            "mel": {
                "n_fft": extractor.fft_window_size,
                "hop_length": extractor.hop_length,
                "n_mels": extractor.feature_size,
                "fmin": extractor.frequency_min,
                "fmax": extractor.frequency_max,
                "scale": "htk" if fusion else "slaney",
                "norm": None if fusion else "slaney",
                "log": "db",
                "layout": "channel_frames_mels",
            },
        },
        "text": text_spec(directory, ids="input_ids", mask="attention_mask", max_tokens=tokens),
        "output": output("audio", model.logit_scale_a),
    }
