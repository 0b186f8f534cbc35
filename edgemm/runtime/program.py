"""program.json: how files become tensors, tensors flow through components, and logits become an answer.

It comes from a bundle, so from outside: everything is validated here before a native library sees it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgemm.recipe import Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,80}$")]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Channels = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


class Port(Strict):
    """A tensor by name; `shape` holds sizes, and names for the dynamic axes."""

    name: Name
    dtype: Literal["float32", "int64"]
    shape: tuple[Size | Name, ...]


class ComponentSpec(Strict):
    """One compiled graph. `max_sizes`: largest size of each dynamic axis."""

    name: Name
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_sizes: dict[Name, Size]


class ImageSpec(Strict):
    """size [H,W] pixels; resample: a Pillow filter; mean and std per channel of values in 0..1."""

    tensor: Name
    size: tuple[Size, Size]
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
    mean: Channels
    std: Channels


class TextSpec(Strict):
    """Tensors that the token ids and their mask go to; the tokenizer's file; the id that pads."""

    ids: Name
    mask: Name
    tokenizer: Literal["tokenizer.json"]
    max_tokens: Size
    pad_id: int = Field(0, ge=0)


class OutputSpec(Strict):
    """The tensor [B,A] that answers, and its A labels."""

    tensor: Name
    labels: tuple[str, ...] = Field(min_length=1)


class Settings(Strict):
    """threads; precision of the float parts."""

    threads: int = Field(ge=1, le=1024)
    precision: Literal["f32", "bf16", "f16"] = "f32"


class Program(Strict):
    """Components in the order they run. `backend`: the module of edgemm/runtime/ that runs them."""

    backend: Literal["openvino", "onnxruntime"]
    settings: Settings
    components: tuple[ComponentSpec, ...] = Field(min_length=1)
    image: ImageSpec
    text: TextSpec
    output: OutputSpec

    @model_validator(mode="after")
    def tensors_are_joined(self) -> Program:
        """Every input is made by an earlier component or by pre-processing, and the answer by one of them."""
        known = {self.image.tensor, self.text.ids, self.text.mask}
        for component in self.components:
            if missing := {p.name for p in component.inputs} - known:
                raise ValueError(f"nothing makes the input {min(missing)!r} of {component.name}")
            known |= {p.name for p in component.outputs}
        answers = [p for c in self.components for p in c.outputs if p.name == self.output.tensor]
        if not answers or answers[-1].shape[-1] != len(self.output.labels):
            raise ValueError(f"{self.output.tensor!r} is no output with one value for each of the labels")
        return self
