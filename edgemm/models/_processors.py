"""A checkpoint's image processor and tokenizer as data for the runtime.

transformers itself reads their files, so that its defaults and the older styles of these files hold. No code from
a checkpoint runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

from edgemm.errors import InputError
from edgemm.plugins import validate
from edgemm.runtime.inputs import ImageSpec, TextSpec

VILT, CONVNEXT = "ViltImageProcessor", "ConvNextImageProcessor"
PLAIN = (  # they resize, crop, rescale and normalise as their common base does; the two above resize otherwise
    "BitImageProcessor",
    "BlipImageProcessor",
    "CLIPImageProcessor",
    "DeiTImageProcessor",
    "LayoutLMv3ImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
)
FILES = (  # of processors and tokenizers, all of which are JSON
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
)
UNLIMITED = 1 << 26
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
UNREADABLE = (ImportError, OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


def image_spec(directory: Path, tensor: str = "pixel_values") -> dict[str, Any]:
    """preprocessor_config.json, or `image_processor` in processor_config.json -> an ImageSpec as a dict.

    It is what the processor's Pillow backend does. The torchvision one rounds otherwise: one step of a byte on most
    images, measured up to 17 at hard edges.
    Raises InputError that names the key of a step that the runtime does not do.
    """
    where = f"{directory}: image processor"
    try:
        processor = AutoImageProcessor.from_pretrained(
            directory, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except UNREADABLE as e:
        raise InputError(f"{where}: cannot read it: {e}", fix="save the model's preprocessor_config.json there") from e
    kind = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if kind not in (known := (*PLAIN, VILT, CONVNEXT)):
        raise InputError(
            f"{where}: image_processor_type = {kind!r} is not known", fix=f"known: {', '.join(sorted(known))}"
        )
    if getattr(processor, "apply_ocr", False):
        raise InputError(
            f"{where}: apply_ocr = True: the runtime reads no text from images",
            fix="set it to false, and give words and boxes with each image",
        )
    if processor.do_pad and getattr(processor, "pad_size", None):
        raise InputError(f"{where}: pad_size = {dict(processor.pad_size)}: the runtime pads no images", fix="remove it")
    try:
        spec = {"resample": Image.Resampling(processor.resample).name.lower(), **_geometry(processor, kind, where)}
    except (ValueError, TypeError, ArithmeticError) as e:
        given = f"resample = {processor.resample!r}, size = {dict(processor.size or {})}"
        given += f", crop_pct = {processor.crop_pct!r}" if kind == CONVNEXT else ""
        raise InputError(f"{where}: {given}: {e}", fix="save the model's image processor again") from e
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    spec |= {
        "tensor": tensor,
        "transparency": "white" if processor.do_convert_rgb else "drop",
        "scale": processor.rescale_factor if processor.do_rescale else 1.0,
        "mean": [mean] * 3 if isinstance(mean, float | int) else mean,
        "std": [std] * 3 if isinstance(std, float | int) else std,
    }
    return validate(ImageSpec, spec, where).model_dump()


def _geometry(processor: Any, kind: str, where: str) -> dict[str, Any]:
    """size, fit, rounding, multiple and crop."""
    size, shortest = processor.size, processor.size and processor.size.shortest_edge
    spec: dict[str, Any] = {"size": None}
    if processor.do_center_crop and kind != VILT:
        if not (crop := processor.crop_size):
            raise InputError(f"{where}: do_center_crop = True without crop_size", fix="give both or neither")
        spec["crop"] = [crop.height, crop.width]
    if not processor.do_resize:
        return spec
    if kind == VILT and shortest:
        longest = int(1333 / 800 * shortest)
        rounded = {"rounding": "nearest", "multiple": processor.size_divisor}
        return spec | {"fit": "shortest", "size": [shortest, longest], **rounded}
    if kind == CONVNEXT and shortest and shortest >= 384:
        return spec | {"size": [shortest, shortest]}
    if kind == CONVNEXT and shortest:
        if "crop" in spec:
            raise InputError(f"{where}: do_center_crop = True after the crop by crop_pct", fix="set it to false")
        larger = int(shortest / processor.crop_pct)
        return {"fit": "shortest", "size": [larger, UNLIMITED], "crop": [shortest, shortest]}
    if kind in PLAIN and shortest:
        return spec | {"fit": "shortest", "size": [shortest, size.longest_edge or UNLIMITED]}
    if kind in PLAIN and size and size.height and size.width:
        return spec | {"size": [size.height, size.width]}
    raise InputError(
        f"{where}: size = {dict(size or {})} is not for a {kind}",
        fix="use shortest_edge" if kind not in PLAIN else "use height and width, or shortest_edge",
    )


def feature_extractor(cls: Any, directory: Path) -> Any:
    """transformers' feature extractor of audio, of class `cls`; InputError when there is none that can be read."""
    try:
        return cls.from_pretrained(directory, local_files_only=True)
    except UNREADABLE as e:
        raise InputError(f"{directory}: cannot read preprocessor_config.json: {e}", fix="save it there") from e


