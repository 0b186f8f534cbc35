"""Images and texts to tensors: the arithmetic in plain numpy, and every broken input refused by an InputError."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from pydantic import ValidationError
from tokenizers import Tokenizer

from edgemm.errors import InputError
from edgemm.runtime import preprocess
from edgemm.runtime.inputs import ImageSpec, TextSpec
from edgemm.runtime.preprocess import FORMATS, image_to_pixels, read_tokenizer, text_to_tensors

HEIGHT, WIDTH = 6, 9
NO_LIMIT = 1 << 26
MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.2, 0.3)


def image_spec(**fields: Any) -> dict[str, Any]:
    """As a session has it: validated, with every default."""
    given = {"tensor": "x", "size": [HEIGHT, WIDTH], "resample": "bilinear", "mean": list(MEAN), "std": list(STD)}
    return ImageSpec.model_validate({**given, **fields}).model_dump()


SPEC = image_spec()
PLAIN: dict[str, Any] = {"resample": "nearest", "mean": [0, 0, 0], "std": [1, 1, 1], "scale": 1}  # bytes as they are
WORDS = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "is": 3, "it": 4, "red": 5, "?": 6}


def random_pixels(*shape: int, seed: int = 0, dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


COLOURS = random_pixels(HEIGHT, WIDTH, 3)


def encoded(image: Image.Image | NDArray[Any], fmt: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, fmt, **options)
    return buffer.getvalue()


def expected(colours: NDArray[Any]) -> NDArray[np.float64]:
    """uint8[H,W,3] -> [1,3,H,W], one value after the other."""
    height, width, _ = colours.shape
    out = np.empty((1, 3, height, width))
    for y in range(height):
        for x in range(width):
            for c in range(3):
                out[0, c, y, x] = (int(colours[y, x, c]) / 255 - MEAN[c]) / STD[c]
    return out


def refused(image: Path | str | bytes, spec: dict[str, Any] = SPEC) -> str:
    with pytest.raises(InputError) as caught:
        image_to_pixels(image, spec)
    assert caught.value.exit_code == 2
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, colour: int = 2) -> bytes:
    """A PNG from its header and chunks, whatever they hold."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (head, *chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_colours_are_scaled_and_normalised_as_in_plain_numpy() -> None:
    pixels = image_to_pixels(encoded(COLOURS), SPEC)
    assert (pixels.shape, pixels.dtype) == ((1, 3, HEIGHT, WIDTH), np.float32)
    assert pixels.flags.c_contiguous
    np.testing.assert_allclose(pixels, expected(COLOURS), rtol=1e-6, atol=1e-6)


def test_bytes_path_and_text_name_the_same_image(tmp_path: Path) -> None:
    content = encoded(COLOURS)
    path = tmp_path / "image.png"
    path.write_bytes(content)
    for image in (path, str(path)):
        np.testing.assert_array_equal(image_to_pixels(image, SPEC), image_to_pixels(content, SPEC))


@pytest.mark.parametrize(("fmt", "options"), [("BMP", {}), ("WEBP", {"lossless": True}), ("PNG", {"interlace": 1})])
def test_lossless_formats_give_the_same_tensor(fmt: str, options: dict[str, Any]) -> None:
    same = image_to_pixels(encoded(COLOURS, fmt, **options), SPEC)
    np.testing.assert_array_equal(same, image_to_pixels(encoded(COLOURS), SPEC))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_gives_what_its_decoder_gives(mode: str) -> None:
    content = encoded(Image.fromarray(COLOURS).convert(mode), "JPEG", quality=95)
    decoded = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_allclose(image_to_pixels(content, SPEC), expected(decoded), rtol=1e-6, atol=1e-6)


