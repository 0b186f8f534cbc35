"""What the runtime makes of images and texts is what transformers' processors make of them, from the same files."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

from edgemm.errors import InputError
from edgemm.models._processors import image_spec, text_spec, tokenizer_json
from edgemm.runtime.inputs import ImageSpec, TextSpec
from edgemm.runtime.preprocess import image_to_pixels, read_tokenizer, text_to_tensors

TOLERANCE = 1e-3
PICTURES = ("small", "portrait", "landscape", "tall", "grey", "grey_alpha", "rgba", "logo", "palette", "clear_palette")


def package(name: str) -> Path:
    """Where a package is installed; it is not imported."""
    (where,) = importlib.util.find_spec(name).submodule_search_locations
    return Path(where)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Photographs and drawings that installed packages bring, as files of every kind."""
    samples = Path(matplotlib.get_data_path()) / "sample_data"
    landscape = package("sklearn") / "datasets" / "images" / "china.jpg"
    made = tmp_path_factory.mktemp("pictures")
    photograph = Image.open(landscape).convert("RGB")
    soft = Image.linear_gradient("L").resize(photograph.size)
    photograph.crop((100, 3, 197, 427)).save(made / "tall.webp", lossless=True)
    photograph.convert("L").save(made / "grey.png")
    Image.merge("LA", (photograph.convert("L"), soft)).save(made / "grey_alpha.png")
    Image.merge("RGBA", (*photograph.split(), soft)).resize((301, 200)).save(made / "rgba.png")
    photograph.quantize(64).save(made / "palette.png")
    photograph.quantize(64).save(made / "clear_palette.png", transparency=5)
    return {
        "small": next((package("easy_vqa") / "data").rglob("*.png")),
        "portrait": samples / "grace_hopper.jpg",
        "landscape": landscape,
        "logo": samples / "logo2.png",
        **{path.stem: path for path in made.iterdir()},
    }


def reference(processor: Any, path: Path) -> NDArray[np.float32]:
    """What the processor makes of the file. One that does not convert to RGB is given RGB, as its users must."""
    image = Image.open(path)
    image = image if processor.do_convert_rgb else image.convert("RGB")
    return processor(images=image, return_tensors="np")["pixel_values"]


def assert_same_pixels(directory: Path, pictures: dict[str, Path]) -> None:
    spec = image_spec(directory)
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    for name, path in pictures.items():
        wanted = reference(processor, path)
        pixels = image_to_pixels(path, spec)
        assert pixels.shape == wanted.shape, name
        np.testing.assert_allclose(pixels, wanted, rtol=0, atol=TOLERANCE, err_msg=name)


def test_pictures_are_of_the_kinds_that_they_are_called(pictures: dict[str, Path]) -> None:
    assert pictures.keys() == set(PICTURES)
    opened = {name: Image.open(path) for name, path in pictures.items()}
    assert {name: image.mode for name, image in opened.items()} | {"small": ""} == {
        **{"small": "", "portrait": "RGB", "landscape": "RGB", "tall": "RGB", "grey": "L", "grey_alpha": "LA"},
        **{"rgba": "RGBA", "logo": "RGBA", "palette": "P", "clear_palette": "P"},
    }
    assert opened["small"].size == (64, 64)
    assert opened["portrait"].size == (512, 600)
    assert opened["landscape"].size == (640, 427)