def text_spec(
    directory: Path,
    *,
    ids: str,
    mask: str | None = None,
    types: str | None = None,
    boxes: str | None = None,
    max_tokens: int,
) -> dict[str, Any]:
    """A checkpoint's tokenizer -> a TextSpec as a dict.

    ids, mask, types, boxes   names of the model's inputs, those that it has
    max_tokens                how many positions the model has; the tokenizer's own limit holds if it is less
    Raises InputError when there is no tokenizer, or one that pads on the left.
    """
    where = f"{directory}: tokenizer_config.json"
    if (tokenizer := _read(directory)) is None:
        raise InputError(f"{directory}: there is no tokenizer", fix="save the model's tokenizer.json there")
    if tokenizer.padding_side != "right":
        raise InputError(
            f"{where}: padding_side = {tokenizer.padding_side!r}: the runtime pads on the right",
            fix="set it to 'right' if the model was trained so; padding on the left is not supported",
        )
    if not isinstance(limit := tokenizer.model_max_length, int | float):
        raise InputError(f"{where}: model_max_length = {limit!r} is no number", fix="give the number of tokens")
    spec = {
        **{"ids": ids, "mask": mask, "types": types, "boxes": boxes},
        "max_tokens": min(max_tokens, limit),
        "pad_id": tokenizer.pad_token_id or 0,
    }
    return validate(TextSpec, spec, where).model_dump()


def tokenizer_json(directory: Path) -> str | None:
    """The content of tokenizer.json by which the runtime tokenizes as transformers does; None without a tokenizer.

    It is made from transformers' tokenizer also where the checkpoint has a tokenizer.json: transformers builds
    many tokenizers anew from their vocabulary, and some then do what the file does not say (SigLIP 2 lowercases).
    A file whose class transformers can't build fast is taken as it is. Raises InputError where neither is to be had.
    """
    if (tokenizer := _read(directory)) is None:
        return None
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        return str(backend.to_str())
    if (path := directory / "tokenizer.json").is_file():
        return path.read_text(encoding="utf-8")
    raise InputError(
        f"{directory}: {type(tokenizer).__name__} can't be made a tokenizer.json", fix="save a tokenizer.json there"
    )


def _read(directory: Path) -> Any:
    """transformers' tokenizer; None when there are no files of one.

    Where its class can't be made (sentencepiece is absent), tokenizer.json is read without the class.
    """
    if not any((directory / name).is_file() for name in VOCABULARIES):
        return None  # transformers would make up an empty one
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        try:
            return AutoTokenizer.from_pretrained(directory, **options)
        except (ImportError, ValueError):
            if not (directory / "tokenizer.json").is_file():
                raise
            return PreTrainedTokenizerFast.from_pretrained(directory, **options)
    except Exception as e:  # tokenizers raises no narrower class
        raise InputError(f"{directory}: cannot read the tokenizer: {e}", fix="save a tokenizer.json there") from e