def test_jpeg_of_two_pictures_gives_the_first() -> None:
    """What many phones write (MPO), and call .jpg."""
    first, second = (Image.fromarray(random_pixels(HEIGHT, WIDTH, 3, seed=s)) for s in (1, 2))
    content = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    decoded = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_allclose(image_to_pixels(content, SPEC), expected(decoded), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_resize_is_pillows_with_the_filter_of_the_bundle(resample: str) -> None:
    large = random_pixels(31, 17, 3)
    resized = Image.fromarray(large).resize((WIDTH, HEIGHT), Image.Resampling[resample.upper()])
    pixels = image_to_pixels(encoded(large), image_spec(resample=resample))
    np.testing.assert_allclose(pixels, expected(np.asarray(resized)), rtol=1e-6, atol=1e-6)


def test_resize_to_a_whole_fraction_is_the_mean_of_the_pixels() -> None:
    large = random_pixels(HEIGHT * 2, WIDTH * 2, 3).astype(np.int64)
    mean = (large[::2, ::2] + large[1::2, ::2] + large[::2, 1::2] + large[1::2, 1::2]) / 4
    pixels = image_to_pixels(encoded(large.astype(np.uint8)), image_spec(resample="box"))
    exact = ((mean / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)[None]
    one_step = 1 / 255 / min(STD) + 1e-6  # Pillow rounds once in each direction
    np.testing.assert_allclose(pixels, exact, rtol=0, atol=one_step)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (WIDTH, HEIGHT)])
def test_any_shape_becomes_the_size_of_the_model(size: tuple[int, int]) -> None:
    pixels = image_to_pixels(encoded(Image.new("RGB", size, (200, 100, 50))), SPEC)
    np.testing.assert_allclose(pixels, expected(np.full((HEIGHT, WIDTH, 3), (200, 100, 50))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "shortest", "longest", "rounding", "multiple", "size"),
    [
        ((640, 427), 224, NO_LIMIT, "down", 1, (335, 224)),  # 335.7
        ((427, 640), 224, NO_LIMIT, "down", 1, (224, 335)),
        ((640, 427), 224, NO_LIMIT, "nearest", 1, (336, 224)),
        ((100, 100), 224, NO_LIMIT, "down", 1, (224, 224)),
        ((640, 427), 224, 300, "down", 1, (300, 200)),
        ((640, 427), 224, 300, "nearest", 1, (300, 200)),
        ((640, 427), 384, 639, "nearest", 32, (576, 384)),  # ViLT: 575.6
        ((1333, 400), 384, 639, "nearest", 32, (608, 192)),  # 639 x 191.7
        ((64, 64), 384, 639, "nearest", 32, (384, 384)),
        ((100, 1000), 200, 1001, "down", 1, (100, 1000)),  # 100.1 x 1001: the short edge has its size already
    ],
)
def test_shortest_edge_is_resized_and_the_ratio_kept(
    given: tuple[int, int], shortest: int, longest: int, rounding: str, multiple: int, size: tuple[int, int]
) -> None:
    """Sizes as (width, height)."""
    spec = image_spec(fit="shortest", size=[shortest, longest], rounding=rounding, multiple=multiple)
    image = Image.fromarray(random_pixels(given[1], given[0], 3))
    pixels = image_to_pixels(encoded(image), spec)
    resized = image.resize(size, Image.Resampling.BILINEAR)
    assert pixels.shape == (1, 3, size[1], size[0])
    np.testing.assert_allclose(pixels, expected(np.asarray(resized)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crop", [(2, 3), (6, 9), (1, 1), (3, 2), (5, 4), (8, 9), (6, 12), (9, 14), (7, 3), (2, 11)])
def test_crop_is_of_the_centre_and_what_it_lacks_is_zero(crop: tuple[int, int]) -> None:
    """Half a pixel too many goes to the bottom and the right of a cut, to the top and the left of a border."""
    exact = np.zeros((*crop, 3), np.int64)
    top, left = (HEIGHT - crop[0]) // 2, (WIDTH - crop[1]) // 2
    for y in range(crop[0]):
        for x in range(crop[1]):
            if 0 <= y + top < HEIGHT and 0 <= x + left < WIDTH:
                exact[y, x] = COLOURS[y + top, x + left]
    pixels = image_to_pixels(encoded(COLOURS), image_spec(crop=crop))
    np.testing.assert_allclose(pixels, expected(exact), rtol=1e-5, atol=1e-5)


def test_without_a_size_the_image_keeps_its_own() -> None:
    large = random_pixels(13, 5, 3)
    np.testing.assert_allclose(
        image_to_pixels(encoded(large), image_spec(size=None)), expected(large), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1, 1 / 127.5])
def test_bytes_are_scaled_before_they_are_normalised(scale: float) -> None:
    exact = (COLOURS * scale - np.array(MEAN)) / np.array(STD)
    pixels = image_to_pixels(encoded(COLOURS), image_spec(scale=scale))
    np.testing.assert_allclose(pixels[0], exact.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "spec", "becomes"),
    [
        ((1, 500), {"fit": "shortest", "size": [24, NO_LIMIT]}, "becomes 24x12000"),
        ((500, 1), {"fit": "shortest", "size": [24, NO_LIMIT]}, "becomes 12000x24"),
        ((10, 600), {"fit": "shortest", "size": [384, 639], "rounding": "nearest", "multiple": 32}, "becomes 0x608"),
        ((9, 9), {"size": [400, 401]}, "becomes 401x400"),
    ],
)
def test_image_that_resizing_would_make_too_large_or_nothing_is_refused(
    size: tuple[int, int], spec: dict[str, Any], becomes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 400 * 400)
    image_to_pixels(encoded(Image.new("RGB", (9, 9))), image_spec(size=[400, 400]))
    message = refused(encoded(Image.new("RGB", size)), image_spec(**spec))
    assert f"{size[0]}x{size[1]} pixels" in message
    assert becomes in message