def options(**of_kinds: list[dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(kind, values, id=f"{kind}-{'-'.join(map(str, values)) or 'default'}-{i}")
        for kind, choices in of_kinds.items()
        for i, values in enumerate(choices)
    ]


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    ("kind", "values"),
    options(
        CLIP=[
            {},
            {"size": {"shortest_edge": 61}, "crop_size": {"height": 80, "width": 49}},  # larger and smaller, odd
            {"size": {"shortest_edge": 90, "longest_edge": 111}, "do_center_crop": False},
            {"size": {"height": 96, "width": 64}, "do_center_crop": False, "do_convert_rgb": False},
            {"do_resize": False},
            {"do_resize": False, "do_center_crop": False},
            {"do_rescale": False},
            {"do_normalize": False},
            {"rescale_factor": 1 / 127.5},
        ],
        Siglip=[{}, {"size": {"height": 100, "width": 100}, "resample": 2}],
        Blip=[{}, {"size": {"height": 97, "width": 60}}],
        ViT=[
            {},
            {"size": {"height": 384, "width": 384}, "resample": 3, "do_pad": True},
            {"resample": 0, "image_mean": 0.5, "image_std": 0.25},
            {"resample": 1, "do_convert_rgb": True},
            {"resample": 4},
            {"resample": 5},
        ],
        DeiT=[{}],
        Bit=[{}],
        LayoutLMv3=[{"apply_ocr": False}],
        Vilt=[
            {},
            {"size": {"shortest_edge": 100}, "size_divisor": 16},
            {"size_divisor": 1, "do_center_crop": True, "crop_size": {"height": 50, "width": 50}},  # it crops nothing
            {"do_resize": False},
        ],
        ConvNext=[
            {},
            {"size": {"shortest_edge": 224}},
            {"size": {"shortest_edge": 224}, "crop_pct": 0.95, "resample": 2},
            {"size": {"shortest_edge": 400}, "do_center_crop": True, "crop_size": {"height": 97, "width": 399}},
        ],
    ),
)
def test_pixels_are_those_of_the_processor(
    kind: str, values: dict[str, Any], pictures: dict[str, Path], tmp_path: Path
) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**values)
    processor.save_pretrained(tmp_path)
    given = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {key: given[key] for key in values} == values, "the files say what is tested"
    assert_same_pixels(tmp_path, pictures)


MEANS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PUBLISHED = {  # preprocessor_config.json of checkpoints on the hub, and the model_type beside it
    "openai/clip-vit-base-patch32": (
        {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224}
        | {"feature_extractor_type": "CLIPFeatureExtractor", **MEANS},
        "clip",
        {"fit": "shortest", "crop": (224, 224), "resample": "bicubic"},
    ),
    "google/vit-base-patch16-224-in21k": (
        {"do_normalize": True, "do_resize": True, "resample": 2, "size": 224, **HALVES},
        "vit",
        {"fit": "exact", "size": (224, 224), "resample": "bilinear"},
    ),
    "dandelin/vilt-b32-finetuned-vqa": (
        {"feature_extractor_type": "ViltFeatureExtractor", "resample": 3, "size": 384, "size_divisor": 32, **HALVES},
        "vilt",
        {"fit": "shortest", "size": (384, 639), "multiple": 32, "rounding": "nearest"},
    ),
    "microsoft/resnet-50": (
        {"crop_pct": 0.875, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224, **HALVES}
        | {"feature_extractor_type": "ConvNextFeatureExtractor"},
        "resnet",
        {"fit": "shortest", "crop": (224, 224)},
    ),
    "Salesforce/blip-vqa-base": (
        {
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "rescale_factor": 0.00392156862745,
        }
        | {"image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", "resample": 3, **MEANS}
        | {"size": {"height": 384, "width": 384}, "size_divisor": 32},
        "blip",
        {"fit": "exact", "size": (384, 384), "multiple": 1},
    ),
    "microsoft/trocr-base-printed": (
        {"do_normalize": True, "do_resize": True, "resample": 2, "size": 384, **HALVES}
        | {"feature_extractor_type": "ViTFeatureExtractor"},
        "vision-encoder-decoder",
        {"fit": "exact", "size": (384, 384)},
    ),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", PUBLISHED)
def test_older_styles_of_the_file_are_read(name: str, pictures: dict[str, Path], tmp_path: Path) -> None:
    content, model_type, fields = PUBLISHED[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert fields.items() <= image_spec(tmp_path).items()
    assert_same_pixels(tmp_path, {name: pictures[name] for name in ("small", "landscape", "portrait", "clear_palette")})


def test_processor_inside_processor_config_is_read_and_wins(tmp_path: Path) -> None:
    """The style of transformers 5."""
    write_image_processor(tmp_path, image_processor_type="ViTImageProcessor", size=50)
    inner = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 60, "width": 70}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert image_spec(tmp_path, "images").items() >= {"tensor": "images", "size": (60, 70)}.items()
    (tmp_path / "preprocessor_config.json").unlink()
    assert image_spec(tmp_path)["size"] == (60, 70)


def test_spec_is_one_that_a_program_takes(tmp_path: Path) -> None:
    write_image_processor(tmp_path, image_processor_type="CLIPImageProcessor")
    spec = image_spec(tmp_path)
    assert ImageSpec.model_validate(json.loads(json.dumps(spec))).model_dump() == spec


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("CLIP", {"shortest_edge": 40}),
        ("CLIP", {"shortest_edge": 40, "longest_edge": 61}),
        ("Vilt", {"shortest_edge": 48}),
        ("ConvNext", {"shortest_edge": 32}),
    ],
)
def test_sizes_round_as_the_processors_do(kind: str, size: dict[str, int], tmp_path: Path) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(size=size, do_center_crop=False)
    processor.save_pretrained(tmp_path)
    spec = image_spec(tmp_path)
    rng = random.Random(0)
    path = tmp_path / "image.bmp"
    refused = 0
    for _ in range(150):
        Image.new("RGB", (rng.randint(20, 130), rng.randint(20, 130))).save(path)
        try:
            wanted = reference(processor, path).shape
        except ValueError:  # an edge of no pixels
            refused += 1
            with pytest.raises(InputError, match=r"becomes .*0"):
                image_to_pixels(path, spec)
        else:
            assert image_to_pixels(path, spec).shape == wanted, Image.open(path).size
    assert refused == 0 or kind == "Vilt"
    assert refused < 75


