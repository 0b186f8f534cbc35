"""ViLT, BLIP and LayoutLMv3: their components against transformers' own forward and generate, in torch and as ONNX.

Weights are random, but wide: with transformers' initial ones (0.02) hardly anything depends on the input.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers as tf
from PIL import Image

from edgemm.errors import InputError
from edgemm.models import Component, find_family, open_fp32, read_model
from edgemm.models._graph import onnx_export
from edgemm.models._hidden_units import hidden_units, matrix
from edgemm.plugins import validate
from edgemm.runtime.program import Program

TOLERANCE = 1e-4
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "what",
    "is",
    "the",
    "colour",
    "of",
    "a",
    "cat",
    "dog",
    "red",
    "?",
]
PAD, SEP, BOS = 0, 3, len(WORDS)  # BLIP's bos is no word of its tokenizer
TEXT = "what is the colour of the cat ?"
BOXES = ((1, 2, 30, 40), (50, 2, 90, 40), (1, 200, 400, 260), (500, 210, 640, 270))
Tensors = dict[str, torch.Tensor]

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
BERT = {**LAYERS, "vocab_size": len(WORDS) + 1, "pad_token_id": PAD, "max_position_embeddings": 24}
LABELS = {"id2label": {0: "yes", 1: "no", 2: "red"}, "label2id": {"yes": 0, "no": 1, "red": 2}}


def vilt_config(**changes: Any) -> tf.ViltConfig:
    return tf.ViltConfig(**{**BERT, **LABELS, "image_size": 32, "patch_size": 8, **changes})


def blip_config() -> tf.BlipConfig:
    text = {**BERT, "bos_token_id": BOS, "sep_token_id": SEP}
    return tf.BlipConfig(
        text_config=text, vision_config={**LAYERS, "image_size": 24, "patch_size": 8}, image_text_hidden_size=12
    )


def layout_config(**changes: Any) -> tf.LayoutLMv3Config:
    small = {"coordinate_size": 6, "shape_size": 4, "rel_pos_bins": 8, "max_rel_pos": 16, "rel_2d_pos_bins": 16}
    small |= {"max_rel_2d_pos": 64, "input_size": 24, "patch_size": 8, "max_position_embeddings": 26}
    return tf.LayoutLMv3Config(**{**LAYERS, **LABELS, "vocab_size": 300, "pad_token_id": 1, **small, **changes})


MODELS: dict[str, Callable[[], Any]] = {
    "vilt-vqa": lambda: tf.ViltForQuestionAnswering(vilt_config()),
    "vilt-retrieval": lambda: tf.ViltForImageAndTextRetrieval(vilt_config()),
    "blip-vqa": lambda: tf.BlipForQuestionAnswering(blip_config()),
    "blip-caption": lambda: tf.BlipForConditionalGeneration(blip_config()),
    "blip-retrieval": lambda: tf.BlipForImageTextRetrieval(blip_config()),
    "layout-document": lambda: tf.LayoutLMv3ForSequenceClassification(layout_config()),
    "layout-words": lambda: tf.LayoutLMv3ForTokenClassification(layout_config(has_spatial_attention_bias=False)),
    "layout-features": lambda: tf.LayoutLMv3Model(layout_config(has_relative_attention_bias=False)),
}
PRUNABLE = ("vilt-vqa", "blip-vqa", "blip-caption", "layout-document")


@torch.no_grad()
def make(name: str) -> Any:
    """A model of seeded weights by which everything matters, and whose text has many words and no early end."""
    model, rng = MODELS[name](), torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        noise = 0.25 * torch.randn(parameter.shape, generator=rng)
        if "norm" in key.lower() and key.endswith("weight"):
            parameter.copy_(1 + noise)
        else:
            parameter.copy_(
                noise * (0.05 if parameter.dim() == 1 else 4 if "decoder.bert.embeddings.pos" in key else 1)
            )
    if hasattr(model, "text_decoder"):
        model.text_decoder.cls.predictions.bias[:5] = -9
    return model.eval()


def write(model: Any, directory: Path) -> Path:
    """A checkpoint with tokenizer and image processor, as from the hub."""
    model.save_pretrained(directory)
    side = {"height": 24, "width": 24}
    processor: Any = tf.BlipImageProcessorPil(size=side)
    tokenizer: Any = tf.BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)})
    if model.config.model_type == "vilt":
        processor = tf.ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8)
    if model.config.model_type == "layoutlmv3":
        processor = tf.LayoutLMv3ImageProcessorPil(size=side, apply_ocr=False)
        names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"Ġabcdefghijklmnopqrstuvwxyz?"]
        tokenizer = tf.LayoutLMv3Tokenizer(vocab={w: i for i, w in enumerate(names)}, merges=[])
    processor.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def inputs_of(components: list[Component], batch: int, seed: int = 0, **axes: int) -> Tensors:
    """Random values of every input that no component makes; the last row's mask hides two tokens."""
    rng = torch.Generator().manual_seed(seed)
    made = {port.name for c in components for port in c.outputs}
    tensors: Tensors = {}
    for component in components:
        for port in component.inputs:
            if port.name in made or port.name in tensors:
                continue
            shape = [{"batch": batch, **axes}[n] if isinstance(n, str) else n for n in port.shape]
            if port.name == "bbox":
                low = torch.randint(0, 500, (*shape[:2], 2), generator=rng)
                tensors["bbox"] = torch.cat([low, low + torch.randint(0, 500, low.shape, generator=rng)], 2)
            elif port.dtype == "float32":
                tensors[port.name] = torch.randn(shape, generator=rng)
            elif port.name in component.high:
                tensors[port.name] = torch.randint(4, component.high[port.name], shape, generator=rng)
            else:
                tensors[port.name] = torch.ones(shape, dtype=torch.int64)
    if "attention_mask" in tensors and batch > 1:
        tensors["attention_mask"][-1, -2:] = 0
    return tensors