@pytest.mark.parametrize(
    "fields",
    [
        *({"size": [0, 5]}, {"size": [5]}, {"crop": [0, 5]}, {"crop": [1 << 14, 5]}, {"multiple": 0}),
        *({"fit": "longest"}, {"rounding": "up"}, {"scale": 0}, {"mean": [0, 0]}, {"std": [1, 1, 0]}, {"sixth": 1}),
    ],
)
def test_spec_that_no_image_could_follow_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        image_spec(**fields)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_nothing(orientation: int) -> None:
    """As transformers does it when it is given an image that Pillow opened."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(COLOURS, exif=exif)
    assert Image.open(io.BytesIO(content)).getexif()[0x0112] == orientation
    np.testing.assert_array_equal(image_to_pixels(content, SPEC), image_to_pixels(encoded(COLOURS), SPEC))


def laid_on_white(colours: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return share * colours + (1 - share) * 255


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_laid_on_white_where_the_model_wants_it(mode: str) -> None:
    opaque = random_pixels(HEIGHT, WIDTH, 1 if mode == "LA" else 3)
    alpha = random_pixels(HEIGHT, WIDTH, seed=1)
    pixels = image_to_pixels(
        encoded(np.concatenate([opaque, alpha[..., None]], 2)), image_spec(transparency="white", **PLAIN)
    )
    exact = laid_on_white(opaque.repeat(3 // opaque.shape[2], 2), alpha)
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), exact, atol=1)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_transparency_of_a_palette_is_laid_on_white(transparency: Any) -> None:
    palette = random_pixels(256, 3, seed=1)
    indices = random_pixels(HEIGHT, WIDTH)
    indices[0, 0] = 3
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    pixels = image_to_pixels(encoded(image, transparency=transparency), image_spec(transparency="white", **PLAIN))
    alpha = indices if isinstance(transparency, bytes) else np.where(indices == 3, 0, 255)
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), laid_on_white(palette[indices], alpha), atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "I;16"])
def test_image_without_transparency_is_the_same_on_white(mode: str) -> None:
    content = encoded(Image.fromarray(random_pixels(HEIGHT, WIDTH)).convert(mode))
    on_white = image_to_pixels(content, image_spec(transparency="white"))
    np.testing.assert_array_equal(on_white, image_to_pixels(content, SPEC))


def test_grey_is_the_same_in_three_channels() -> None:
    grey = random_pixels(HEIGHT, WIDTH)
    pixels = image_to_pixels(encoded(grey), SPEC)
    np.testing.assert_allclose(pixels, expected(np.stack([grey] * 3, 2)), rtol=1e-6, atol=1e-6)


def test_grey_of_one_bit_is_black_and_white() -> None:
    bits = random_pixels(HEIGHT, WIDTH) > 127
    pixels = image_to_pixels(encoded(Image.fromarray(bits)), SPEC)
    np.testing.assert_allclose(pixels, expected(np.stack([bits * 255] * 3, 2)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_left_out_and_colour_kept(mode: str) -> None:
    opaque = random_pixels(HEIGHT, WIDTH, 1 if mode == "LA" else 3)
    alpha = random_pixels(HEIGHT, WIDTH, 1, seed=1)
    pixels = image_to_pixels(encoded(np.concatenate([opaque, alpha], 2)), SPEC)
    np.testing.assert_allclose(pixels, expected(opaque.repeat(3 // opaque.shape[2], 2)), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palette_gives_the_colours_it_stands_for(transparency: Any) -> None:
    palette = random_pixels(256, 3, seed=1)
    indices = random_pixels(HEIGHT, WIDTH)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    content = encoded(image, **({} if transparency is None else {"transparency": transparency}))
    np.testing.assert_allclose(image_to_pixels(content, SPEC), expected(palette[indices]), rtol=1e-6, atol=1e-6)


def test_grey_of_16_bit_keeps_its_high_bytes_and_is_not_clipped() -> None:
    grey = random_pixels(HEIGHT, WIDTH, dtype=np.uint16)
    content = encoded(grey)
    assert content[24] == 16, "bits of the PNG"
    high = (grey // 256).astype(np.uint8)
    pixels = image_to_pixels(content, SPEC)
    np.testing.assert_allclose(pixels, expected(np.stack([high] * 3, 2)), rtol=1e-6, atol=1e-6)


def test_grey_of_16_bit_is_resized_like_8_bit() -> None:
    grey = random_pixels(40, 30, dtype=np.uint16)
    high = (grey // 256).astype(np.uint8)
    np.testing.assert_array_equal(image_to_pixels(encoded(grey), SPEC), image_to_pixels(encoded(high), SPEC))


def test_colour_of_16_bit_keeps_its_high_bytes() -> None:
    colours = random_pixels(HEIGHT, WIDTH, 3, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    content = png(WIDTH, HEIGHT, (b"IDAT", zlib.compress(rows)), bits=16)
    np.testing.assert_allclose(image_to_pixels(content, SPEC), expected(colours // 256), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_truncated_image_is_refused_wherever_it_ends(fmt: str) -> None:
    content = encoded(random_pixels(32, 32, 3), fmt)
    pixels_end = len(content) * 9 // 10  # what follows may be no more than an end mark
    for size in [0, 1, 8, 20, pixels_end, *random.Random(0).sample(range(pixels_end), 60)]:
        refused(content[:size])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fmt", FORMATS)
def test_damaged_image_raises_nothing_but_an_input_error(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 1_000_000)
    content = encoded(random_pixels(16, 16, 3), fmt)
    rng = random.Random(0)
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        try:
            pixels = image_to_pixels(bytes(damaged), SPEC)
        except InputError as e:
            assert "\n  fix: " in str(e)
        else:
            assert pixels.shape == (1, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0", b"not an image", b"%PDF-1.7\n", b"GIF89a", b"\x7fELF" + bytes(100), b"PK\3\4", b"<svg/>" * 50),
        *(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n", bytes(5000)),
        *(
            b"\x89PNG\r\n\x1a\n",
            png(4, 4),
            png(0, 0),
            png(0, 4, (b"IDAT", zlib.compress(b""))),
            png(4, 4, (b"IDAT", b"x")),
        ),
    ],
)
def test_file_that_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert str(path) in refused(path)
    assert "the image" in refused(content)


@pytest.mark.parametrize("fmt", ["GIF", "TIFF", "PPM", "TGA", "ICO", "PCX", "DDS", "QOI", "JPEG2000", "EPS", "SGI"])
def test_image_of_a_format_that_is_not_named_is_refused(fmt: str) -> None:
    """Each decoder is a way in: PPM, DDS, QOI and others raise errors of their own, EPS starts Ghostscript."""
    message = refused(encoded(COLOURS, fmt))
    assert "PNG, JPEG, BMP or WebP" in message


def test_named_formats_are_those_that_are_read() -> None:
    assert FORMATS == ("PNG", "JPEG", "BMP", "WEBP")
    assert TiffImagePlugin.TiffImageFile.format not in FORMATS


def test_absent_image_and_directory_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / "file" / "x.png"):
        assert str(path) in refused(path)
    assert "absent" in refused("absent\0.png")


def test_image_over_the_limit_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_PIXELS", HEIGHT * WIDTH)
    image_to_pixels(encoded(COLOURS), SPEC)
    monkeypatch.setattr(preprocess, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    message = refused(encoded(COLOURS))
    assert f"{WIDTH}x{HEIGHT}" in message
    assert str(HEIGHT * WIDTH - 1) in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 10_000, 20_000, 65_535, 2_000_000_000])
def test_image_that_declares_a_huge_size_is_refused(side: int) -> None:
    refused(png(side, side, (b"IDAT", zlib.compress(b"\0" * 100))))


def test_webp_is_read_though_nothing_else_has_loaded_pillows_plugins(tmp_path: Path) -> None:
    (tmp_path / "x.webp").write_bytes(encoded(COLOURS, "WEBP"))
    code = (
        "import sys\n"
        "from edgemm.runtime.preprocess import image_to_pixels\n"
        "from edgemm.runtime.inputs import ImageSpec\n"
        "spec = ImageSpec(tensor='x', size=(4, 4), resample='bilinear', mean=(0, 0, 0), std=(1, 1, 1)).model_dump()\n"
        "print(image_to_pixels(sys.argv[1], spec).shape)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.webp")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "(1, 3, 4, 4)\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Words between [CLS] and [SEP]."""
    from tokenizers import normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel

    made = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    return made