def write_image_processor(directory: Path, **content: Any) -> None:
    (directory / "preprocessor_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"image_processor_type": "DonutImageProcessor"}, "image_processor_type = 'DonutImageProcessor'"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type = 'Siglip2ImageProcessor'"),
        ({"image_processor_type": "NoSuchImageProcessor"}, "Unrecognized image processor"),
        ({"image_processor_type": 5}, "cannot read it"),
        ({"feature_extractor_type": "LayoutLMv3FeatureExtractor", "size": 224}, "apply_ocr = True"),
        ({"do_pad": True, "pad_size": {"height": 300, "width": 300}}, "pad_size = {'height': 300, 'width': 300}"),
        ({"size": {"max_height": 9, "max_width": 9}}, "size = {'max_height': 9, 'max_width': 9}"),
        ({"size": {"longest_edge": 9}}, "size = {'longest_edge': 9}"),
        ({"size": {"shortest_edge": 0}}, "size = {'shortest_edge': 0}"),
        ({"size": {"shortest_edge": "a"}}, "size.0 = 'a'"),
        ({"size": "large"}, "large"),
        ({"do_center_crop": True}, "without crop_size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 9}}, "crop.0 = None"),
        ({"do_center_crop": True, "crop_size": 100_000}, "crop.0 = 100000"),
        ({"resample": 77}, "resample = 77"),
        ({"resample": "bicubic"}, "resample = 'bicubic'"),
        ({"image_mean": [0.5]}, "mean"),
        ({"image_std": [1, 1, 0]}, "std.2 = 0"),
        ({"rescale_factor": "x"}, "scale = 'x'"),
        ({"image_processor_type": "ViltImageProcessor", "size": {"height": 9, "width": 9}}, "use shortest_edge"),
        ({"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": "a"}}, "'shortest_edge': 'a'"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 224, "crop_pct": 0}, "crop_pct = 0"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": 224, "do_center_crop": True, "crop_size": 99},
            "do_center_crop = True after the crop by crop_pct",
        ),
        ({"image_processor_type": "NoSuch", "auto_map": {"AutoImageProcessor": "evil.Evil"}}, "custom code"),
    ],
)
def test_step_that_the_runtime_does_not_do_is_named(content: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    write_image_processor(tmp_path, **{"image_processor_type": "ViTImageProcessor", **content})
    if "feature_extractor_type" in content:
        write_image_processor(tmp_path, **content)
    with pytest.raises(InputError) as caught:
        image_spec(tmp_path)
    assert told in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n  fix: " in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "5", "null"])
def test_absent_or_broken_image_processor_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        image_spec(tmp_path)


TEXTS = (
    "is it red?",
    "A Photo of  two CATS,\tlying -- down!",
    "Größe, naïve café; 東京 тест 😀",
    "don't stop 3.14 x_1 (e.g. [SEP])",
    "\u200bA",
    "word " * 40,
)
CORPUS = [*TEXTS, "the cat sat on the mat and the dog lay down", "what colour is the shape in the photo?"] * 3
SPECIAL = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}


