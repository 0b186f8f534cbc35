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
from tokenizers import Tokenizer

from edgemm.errors import InputError
from edgemm.runtime import preprocess
from edgemm.runtime.preprocess import FORMATS, image_to_pixels, text_to_ids

HEIGHT, WIDTH = 6, 9
MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.2, 0.3)
SPEC: dict[str, Any] = {"size": [HEIGHT, WIDTH], "resample": "bilinear", "mean": list(MEAN), "std": list(STD)}
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


def refused(image: Path | str | bytes) -> str:
    with pytest.raises(InputError) as caught:
        image_to_pixels(image, SPEC)
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
    pixels = image_to_pixels(encoded(large), {**SPEC, "resample": resample})
    np.testing.assert_allclose(pixels, expected(np.asarray(resized)), rtol=1e-6, atol=1e-6)


def test_resize_to_a_whole_fraction_is_the_mean_of_the_pixels() -> None:
    large = random_pixels(HEIGHT * 2, WIDTH * 2, 3).astype(np.int64)
    mean = (large[::2, ::2] + large[1::2, ::2] + large[::2, 1::2] + large[1::2, 1::2]) / 4
    pixels = image_to_pixels(encoded(large.astype(np.uint8)), {**SPEC, "resample": "box"})
    exact = ((mean / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)[None]
    one_step = 1 / 255 / min(STD) + 1e-6  # Pillow rounds once in each direction
    np.testing.assert_allclose(pixels, exact, rtol=0, atol=one_step)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (WIDTH, HEIGHT)])
def test_any_shape_becomes_the_size_of_the_model(size: tuple[int, int]) -> None:
    pixels = image_to_pixels(encoded(Image.new("RGB", size, (200, 100, 50))), SPEC)
    np.testing.assert_allclose(pixels, expected(np.full((HEIGHT, WIDTH, 3), (200, 100, 50))), rtol=1e-6, atol=1e-6)


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
        "spec = {'size': [4, 4], 'resample': 'bilinear', 'mean': [0, 0, 0], 'std': [1, 1, 1]}\n"
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


def text_refused(text: str, tokenizer: Tokenizer, max_tokens: int = 6) -> str:
    with pytest.raises(InputError) as caught:
        text_to_ids(text, {"max_tokens": max_tokens}, tokenizer)
    assert caught.value.exit_code == 2
    assert "\n  fix: " in str(caught.value)
    return str(caught.value)


def test_text_becomes_ids_without_padding(tokenizer: Tokenizer) -> None:
    ids = text_to_ids("Is it red?", {"max_tokens": 16}, tokenizer)
    assert ids.dtype == np.int64
    assert ids.tolist() == [[0, 3, 4, 5, 6, 1]]


def test_text_of_unknown_words_is_answered_all_the_same(tokenizer: Tokenizer) -> None:
    assert text_to_ids("ça \u200b 😀", {"max_tokens": 16}, tokenizer).tolist()[0][1] == WORDS["[UNK]"]


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u3000\u00a0"])
def test_empty_text_is_refused(text: str, tokenizer: Tokenizer) -> None:
    assert repr(text) in text_refused(text, tokenizer)


def test_text_of_as_many_tokens_as_the_model_takes_is_taken_and_one_more_refused(tokenizer: Tokenizer) -> None:
    assert text_to_ids("is it red?", {"max_tokens": 6}, tokenizer).shape == (1, 6)
    message = text_refused("is it red red?", tokenizer)
    assert "7 tokens" in message
    assert "at most 6" in message
    assert "'is it red red?'" in message


def test_error_about_a_very_long_text_is_short(tokenizer: Tokenizer) -> None:
    message = text_refused("red " * 100_000, tokenizer)
    assert "100002 tokens" in message
    assert len(message) < 500


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    """What Python makes of command-line bytes that are not UTF-8."""
    assert "\\udce9" in text_refused("is it gr\udce9y?", tokenizer)