def text_spec(**fields: Any) -> dict[str, Any]:
    return TextSpec.model_validate({"ids": "ids", "max_tokens": 16, **fields}).model_dump()


def text_refused(text: str, tokenizer: Tokenizer, given: Any = None, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        text_to_tensors(text, given, text_spec(**fields), tokenizer, 0)
    assert caught.value.exit_code == 2
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


def test_text_becomes_ids_without_padding(tokenizer: Tokenizer) -> None:
    tensors = text_to_tensors("Is it red?", None, text_spec(), tokenizer, 0)
    assert tensors.keys() == {"ids"}
    assert tensors["ids"].dtype == np.int64
    assert tensors["ids"].tolist() == [[0, 3, 4, 5, 6, 1]]


@pytest.mark.parametrize(
    ("of_spec", "of_graph", "length"), [(0, 0, 4), (6, 0, 6), (0, 6, 6), (5, 6, 6), (6, 5, 6), (3, 2, 4)]
)
def test_text_is_padded_to_the_larger_of_two_lengths(
    tokenizer: Tokenizer, of_spec: int, of_graph: int, length: int
) -> None:
    spec = text_spec(mask="mask", types="types", pad_id=7, pad_to=of_spec)
    tensors = text_to_tensors("it red", None, spec, tokenizer, of_graph)
    assert {name: t.tolist() for name, t in tensors.items()} == {
        "ids": [[0, 4, 5, 1] + [7] * (length - 4)],
        "mask": [[1, 1, 1, 1] + [0] * (length - 4)],
        "types": [[0] * length],
    }
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.int64)}


