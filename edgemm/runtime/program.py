"""program.json: how tensors flow through components, and outputs become an answer; see inputs.py for its media.

It comes from a bundle, so from outside: everything is validated here before a native library sees it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgemm.runtime.inputs import AudioSpec, Id, ImageSpec, Name, Size, TensorSpec, TextSpec
from edgemm.yaml_files import Strict


class Port(Strict):
    """A tensor by name; `shape` holds sizes, and names for the dynamic axes."""

    name: Name
    dtype: Literal["float32", "int64", "int32", "bool"]
    shape: tuple[Size | Name, ...]


class ComponentSpec(Strict):
    """One compiled graph. `max_sizes`: largest size of each dynamic axis; `min_sizes` the smallest where over 1.

    precision   of the float parts, where it is not that of the settings;  threads  at most, of those of the settings
    state       (input, output) that go round: the other inputs, as long as one likes along axis 1, are taken chunk by
                chunk, a chunk being what the port's shape says; see recurrence.py
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_sizes: dict[Name, Size]
    min_sizes: dict[Name, Size] = Field({})
    precision: Literal["f32", "bf16"] | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    state: tuple[Name, Name] | None = None

    @model_validator(mode="after")
    def state_goes_round(self) -> ComponentSpec:
        if self.state is None:
            return self
        before = [p for p in self.inputs if p.name == self.state[0]]
        after = [p for p in self.outputs if p.name == self.state[1]]
        shapes = {(p.dtype, p.shape[1:]) for p in (*before, *after)}
        if not before or not after or len(shapes) > 1 or not all(isinstance(n, int) for n in before[0].shape[1:]):
            raise ValueError(f"{self.name}: {' and '.join(self.state)} are no input and output of one fixed shape")
        chunks = {p.shape[1:2] for p in self.inputs if p not in before}
        if len(chunks) != 1 or not all(isinstance(n, int) for n in chunks.pop() or [""]):
            raise ValueError(f"{self.name}: its inputs have no chunks of one fixed size")
        return self


class Exit(Strict):
    """`tensor` [B,A] is the answer of each row whose largest probability (softmax) is at least `confidence`."""

    tensor: Name
    confidence: float = Field(gt=0, le=1)


class Labels(Strict):
    """`tensor` [B,A] scores the A labels; `activation` makes probabilities of them.

    exits   where a sure row leaves early: the components behind are not run for it
    """

    kind: Literal["labels"] = "labels"
    tensor: Name
    labels: tuple[str, ...] = Field(min_length=1)
    activation: Literal["softmax", "sigmoid"] = "softmax"
    exits: tuple[Exit, ...] = ()

    @property
    def needs(self) -> set[str]:
        """Outputs of components that the answer is made of."""
        return {self.tensor}


class Embeddings(Strict):
    """Two `tensors` [B,D], unit length, by modality; similarity = scale * dot product + bias.

    match   tensor [B,2] of a fusion that scores (no match, match), where the model has one
    """

    kind: Literal["embeddings"] = "embeddings"
    tensors: dict[Literal["image", "text", "audio"], Name] = Field(min_length=2, max_length=2)
    scale: float = 1.0
    bias: float = 0.0
    activation: Literal["softmax", "sigmoid"] = "softmax"
    match: Name | None = None

    @property
    def needs(self) -> set[str]:
        return {*self.tensors.values(), *([self.match] if self.match else [])}


class Picture(Strict):
    """What becomes of the ids that a decoder made: `ids` int64[B,count], of which a component makes `tensor`.

    tensor   float32[B,3,H,W], RGB, -1..1
    """

    ids: Name
    tensor: Name = "picture"
    count: Size


class Generation(Strict):
    """Text, token by token, from the component `decoder`, whose key/value cache goes round through the runtime.

    The decoder's inputs: `ids` int64[B,T]; `positions` int64[B,T]; `mask` int64[B,P+T], 0 for cache slots that
    hold nothing; a tensor `past` float32[B,H,P,D] for each pair (past, present) in `cache`; and whatever
    earlier components made (encoder states, or the cross-attention's keys and values, computed once).
    Its outputs: `logits` float32[B,V] of the last token, and each `present` float32[B,H,P+T,D].
    The first call has P = 1: one slot of zeros that the mask hides, so that one graph serves with and
    without a cache.

    prompt             ids that every text begins with; `text_prompt`: the query's text follows them
    eos                ids that end a text;  suppress, suppress_first  ids never made, and not made first
    beams              width of the beam search, 1 is greedy; `length_penalty` as transformers has it
    picture            of models whose ids tell of a picture and are no words
    """

    kind: Literal["generation"] = "generation"
    decoder: Name = "decoder"
    ids: Name = "decoder_input_ids"
    positions: Name = "position_ids"
    mask: Name = "decoder_attention_mask"
    logits: Name = "logits"
    cache: tuple[tuple[Name, Name], ...] = Field(min_length=1)
    tokenizer: Literal["tokenizer.json"] = "tokenizer.json"
    prompt: tuple[Id, ...] = Field(min_length=1)
    text_prompt: bool = False
    eos: tuple[Id, ...] = Field(min_length=1)
    suppress: tuple[Id, ...] = ()
    suppress_first: tuple[Id, ...] = ()
    max_new_tokens: Size
    beams: int = Field(1, ge=1, le=64)
    length_penalty: float = 1.0
    picture: Picture | None = None

    @property
    def needs(self) -> set[str]:
        made = {self.picture.tensor} if self.picture else set()
        return {self.logits, *(present for _, present in self.cache), *made}

    @property
    def own(self) -> set[str]:
        """The decoder's inputs that the token loop makes."""
        return {self.ids, self.positions, self.mask, *(past for past, _ in self.cache)}