@torch.no_grad()
def joined(components: list[Component], tensors: Tensors) -> Tensors:
    """Everything that can be computed, component by component."""
    known = dict(tensors)
    for component in components:
        if all(p.name in known for p in component.inputs):
            out = component.module(**{p.name: known[p.name] for p in component.inputs})
            parts = out if isinstance(out, tuple) else (out,)
            known.update({p.name: t for p, t in zip(component.outputs, parts, strict=True)})
    return known


@torch.no_grad()
def expected(model: Any, tensors: Tensors) -> Tensors:
    """The same by transformers' forward."""
    if isinstance(model, tf.BlipForImageTextRetrieval):
        match = model(**tensors).itm_score
        text = model.text_encoder(tensors["input_ids"], tensors["attention_mask"]).last_hidden_state[:, 0]
        image = model.vision_model(tensors["pixel_values"]).last_hidden_state[:, 0]
        return {
            "match_logits": match,
            "image_embeds": torch.nn.functional.normalize(model.vision_proj(image), dim=-1),
            "text_embeds": torch.nn.functional.normalize(model.text_proj(text), dim=-1),
        }
    out = model(**tensors)
    return {"logits": out.logits} if "logits" in out else {"last_hidden_state": out.last_hidden_state}


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest, relative to the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def opened(name: str, directory: Path) -> tuple[Any, Any, Any]:
    """(transformers' model, family, the model as the family loads it)."""
    model = make(name)
    write(model, directory)
    family = find_family(directory)
    return model, family, read_model(family, directory)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("blip-vqa", "blip-caption")])
def test_joined_components_are_transformers_forward(name: str, tmp_path: Path) -> None:
    model, family, loaded = opened(name, tmp_path)
    components = family.components(loaded)
    tensors = inputs_of(components, 2, tokens=9, words=9, height=32, width=32)
    got = joined(components, tensors)
    wanted = expected(model, tensors)
    for output, value in wanted.items():
        assert difference(got[output], value) < TOLERANCE
    blind = joined(components, {**tensors, "pixel_values": 0 * tensors["pixel_values"]})
    first = next(iter(wanted))
    assert difference(blind[first], wanted[first]) > 0.01


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32), (8, 40), (8, 8), (40, 16)], ids=str)
def test_vilt_images_of_any_shape(size: tuple[int, int], tmp_path: Path) -> None:
    model, family, loaded = opened("vilt-vqa", tmp_path)
    components = family.components(loaded)
    tensors = inputs_of(components, 1, tokens=7, height=size[0], width=size[1])
    assert difference(joined(components, tensors)["logits"], expected(model, tensors)["logits"]) < TOLERANCE


@torch.no_grad()
def greedy(components: list[Component], output: dict[str, Any], known: Tensors, prompt: list[int]) -> list[int]:
    """Token by token with the cache, as edgemm/runtime/program.py:Generation says."""
    decoder = components[-1]
    ids, made = torch.tensor([prompt]), list(prompt)
    shapes = {p.name: p.shape for p in decoder.inputs}
    cache = {past: torch.zeros(1, shapes[past][1], 1, shapes[past][3]) for past, _ in output["cache"]}
    while len(made) < len(prompt) + output["max_new_tokens"]:
        positions = torch.arange(len(made) - ids.shape[1], len(made))[None]
        mask = torch.tensor([[0, *[1] * len(made)]])
        step = {"decoder_input_ids": ids, "position_ids": positions, "decoder_attention_mask": mask, **cache}
        logits, *present = decoder.module(**{n: {**known, **step}[n] for n in shapes})
        cache = {past: tensor for (past, _), tensor in zip(output["cache"], present, strict=True)}
        ids = logits.argmax(-1, keepdim=True)
        made.append(int(ids))
        if made[-1] in output["eos"]:
            break
    return made