def test_segments_are_the_tokenizers(tokenizer: Tokenizer) -> None:
    from tokenizers import processors

    other = Tokenizer.from_str(tokenizer.to_str())
    other.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:1 [SEP]:2", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    tensors = text_to_tensors("it red", None, text_spec(types="types"), other, 5)
    assert tensors["types"].tolist() == [[0, 1, 1, 2, 0]]


def test_every_token_of_a_word_has_its_box_and_special_tokens_have_zeros(tokenizer: Tokenizer) -> None:
    boxes = ((1, 2, 3, 4), (5, 6, 7, 1000), (0, 0, 9, 9))
    spec = text_spec(boxes="bbox", mask="mask", pad_to=8)
    tensors = text_to_tensors(" is\n red??  it ", boxes, spec, tokenizer, 0)
    zeros = [0, 0, 0, 0]
    assert tensors["ids"].tolist() == [[0, 3, 5, 2, 4, 1, 0, 0]], "?? is one unknown token of the word red??"
    of_words = [[1, 2, 3, 4], [5, 6, 7, 1000], [5, 6, 7, 1000], [0, 0, 9, 9]]
    assert tensors["bbox"].tolist() == [[zeros, *of_words, zeros, zeros, zeros]]
    assert tensors["bbox"].dtype == np.int64
    assert tensors["mask"].tolist() == [[1] * 6 + [0] * 2]


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        (None, "no boxes"),
        ((), "2 words and 0 boxes"),
        (((0, 0, 1, 1),), "2 words and 1 boxes"),
        (((0, 0, 1, 1),) * 3, "2 words and 3 boxes"),
        (((0, 0, 1, 1), (0, 0, 1, 1001)), "'it' is [0, 0, 1, 1001]"),
        (((0, 0, 1, 1), (-1, 0, 1, 1)), "'it' is [-1, 0, 1, 1]"),
        (((0, 0, 1, 1), (0.5, 0, 1, 1)), "'it' is [0.5, 0, 1, 1]"),
        (((0, 0, 1), (0, 0, 1, 1)), "'is' is [0, 0, 1]"),
    ],
)
def test_boxes_that_do_not_fit_the_words_are_refused(tokenizer: Tokenizer, boxes: Any, told: str) -> None:
    assert told in text_refused("is it", tokenizer, boxes, boxes="bbox")