def wordpiece(directory: Path) -> None:
    """A checkpoint of BERT, BLIP or ViLT as it was published first: vocab.txt and next to nothing else."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL["bert"]))
    words = sorted(made.get_vocab().items(), key=lambda item: item[1])
    (directory / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n", encoding="utf-8")


def byte_pairs(directory: Path, special: list[str], suffix: str = "") -> None:
    """vocab.json and merges.txt."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = {"end_of_word_suffix": suffix} if suffix else {}
    tokens = [*special, *alphabet, *(c + suffix for c in alphabet if suffix)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=tokens, show_progress=False, **ends)
    made.train_from_iterator(CORPUS, trainer)
    made.model.save(str(directory))


def clip(directory: Path) -> None:
    byte_pairs(directory, ["<|startoftext|>", "<|endoftext|>"], "</w>")


def roberta(directory: Path) -> None:
    byte_pairs(directory, SPECIAL["roberta"])


def unigram(directory: Path) -> None:
    """SigLIP: sentencepiece's pieces, punctuation left out, </s> at the end, as its tokenizer.json has it."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", "")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    pieces = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, pieces)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(directory / "tokenizer.json"))


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str, dict[str, Any]]] = {
    "bert": (wordpiece, "bert", {}),
    "bert, cased": (wordpiece, "bert", {"do_lower_case": False, "model_max_length": 64}),
    "vilt": (wordpiece, "vilt", {"tokenizer_class": "BertTokenizer", "model_max_length": 64}),
    "blip": (wordpiece, "blip", {"tokenizer_class": "BertTokenizer"}),
    "clip": (clip, "clip", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 512}),
    "roberta": (roberta, "vision-encoder-decoder", {"tokenizer_class": "RobertaTokenizer"}),
    "layoutlmv3": (roberta, "layoutlmv3", {"model_max_length": 512}),
    "unigram": (unigram, "unknown", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>"}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {}
    for name, (make, model_type, config) in CHECKPOINTS.items():
        directories[name] = directory = tmp_path_factory.mktemp("checkpoint")
        make(directory)
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directories


def runtime_tokenizer(directory: Path) -> Tokenizer:
    return read_tokenizer(tokenizer_json(directory).encode(), "tokenizer.json")


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "layoutlmv3"])
@pytest.mark.parametrize("pad_to", [0, 200])
def test_ids_and_masks_are_those_of_the_tokenizer(name: str, pad_to: int, checkpoints: dict[str, Path]) -> None:
    directory = checkpoints[name]
    original = AutoTokenizer.from_pretrained(directory)
    spec = text_spec(directory, ids="input_ids", mask="attention_mask", types="token_type_ids", max_tokens=512)
    spec["max_tokens"] = 512
    tokenizer = runtime_tokenizer(directory)
    lengths = set()
    for text in TEXTS:
        padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
        wanted = original(text, return_tensors="np", return_token_type_ids=True, **padding)
        tensors = text_to_tensors(text, None, spec, tokenizer, pad_to)
        assert {n: t.tolist() for n, t in tensors.items()} == {n: wanted[n].tolist() for n in tensors}, text
        lengths.add(tensors["attention_mask"].sum())
    assert len(lengths) > 2, "the texts are not all unknown tokens"


@pytest.mark.parametrize("pad_to", [0, 64])
def test_boxes_are_those_of_the_layoutlmv3_tokenizer(pad_to: int, checkpoints: dict[str, Path]) -> None:
    directory = checkpoints["layoutlmv3"]
    words = ["Invoice", "No.", "4711", "Größe", "the", "photograph"]
    rng = random.Random(0)
    boxes = [tuple(sorted(rng.randrange(1001) for _ in range(4))) for _ in words]
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
    wanted = AutoTokenizer.from_pretrained(directory)(words, boxes=[list(b) for b in boxes], **padding)
    spec = text_spec(directory, ids="input_ids", mask="attention_mask", boxes="bbox", max_tokens=512)
    tensors = text_to_tensors(" ".join(words), boxes, spec, runtime_tokenizer(directory), pad_to)
    assert {n: t.tolist() for n, t in tensors.items()} == {
        n: [wanted[n]] for n in ("input_ids", "attention_mask", "bbox")
    }
    assert tensors["bbox"].shape[1] > len(words) + 2, "a word of several tokens is among them"


@pytest.mark.parametrize(
    ("name", "limit", "pad"),
    [("bert", 77, "[PAD]"), ("vilt", 64, "[PAD]"), ("clip", 77, "<|endoftext|>"), ("unigram", 77, "</s>")],
)
def test_limit_is_the_smaller_one_and_padding_the_tokenizers(
    name: str, limit: int, pad: str, checkpoints: dict[str, Path]
) -> None:
    spec = text_spec(checkpoints[name], ids="i", max_tokens=77)
    pad_id = runtime_tokenizer(checkpoints[name]).token_to_id(pad)
    assert spec == TextSpec(ids="i", max_tokens=limit, pad_id=pad_id).model_dump()


def test_siglip_is_read_from_tokenizer_json_where_sentencepiece_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class is slow, needs sentencepiece, and does in Python what tokenizer.json says as data."""
    unigram(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    tokenizer_config = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "model_max_length": 64}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))

    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", absent)
    spec = text_spec(tmp_path, ids="input_ids", max_tokens=64)
    assert (spec["pad_id"], spec["max_tokens"]) == (1, 64)
    original = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    wanted = original(TEXTS[0], padding="max_length", max_length=64).input_ids
    tensors = text_to_tensors(TEXTS[0], None, spec, runtime_tokenizer(tmp_path), 64)
    assert tensors["input_ids"].tolist() == [wanted]