@pytest.mark.parametrize(
    ("name", "prompt"), [("blip-vqa", []), ("blip-caption", []), ("blip-caption", [12]), ("blip-caption", [5, 9, 11])]
)
def test_greedy_text_is_transformers_generate(name: str, prompt: list[int], tmp_path: Path) -> None:
    model, family, loaded = opened(name, tmp_path)
    components = family.components(loaded)
    tensors = inputs_of(components[:2], 1, words=8)
    known = joined(components[:-1], tensors)
    media = {n: tensors[n] for n in ("pixel_values", "input_ids", "attention_mask") if n in tensors}
    if prompt:
        media["input_ids"] = torch.tensor([[2, *prompt, SEP]])  # [CLS] words [SEP], as tokenized

    def both() -> tuple[list[int], list[int]]:
        output = family.program(loaded, tmp_path)["output"]
        assert output["prompt"] == [BOS] and output["text_prompt"] == (name == "blip-caption")
        wanted = model.generate(**media, do_sample=False, num_beams=1)[0].tolist()
        return greedy(components, output, known, [BOS, *prompt]), wanted

    got, wanted = both()
    assert got == wanted
    assert len(got) == 1 + len(prompt) + 20 and len(set(got[1 + len(prompt) :])) > 1
    for each in (model, loaded):
        each.config.text_config.sep_token_id = got[-5]  # this ends the text from now on
    got, wanted = both()
    assert got == wanted
    assert len(got) <= 1 + len(prompt) + 16


def test_padding_of_a_question_changes_no_answer(tmp_path: Path) -> None:
    _, family, loaded = opened("blip-vqa", tmp_path)
    components = family.components(loaded)
    plain = inputs_of(components, 1, words=6, tokens=1, past=1, total=2)
    padded = {
        **plain,
        "input_ids": torch.nn.functional.pad(plain["input_ids"], (0, 5)),
        "attention_mask": torch.nn.functional.pad(plain["attention_mask"], (0, 5)),
    }
    assert difference(joined(components, padded)["logits"], joined(components, plain)["logits"]) < TOLERANCE


def test_the_step_hides_the_empty_slot_and_later_tokens(tmp_path: Path) -> None:
    model, family, loaded = opened("blip-caption", tmp_path)
    components = family.components(loaded)
    tensors = inputs_of(components, 2, tokens=5, past=1, total=6)
    tensors["position_ids"] = torch.arange(5).expand(2, 5)
    tensors["decoder_attention_mask"][:, 0] = 0
    got = joined(components, tensors)
    with torch.no_grad():
        out = model(tensors["pixel_values"], tensors["decoder_input_ids"])
        first = model(tensors["pixel_values"], tensors["decoder_input_ids"][:, :3])
    assert difference(got["logits"], out.logits[:, -1]) < TOLERANCE
    shorter = {**tensors, "decoder_input_ids": tensors["decoder_input_ids"][:, :3]}
    shorter |= {
        "position_ids": torch.arange(3).expand(2, 3),
        "decoder_attention_mask": torch.tensor([[0, 1, 1, 1]] * 2),
    }
    again = joined(components, shorter)
    assert difference(again["logits"], first.logits[:, -1]) < TOLERANCE
    assert difference(got["present_key_1"][:, :, 1:4], again["present_key_1"][:, :, 1:]) < TOLERANCE


SIZES: list[dict[str, int]] = [
    {"batch": 1, "words": 3, "tokens": 1, "past": 1, "height": 32, "width": 48},
    {"batch": 3, "words": 9, "tokens": 4, "past": 2, "height": 8, "width": 40},
    {"batch": 2, "words": 24, "tokens": 1, "past": 9, "height": 8, "width": 8},
]