class Transcript(Strict):
    """CTC: `tensor` [B,T,V] scores a character of the tokenizer, or `blank`, at every step."""

    kind: Literal["transcript"] = "transcript"
    tensor: Name
    tokenizer: Literal["tokenizer.json"] = "tokenizer.json"
    blank: Id

    @property
    def needs(self) -> set[str]:
        return {self.tensor}


class Features(Strict):
    """Tensors as they are, for models without a head that answers."""

    kind: Literal["features"] = "features"
    tensors: tuple[Name, ...] = Field(min_length=1)

    @property
    def needs(self) -> set[str]:
        return set(self.tensors)


Output = Annotated[Labels | Embeddings | Generation | Transcript | Features, Field(discriminator="kind")]


class Settings(Strict):
    """threads; precision of the float parts."""

    threads: int = Field(ge=1, le=1024)
    precision: Literal["f32", "bf16", "f16"] = "f32"


class Program(Strict):
    """Components in the order they run. `backend`: the module of edgemm/runtime/ that runs them.

    profiles   shapes that TensorRT's engines take: by component, input, then min, opt and max
    """

    backend: Literal["openvino", "onnxruntime", "tensorrt", "tensorrt_rtx"]
    settings: Settings
    components: tuple[ComponentSpec, ...] = Field(min_length=1)
    image: ImageSpec | None = None
    text: TextSpec | None = None
    audio: AudioSpec | None = None
    tensors: tuple[TensorSpec, ...] = ()
    profiles: dict[Name, dict[Name, dict[Literal["min", "opt", "max"], tuple[Size, ...]]]] = Field({})
    output: Output

    def sources(self) -> dict[str, set[str]]:
        """Modality -> the tensors that its pre-processing makes."""
        made: dict[str, set[str]] = {}
        if self.image:
            made["image"] = {self.image.tensor}
        if self.text:
            made["text"] = {n for n in (self.text.ids, self.text.mask, self.text.types, self.text.boxes) if n}
        if self.audio:
            made["audio"] = {n for n in (self.audio.tensor, self.audio.mask) if n}
        if self.tensors:
            made["tensors"] = {t.tensor for t in self.tensors}
        return made

    @model_validator(mode="before")
    @classmethod
    def output_is_labels_unless_it_says(cls, values: Any) -> Any:
        """Programs written before there were other kinds do not name theirs."""
        if isinstance(values, dict) and isinstance(output := values.get("output"), dict) and "kind" not in output:
            return {**values, "output": {"kind": "labels", **output}}
        return values

    @model_validator(mode="after")
    def tensors_are_joined(self) -> Program:
        """Every input is made by an earlier component or by pre-processing, and the answer by one of them."""
        known = set().union(*self.sources().values())
        output = self.output
        for component in self.components:
            made = set(known)
            if isinstance(output, Generation) and component.name == output.decoder:
                made |= output.own
            if component.state:
                made.add(component.state[0])
            if missing := {p.name for p in component.inputs} - made:
                raise ValueError(f"nothing makes the input {min(missing)!r} of {component.name}")
            known |= {p.name for p in component.outputs}
            if isinstance(output, Generation) and output.picture and component.name == output.decoder:
                known.add(output.picture.ids)
        self._check_image({p.name: p for c in self.components for p in c.inputs})
        ports = {p.name: p for c in self.components for p in c.outputs}
        if missing := output.needs - ports.keys():
            raise ValueError(f"the answer needs {min(missing)!r}, which no component makes")
        if isinstance(output, Labels):
            for tensor in (output.tensor, *(e.tensor for e in output.exits)):
                if tensor not in ports or ports[tensor].shape[-1] != len(output.labels):
                    raise ValueError(f"{tensor!r} has not one value for each of the labels")
        if isinstance(output, Generation):
            self._check_decoder(output)
        return self

    def _check_decoder(self, output: Generation) -> None:
        """The decoder takes what the token loop makes, and the prompt is of its vocabulary."""
        decoder = next((c for c in self.components if c.name == output.decoder), None)
        if decoder is None:
            raise ValueError(f"there is no component {output.decoder!r}")
        shapes = {p.name: p.shape for p in decoder.inputs}
        if missing := output.own - shapes.keys():
            raise ValueError(f"{output.decoder} has no input {min(missing)!r}")
        for past, _ in output.cache:
            match shapes[past]:
                case (_, int(), str() as length, int()) if length in decoder.max_sizes:
                    pass
                case shape:
                    raise ValueError(f"{past} is {list(shape)}, not [batch, heads, slots, width]")
        if output.picture and output.max_new_tokens != output.picture.count:
            raise ValueError(f"max_new_tokens is {output.max_new_tokens}, which is not what a picture has")
        vocabulary = next(p.shape[-1] for p in decoder.outputs if p.name == output.logits)
        if isinstance(vocabulary, int) and max(output.prompt) >= vocabulary:
            raise ValueError(f"prompt has {max(output.prompt)}, and {output.logits} {vocabulary} values")

    def _check_image(self, inputs: dict[str, Port]) -> None:
        """The images that pre-processing makes have the size that the model takes."""
        if self.image is None or self.image.tensor not in inputs:
            return
        made = self.image.crop or (self.image.size if self.image.fit == "exact" else None)
        wanted = inputs[self.image.tensor].shape[2:]
        if made and any(isinstance(w, int) and w != m for w, m in zip(wanted, made, strict=True)):
            raise ValueError(f"images become {list(made)} pixels, and the model takes {list(wanted)}")