def test_tokenizer_is_what_transformers_makes_of_the_file_and_not_the_file(tmp_path: Path) -> None:
    """The class of SigLIP 2 adds a lower case that its published tokenizer.json lacks."""
    made = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "▁": 4, "a": 5, "A": 6}, []))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"padding_side": "right"}))
    assert made.encode("A a").ids == [6, 4, 5]
    assert runtime_tokenizer(tmp_path).encode("A a", add_special_tokens=False).ids == [5, 4, 5]
    assert text_spec(tmp_path, ids="i", max_tokens=9)["pad_id"] == 0


def test_padding_and_truncation_that_were_saved_change_nothing(tmp_path: Path) -> None:
    unigram(tmp_path)
    plain = runtime_tokenizer(tmp_path).encode(TEXTS[1]).ids
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=99)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert runtime_tokenizer(tmp_path).encode(TEXTS[1]).ids == plain


def test_without_a_vocabulary_there_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert tokenizer_json(tmp_path) is None
    with pytest.raises(InputError, match="there is no tokenizer"):
        text_spec(tmp_path, ids="i", max_tokens=9)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer.json": b"{"}, "cannot read the tokenizer"),
        ({"vocab.txt": b"\xff\xfe"}, "UTF-8"),
        ({"tokenizer_config.json": b"["}, "cannot read the tokenizer"),
        ({"tokenizer_config.json": b"[]"}, "cannot read the tokenizer"),
        ({"tokenizer_config.json": b'{"model_max_length": "many"}'}, "model_max_length = 'many'"),
        ({"tokenizer_config.json": b'{"model_max_length": 0}'}, "max_tokens = 0"),
        ({"tokenizer_config.json": b'{"padding_side": "left"}'}, "padding_side = 'left'"),
        ({"config.json": b'{"model_type": "clip"}', "vocab.json": b"[]", "merges.txt": b""}, "vocabulary"),
        ({"config.json": b'{"model_type": "clip"}', "vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"}, "out of vocab"),
    ],
)
def test_broken_tokenizer_is_refused(files: dict[str, bytes], told: str, tmp_path: Path) -> None:
    wordpiece(tmp_path)
    for name, content in {"config.json": b'{"model_type": "bert"}', **files}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        text_spec(tmp_path, ids="i", max_tokens=9)
    assert told in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n  fix: " in str(caught.value)


def test_code_of_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    unigram(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}))
    assert runtime_tokenizer(tmp_path).encode("the cat").ids[-1] == 1