@pytest.mark.parametrize("name", ["vilt-vqa", "blip-vqa", "blip-caption", "blip-retrieval", "layout-document"])
def test_onnx_is_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes in (LAYERS, BERT):
        monkeypatch.setitem(sizes, "num_hidden_layers", 1)  # the exporter takes seconds a layer
    _, family, loaded = opened(name, tmp_path)
    components = family.components(loaded)
    for component in components:
        if name == "blip-caption" and component.name == "image_encoder":
            continue  # the one of blip-vqa
        path = tmp_path / f"{component.name}.onnx"
        onnx_export(component, path, 18)
        session = onnxruntime.InferenceSession(str(path))
        for size in SIZES:
            patches = 1 + size["height"] * size["width"] // 64
            tensors = inputs_of([component], **size, total=size["tokens"] + size["past"], patches=patches)
            if "decoder_attention_mask" in tensors:
                tensors["decoder_attention_mask"][:, 0] = 0
            names = [p.name for p in component.outputs]
            got = session.run(names, {n: t.numpy() for n, t in tensors.items()})
            wanted = joined([component], tensors)
            for output, value in zip(names, got, strict=True):
                assert difference(torch.from_numpy(value), wanted[output]) < TOLERANCE, (component.name, output, size)


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_heads_stay_pruned_on_disk(name: str, tmp_path: Path) -> None:
    """A pruned model is the whole one whose output projections do not read the heads that went."""
    _, family, loaded = opened(name, tmp_path / "whole")
    reference = read_model(family, tmp_path / "whole")
    cut = {i: sorted({0, 1, 2, 3} - {i % 4, (i + 1) % 4}) for i in range(12)}
    whole = [b for b in family.attentions(reference) if b.q]
    pruned = [b for b in family.attentions(loaded) if b.q]
    for i, (block, other) in enumerate(zip(whole, pruned, strict=True)):
        gone = [h for h in range(4) if h not in cut[i]]
        with torch.no_grad():
            block.o.weight.view(-1, 4, 8)[:, gone] = 0
        other.keep(cut[i])
    for i, (hidden, full) in enumerate(zip(hidden_units(loaded), hidden_units(reference), strict=True)):
        kept = list(range(i % 5, full.units, 3))
        hidden.keep(kept)
        matrix(full.reads)[:, [n for n in range(full.units) if n not in kept]] = 0
    (tmp_path / "pruned").mkdir()
    family.save(loaded, tmp_path / "pruned", tmp_path / "whole")
    again = read_model(family, tmp_path / "pruned")
    assert [b.heads for b in family.attentions(again) if b.q] == [2] * len(pruned)
    sizes = {"words": 9, "tokens": 9, "past": 3, "total": 12, "height": 32, "width": 32}
    tensors = inputs_of(family.components(reference), 2, **sizes)
    small = inputs_of(family.components(again), 2, **sizes)
    for past in [n for n in tensors if n.startswith("past_")]:
        layer, kind = int(past[-1]), past.split("_")[1]
        at = [i for i, b in enumerate(pruned) if "decoder" in b.name and b.name.endswith(".attention")][layer]
        tensors[past] = torch.randn(tensors[past].shape, generator=torch.Generator().manual_seed(at + len(kind)))
        small[past] = tensors[past][:, cut[at]]
    small = {n: small[n] if n.startswith("past_") else t for n, t in tensors.items()}
    wanted = joined(family.components(reference), tensors)["logits"]
    assert difference(joined(family.components(loaded), small)["logits"], wanted) < TOLERANCE
    assert difference(joined(family.components(again), small)["logits"], wanted) < TOLERANCE
    # Pruned once more, and never pruned: both survive the disk.
    for block in family.attentions(again):
        if block.q:
            block.keep([1])
    (tmp_path / "twice").mkdir()
    family.save(again, tmp_path / "twice", tmp_path / "pruned")
    assert {b.heads for b in family.attentions(read_model(family, tmp_path / "twice")) if b.q} == {1}
    (tmp_path / "never").mkdir()
    family.save(reference, tmp_path / "never", tmp_path / "whole")
    same = joined(family.components(read_model(family, tmp_path / "never")), tensors)["logits"]
    assert difference(same, wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("vilt-vqa", {("merged", "text+image", "text+image", True): 2}),
        ("layout-document", {("merged", "text+image", "text+image", True): 2}),
        (
            "blip-vqa",
            {
                ("self", "image", "image", True): 2,
                ("self", "text", "text", True): 4,
                ("cross", "text", "image", True): 2,
                ("cross", "text", "text+image", True): 2,
            },
        ),
        (
            "blip-caption",
            {
                ("self", "image", "image", True): 2,
                ("self", "text", "text", True): 2,
                ("cross", "text", "image", True): 2,
            },
        ),
    ],
)
def test_attention_layers_and_their_modalities(name: str, links: dict[Any, int], tmp_path: Path) -> None:
    _, family, loaded = opened(name, tmp_path)
    blocks = family.attentions(loaded)
    found = [(b.kind, b.queries, b.keys, b.q is not None) for b in blocks]
    assert {link: found.count(link) for link in found} == links
    modules = dict(loaded.named_modules())
    assert all(b.name in modules and (b.heads, b.head_dim) == (4, 8) for b in blocks)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_read_as_fp32(name: str, tmp_path: Path) -> None:
    model = make(name)
    write(model.half(), tmp_path)
    family = find_family(tmp_path)
    loaded = read_model(family, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(next(loaded.parameters()), next(model.parameters()).float())


def picture(path: Path, size: tuple[int, int] = (70, 45)) -> Path:
    values = torch.randint(0, 256, (size[1] // 5, size[0] // 5, 3), generator=torch.Generator().manual_seed(1))
    Image.fromarray(values.to(torch.uint8).numpy()).resize(size).save(path)
    return path


@pytest.mark.parametrize("name", ["vilt-vqa", "blip-vqa", "blip-caption", "blip-retrieval", "layout-document"])
def test_a_file_and_a_text_get_transformers_answer(name: str, tmp_path: Path) -> None:
    model, family, loaded = opened(name, tmp_path)
    session = open_fp32(family, loaded, tmp_path)
    image = picture(tmp_path / "a.png")
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    media = dict(processor(Image.open(image), return_tensors="pt"))
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    if name == "layout-document":
        words = ["a", "red", "cat", "?"]
        media |= dict(tokenizer(words, boxes=[list(b) for b in BOXES], return_tensors="pt"))
        answer = session.run(image=image, text=" ".join(words), boxes=BOXES)
    else:
        text = dict(tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False))
        media |= text
        answer = session.run(image=image, text=TEXT)
    if name in ("blip-vqa", "blip-caption"):
        ids = model.generate(**media, do_sample=False)[0, 1:]
        wanted = tokenizer.decode(ids[ids < BOS], skip_special_tokens=True)
        assert answer.answer.replace(" ", "") == wanted.replace(" ", "") != ""
        return
    with torch.no_grad():
        out = model(**media)
    if name == "blip-retrieval":
        assert answer.probability == pytest.approx(float(out.itm_score.softmax(-1)[0, 1]), abs=1e-4)
        return
    best = int(out.logits.argmax())
    scores = out.logits.sigmoid() if name == "vilt-vqa" else out.logits.softmax(-1)
    assert answer.answer == ["yes", "no", "red"][best]
    assert answer.probability == pytest.approx(float(scores[0, best]), abs=1e-4)


def test_a_caption_needs_no_text(tmp_path: Path) -> None:
    model, family, loaded = opened("blip-caption", tmp_path)
    image = picture(tmp_path / "a.png")
    pixels = tf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(Image.open(image), return_tensors="pt")
    ids = model.generate(**pixels, do_sample=False)[0, 1:]
    text = tf.AutoTokenizer.from_pretrained(tmp_path).decode(ids[ids < BOS], skip_special_tokens=True)
    answer = open_fp32(family, loaded, tmp_path).run(image=image).answer
    assert answer.replace(" ", "") == text.replace(" ", "") != ""


@pytest.mark.parametrize("name", MODELS)
def test_the_program_is_valid(name: str, tmp_path: Path) -> None:
    _, family, loaded = opened(name, tmp_path)
    components = family.components(loaded)
    program = {"backend": "onnxruntime", "settings": {"threads": 1}, "components": [c.spec() for c in components]}
    program |= family.program(loaded, tmp_path)
    sources = validate(Program, program, name).sources()
    assert sources["image"] == {"pixel_values"}
    assert sources["text"] == {"input_ids", "attention_mask"} | ({"bbox"} if "layout" in name else set())


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: tf.ViltForQuestionAnswering(vilt_config(max_image_length=6)), "max_image_length = 6"),
        (lambda: tf.ViltForMaskedLM(vilt_config()), "'ViltForMaskedLM' is not known"),
        (lambda: tf.LayoutLMv3Model(layout_config(text_embed=False)), "text_embed = false"),
        (lambda: tf.LayoutLMv3ForSequenceClassification(layout_config(visual_embed=False)), "visual_embed = false"),
        (lambda: tf.LayoutLMv3ForQuestionAnswering(layout_config(num_labels=2)), "ForQuestionAnswering' is not known"),
    ],
)
def test_models_that_are_refused(make_model: Callable[[], Any], message: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_model(find_family(tmp_path), tmp_path)
    assert "fix: " in str(caught.value)