def test_boxes_for_a_model_that_takes_none_are_refused(tokenizer: Tokenizer) -> None:
    assert "takes no boxes" in text_refused("is", tokenizer, ((0, 0, 1, 1),))


def test_text_of_unknown_words_is_answered_all_the_same(tokenizer: Tokenizer) -> None:
    ids = text_to_tensors("ça \u200b 😀", None, text_spec(), tokenizer, 0)["ids"]
    assert ids.tolist()[0][1] == WORDS["[UNK]"]


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u3000\u00a0"])
def test_empty_text_is_refused(text: str, tokenizer: Tokenizer) -> None:
    assert repr(text) in text_refused(text, tokenizer)
    assert repr(text) in text_refused(text, tokenizer, (), boxes="bbox")


def test_text_of_as_many_tokens_as_the_model_takes_is_taken_and_one_more_refused(tokenizer: Tokenizer) -> None:
    assert text_to_tensors("is it red?", None, text_spec(max_tokens=6), tokenizer, 0)["ids"].shape == (1, 6)
    message = text_refused("is it red red?", tokenizer, max_tokens=6)
    assert "7 tokens" in message
    assert "at most 6" in message
    assert "'is it red red?'" in message


def test_error_about_a_very_long_text_is_short(tokenizer: Tokenizer) -> None:
    message = text_refused("red " * 100_000, tokenizer)
    assert "100002 tokens" in message
    assert len(message) < 500


def test_error_about_a_very_long_box_is_short(tokenizer: Tokenizer) -> None:
    assert len(text_refused("is", tokenizer, (tuple(range(9999)),), boxes="bbox")) < 500


@pytest.mark.parametrize("boxes", [None, ((0, 0, 1, 1),) * 3])
def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer, boxes: Any) -> None:
    """What Python makes of command-line bytes that are not UTF-8."""
    assert "\\udce9" in text_refused("is it gr\udce9y?", tokenizer, boxes, boxes=boxes and "bbox")


def test_padding_and_truncation_of_a_tokenizer_file_are_switched_off(tokenizer: Tokenizer) -> None:
    saved = Tokenizer.from_str(tokenizer.to_str())
    saved.enable_truncation(3)
    saved.enable_padding(length=12)
    assert len(saved.encode("is it red").ids) == 12
    read = read_tokenizer(saved.to_str().encode(), "tokenizer.json")
    assert text_to_tensors("is it red", None, text_spec(), read, 0)["ids"].tolist() == [[0, 3, 4, 5, 1]]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": 1}'])
def test_file_that_is_no_tokenizer_is_named(content: bytes) -> None:
    with pytest.raises(InputError, match=r"x/tokenizer\.json is no tokenizer"):
        read_tokenizer(content, "x/tokenizer.json")
