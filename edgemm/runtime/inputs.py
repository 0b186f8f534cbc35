"""How media become tensors: what program.json says of images, texts, audio and inputs that come ready made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgemm.yaml_files import Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,120}$")]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Side = Annotated[int, Field(ge=1, le=1 << 13)]
Edge = Annotated[int, Field(ge=1, le=1 << 26)]  # the largest stands for no limit: it is more than MAX_PIXELS
Positive = Annotated[float, Field(gt=0)]
Id = Annotated[int, Field(ge=0, le=1 << 24)]
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class ImageSpec(Strict):
    """Decode to RGB, resize, crop, scale to 0..1, normalise -> `tensor` float32[1,3,H,W].

    transparency  drop: the colour under it is kept; white: the image is laid on white
    size       [H,W] pixels; for `shortest` the sides that the resized image must not fall short of
               and not exceed: [shortest edge, longest edge]; None: the image is not resized
    fit        exact: to `size`; shortest: keep the ratio, shortest edge to size[0], longest at most size[1]
    rounding   of the other edge under `shortest`: down (torchvision, CLIP), nearest (ViLT)
    multiple   round both sides down to a multiple of this many pixels
    crop       [H,W] cut from the centre after resizing, zeros where the image is smaller
    resample   a Pillow filter;  scale  what a byte is multiplied by;  mean, std  per channel, after scaling
    """

    tensor: Name
    transparency: Literal["drop", "white"] = "drop"
    size: tuple[Edge, Edge] | None
    fit: Literal["exact", "shortest"] = "exact"
    rounding: Literal["down", "nearest"] = "down"
    multiple: Size = 1
    crop: tuple[Side, Side] | None = None
    resample: Resample
    scale: Positive = 1 / 255
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class TextSpec(Strict):
    """Tensors that the token ids, their mask and segment go to; the tokenizer's file; the id that pads.

    boxes    tensor of one box [x0,y0,x1,y1] (0..1000) a token: words come with boxes (documents)
    pad_to   every text is padded to this many tokens, which the model expects; 0 pads none
    """

    ids: Name
    mask: Name | None = None
    types: Name | None = None
    boxes: Name | None = None
    tokenizer: Literal["tokenizer.json"] = "tokenizer.json"
    max_tokens: Size
    pad_id: Id = 0
    pad_to: int = Field(0, ge=0, le=1 << 20)


class Mel(Strict):
    """Log-mel spectrogram. Frames of `n_fft` samples (Hann window), `hop_length` apart, centred with reflection.

    scale, norm  of the filter bank, as librosa calls them;  fmin, fmax  Hz
    log          whisper: log10, floor 8 below the largest, (x + 4) / 4;  db: 10 log10
    layout       shape after the batch axis: mels_frames [M,T], channel_frames_mels [1,T,M]
    """

    n_fft: Annotated[int, Field(ge=2, le=1 << 16)]
    hop_length: Size
    n_mels: Annotated[int, Field(ge=1, le=1024)]
    fmin: float = Field(0.0, ge=0)
    fmax: float = Field(gt=0)
    scale: Literal["slaney", "htk"] = "slaney"
    norm: Literal["slaney"] | None = "slaney"
    log: Literal["whisper", "db"] = "whisper"
    layout: Literal["mels_frames", "channel_frames_mels"] = "mels_frames"

    @model_validator(mode="after")
    def has_a_band(self) -> Mel:
        if self.fmin >= self.fmax:
            raise ValueError(f"fmin {self.fmin} Hz is not under fmax {self.fmax} Hz")
        return self


class AudioSpec(Strict):
    """Decode to mono, resample to `sampling_rate` Hz, then a log-mel spectrogram or, without `mel`, the waveform.

    seconds    longest input; a longer one is refused;  min_samples  shortest input, after resampling
    pad_to     samples that a shorter input is filled up to with zeros
    pad        none; silence: zeros up to `seconds`; repeat: the whole input again and again, then zeros
    tail       s: under `silence` no more zeros than these and those that make whole seconds
    normalize  the waveform to zero mean and unit variance, before padding
    mask       tensor int64[1,T]: 1 where the input is, 0 where it was padded; for models that want one
    """

    tensor: Name
    mask: Name | None = None
    sampling_rate: Size
    seconds: float = Field(gt=0, le=3_600)
    min_samples: Size = 1
    pad_to: int = Field(0, ge=0, le=1 << 30)
    pad: Literal["none", "silence", "repeat"] = "none"
    tail: float | None = Field(None, ge=0)
    normalize: bool = False
    mel: Mel | None = None


class TensorSpec(Strict):
    """An input that comes ready made, for graphs whose media are not known. `high`: ids are under this."""

    tensor: Name
    kind: Literal["image", "audio", "tokens", "mask", "tensor"]
    high: Size | None = None
