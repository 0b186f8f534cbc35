"""A user's own data: what each format gives, what is split how, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import wave
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgemm.data import Sample
from edgemm.data.manifest import read
from edgemm.errors import InputError


def image(seed: int, kind: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def audio(seed: int, frames: int = 800) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, frames, "NONE", ""))
        file.writeframes(np.random.default_rng(seed).integers(-999, 999, frames, np.int16).tobytes())
    return out.getvalue()


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def json_list(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    return path


def csv_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def directory(path: Path, rows: list[dict[str, Any]]) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(path))
    return path


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def all_of(parts: dict[str, list[Sample]]) -> list[Sample]:
    assert parts.keys() == {"train", "test"}
    return [*parts["train"], *parts["test"]]


def by_id(path: Path, tolerance: float = 0.0) -> dict[str, Sample]:
    return {sample.id: sample for sample in all_of(read(path, tolerance))}


def content(media: Path | bytes | None) -> bytes | None:
    return media.read_bytes() if isinstance(media, Path) else media


# ---- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("d.jsonl", jsonl),
        ("d.json", jsonl),
        ("d.JSON", json_list),
        ("d.csv", csv_file),
        ("d.parquet", parquet),
        ("d", directory),
    ],
)
def test_every_format_says_the_same(tmp_path: Path, name: str, write: Callable[..., Path]) -> None:
    media = tmp_path / "d" if name == "d" else tmp_path
    rows = []
    for i, (text, answer) in enumerate(
        [("2020-01-01", "None"), ("NA", "007"), ('say "hi",\nyou\u2028there', "null"), ("Grüße", "1.50")]
    ):
        (media / "media").mkdir(exist_ok=True, parents=True)
        (media / "media" / f"{i}.png").write_bytes(image(i))
        (media / "media" / f"{i}.wav").write_bytes(audio(i))
        row = {"id": f"00{i}", "image": f"media/{i}.png", "audio": f"media/{i}.wav", "text": text, "answer": answer}
        rows.append({**row, "split": "train" if i < 2 else "test"})
    parts = read(write(tmp_path / name, rows), 0.0)
    assert [[s.id for s in parts[p]] for p in ("train", "test")] == [["000", "001"], ["002", "003"]]
    for i, (sample, row) in enumerate(zip(all_of(parts), rows, strict=True)):
        assert (sample.text, sample.label) == (row["text"], row["answer"])
        assert sample.image == media / "media" / f"{i}.png"
        assert sample.audio == media / "media" / f"{i}.wav"


@pytest.mark.parametrize("label", ["label", "answer", "caption", "transcript"])
def test_what_is_right_has_four_names(tmp_path: Path, label: str) -> None:
    values = ["red", 3, 2.5, True, None, ["a", "b", 1], []]
    path = jsonl(tmp_path / "d.jsonl", [{"text": f"text {i}", label: v} for i, v in enumerate(values)])
    found = by_id(path)
    assert [found[str(i)].label for i in range(1, 8)] == ["red", "3", "2.5", "true", None, "a|b|1", None]


def test_rows_without_an_id_are_numbered_and_what_is_absent_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(1))
    path = tmp_path / "d.csv"
    path.write_text("image,text,label\na.png,,\n,two words,x\n\na.png,  ,y\n", encoding="utf-8")
    found = by_id(path)
    assert [(s.text, s.label, s.image) for _, s in sorted(found.items())] == [
        (None, None, tmp_path / "a.png"),
        ("two words", "x", None),
        (None, "y", tmp_path / "a.png"),
    ]
    assert found["1"].group == found["3"].group != found["2"].group


@pytest.mark.parametrize("write", [jsonl, csv_file, parquet])
def test_boxes_go_with_the_words(tmp_path: Path, write: Callable[..., Path]) -> None:
    boxes = [[0, 0, 500, 20], [510, 0, 1000, 20]]
    name = {"jsonl": "d.jsonl", "csv_file": "d.csv", "parquet": "d.parquet"}[write.__name__]
    path = write(tmp_path / name, [{"text": "two words", "boxes": json.dumps(boxes) if write is csv_file else boxes}])
    assert by_id(path)["1"].boxes == ((0, 0, 500, 20), (510, 0, 1000, 20))


def test_embedded_media_and_class_names(tmp_path: Path) -> None:
    """Without torchcodec, which `datasets` wants to encode or decode audio."""
    import pyarrow
    from datasets import Audio, ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageColumn
    from datasets.table import InMemoryTable

    features = Features(
        {"image": ImageColumn(), "audio": Audio(), "label": ClassLabel(names=["cat", "dog"]), "note": Value("string")}
    )
    rows = [
        {
            "image": {"bytes": image(i), "path": "not/there.png"},
            "audio": {"bytes": audio(i), "path": None} if i else None,
            "label": (0, 1, -1, None)[i],
            "note": "x",
        }
        for i in range(4)
    ]
    dataset = Dataset(InMemoryTable(pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)))
    dataset.to_parquet(str(tmp_path / "d.parquet"))
    dataset.save_to_disk(str(tmp_path / "d"))
    for path in (tmp_path / "d.parquet", tmp_path / "d"):
        found = by_id(path)
        assert [found[str(i)].label for i in range(1, 5)] == ["cat", "dog", None, None]
        assert [found[str(i + 1)].image for i in range(4)] == [image(i) for i in range(4)]
        assert [found[str(i + 1)].audio for i in range(4)] == [None, *(audio(i) for i in range(1, 4))]


def test_plain_bytes_in_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", [{"image": image(1)}, {"image": image(2)}])
    assert {s.image for s in all_of(read(path, 0.0))} == {image(1), image(2)}


def test_names_of_a_dataset_dict_are_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(2)]}) for name in ("train", "validation")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    found = read(tmp_path / "d", 0.0)
    assert [s.text for s in found["train"]] == ["train 0", "train 1"]
    assert [s.text for s in found["test"]] == ["validation 0", "validation 1"]
    DatasetDict({"dev": parts["train"]}).save_to_disk(str(tmp_path / "e"))
    with pytest.raises(InputError, match="'dev'"):
        read(tmp_path / "e", 0.0)


def test_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tar(
        tmp_path / "d.tar",
        [
            ("./a/1.json", b'{"split": "train", "caption": "json", "width": 9, "image": "/etc/passwd"}'),
            ("./a/1.JPG", image(1, "JPEG")),
            ("./a/1.seg.png", b"not read"),
            ("._1.png", b"hidden"),
            ("README", b"no extension"),
            ("a/2.webp", image(2, "WEBP")),
            ("a/2.wav", audio(2)),
            ("a/2.txt", "  wörter\n".encode()),
            ("a/2.split", b"test"),
            ("a/2.boxes", b"[[1, 2, 3, 4]]"),
            ("a/1.txt", b"a member of a/1 all the same"),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    parts = read(path, 0.0)
    (one,), (two,) = parts["train"], parts["test"]
    assert (one.id, one.image, one.label, one.text) == (
        "a/1",
        image(1, "JPEG"),
        "json",
        "a member of a/1 all the same",
    )
    assert (two.id, two.image, two.audio, two.text) == ("a/2", image(2, "WEBP"), audio(2), "wörter")
    assert two.boxes == ((1, 2, 3, 4),)
    assert "not used: width, seg.png" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_tar_with_hostile_members_writes_nothing_and_follows_no_link(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(image(5))
    with tarfile.open(inside / "d.tar", "w") as file:
        for name in ("../evil.png", "/tmp/edgemm-evil.png"):
            info = tarfile.TarInfo(name)
            info.size = len(image(1))
            file.addfile(info, io.BytesIO(image(1)))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        file.addfile(link)
        said = json.dumps({"text": "t", "image": str(tmp_path / "secret.png")}).encode()
        info = tarfile.TarInfo("said.json")
        info.size = len(said)
        file.addfile(info, io.BytesIO(said))
    assert {s.image for s in all_of(read(inside / "d.tar", 0.0))} == {image(1), None}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["d.tar", "inside", "secret.png"]
    assert not Path("/tmp/edgemm-evil.png").exists()


def test_unused_columns_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"t{i}", "width": 1, "url": "u"} for i in range(5)]
    read(jsonl(tmp_path / "d.jsonl", rows), 0.0)
    shown = capsys.readouterr()
    assert shown.err.count("width, url") == 1
    assert shown.out == ""


OFFLINE = """
import sys
from pathlib import Path
asked = []
sys.addaudithook(lambda event, _: asked.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from edgemm.data.manifest import read
for path in sys.argv[1:]:
    assert len(read(Path(path), 0.0)["test"]) > 5, path
assert not asked, asked
"""


def test_nothing_is_asked_of_the_network_printed_or_left_at_home(tmp_path: Path) -> None:
    home, data = tmp_path / "home", tmp_path / "data"
    home.mkdir()
    data.mkdir()
    rows = [{"text": f"t{i}"} for i in range(30)]
    paths = [
        jsonl(data / "d.jsonl", rows),
        csv_file(data / "d.csv", rows),
        parquet(data / "d.parquet", rows),
        directory(data / "d", rows),
        tar(data / "d.tar", [(f"{i}.txt", b"t%d" % i) for i in range(30)]),
    ]
    before = sorted(data.rglob("*"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", OFFLINE, *map(str, paths)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(home.rglob("*")) == []
    assert sorted(data.rglob("*")) == before


# ---- the split ------------------------------------------------------------------------------------------------------


def media_of(samples: Iterable[Sample]) -> set[bytes]:
    found = {m for s in samples for m in (content(s.image), content(s.audio)) if m}
    return found | {s.text.encode() for s in samples if s.text and not (s.image or s.audio)}


@pytest.mark.parametrize("seed", range(5))
def test_calibration_and_verification_share_no_media_in_whatever_order(tmp_path: Path, seed: int) -> None:
    """Images, recordings and both, each in several rows: who shares with whom is a graph."""
    rng = random.Random(seed)
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(image(i))
        (tmp_path / f"copy-{i}.png").write_bytes(image(i))
        (tmp_path / f"{i}.wav").write_bytes(audio(i))
    rows: list[dict[str, Any]] = []
    for i in range(150):
        n = rng.randrange(40)
        row = {"id": i, "text": f"text {rng.randrange(30)}"}
        row |= rng.choice(
            [
                {},
                {"image": f"{n}.png"},
                {"image": f"copy-{n}.png"},
                {"audio": f"{n}.wav"},
                {"image": f"{n}.png", "audio": f"{max(0, n - rng.randrange(2))}.wav"},
            ]
        )
        rows.append(row)
    first = read(jsonl(tmp_path / "d.jsonl", rows), 0.0)
    assert first == read(tmp_path / "d.jsonl", 0.0)
    assert first["train"]
    assert first["test"]
    assert not media_of(first["train"]) & media_of(first["test"])
    assert not {s.group for s in first["train"]} & {s.group for s in first["test"]}
    samples = all_of(first)
    assert {s.id for s in samples} == {str(i) for i in range(150)}
    for a in samples[:40]:
        for b in samples:
            assert a.group == b.group or not media_of([a]) & media_of([b])
    rng.shuffle(rows)
    again = read(jsonl(tmp_path / "e.jsonl", rows), 0.0)
    for part in ("train", "test"):
        assert {(s.id, s.group) for s in again[part]} == {(s.id, s.group) for s in first[part]}


def test_groups_that_nothing_joins_stay_apart(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": f"text {i}"} for i in range(1000)])
    parts = read(path, 0.0)
    assert len({s.group for s in all_of(parts)}) == 1000
    assert 150 < len(parts["train"]) < 250


def test_media_joined_through_others_are_one_group(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(image(i))
        (tmp_path / f"{i}.wav").write_bytes(audio(i))
    rows = [{"image": f"{i}.png", "audio": f"{i}.wav"} for i in range(40)]
    rows += [{"image": f"{i + 1}.png", "audio": f"{i}.wav"} for i in range(39)]
    random.Random(0).shuffle(rows)
    parts = read(jsonl(tmp_path / "d.jsonl", rows), 0.0)
    assert len({s.group for s in all_of(parts)}) == 1
    assert sorted(map(len, parts.values())) == [0, 79]


def test_a_split_column_wins(tmp_path: Path) -> None:
    names = ["train", "calibration", "validation", "test", "verification"]
    rows = [{"text": f"{name} {i}", "split": name} for name in names for i in range(20)]
    parts = read(jsonl(tmp_path / "d.jsonl", rows), 0.0)
    assert {s.text.split()[0] for s in parts["train"]} == {"train", "calibration"}
    assert (len(parts["train"]), len(parts["test"])) == (40, 60)


@pytest.mark.parametrize("wrong", ["dev", "Train", "", None, 1])
def test_another_split_is_refused(tmp_path: Path, wrong: object) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": "a", "split": "test"}, {"text": "b", "split": wrong}])
    shown = repr(None if wrong is None else str(wrong))
    with pytest.raises(InputError, match=f"row 2: split = {shown}") as e:
        read(path, 0.0)
    assert "calibration" in str(e.value)


def test_media_in_both_parts_of_a_users_split_are_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(image(1))
    (tmp_path / "c.png").write_bytes(image(2))
    rows = [
        {"id": "c", "image": "c.png", "split": "train"},
        {"id": "x", "image": "a.png", "split": "calibration"},
        {"id": "y", "image": "b.png", "split": "validation"},
        {"id": "z", "image": "c.png", "split": "test"},
    ]
    with pytest.raises(InputError, match=r"row 3 \(y\) \(validation\) has the same media as row 2 \(x\) \(calibrat"):
        read(jsonl(tmp_path / "d.jsonl", rows), 0.0)
    assert len(read(jsonl(tmp_path / "e.jsonl", rows[:2]), 0.0)["train"]) == 2
    texts = [{"text": "same", "split": "train"}, {"text": "same", "split": "test"}]
    with pytest.raises(InputError, match="row 2"):
        read(jsonl(tmp_path / "f.jsonl", texts), 0.0)


# ---- broken rows ----------------------------------------------------------------------------------------------------


def bad_pixels() -> bytes:
    """A PNG whose header says 20,000 x 20,000."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def gif() -> bytes:
    return image(1, "GIF")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "absent.png"}, "absent.png: no such file"),
        ({"image": "https://example.com/a.png"}, "no such file"),
        ({"image": "."}, "no such file"),
        ({"image": "pipe.png"}, "no such file"),
        ({"image": "a\0b.png"}, "no such file"),
        ({"image": "n" * 5000}, "File name too long"),
        ({"image": "text.png"}, "is no PNG, JPEG, BMP, WEBP"),
        ({"image": "empty.png"}, "is no PNG"),
        ({"image": "gif.png"}, "is no PNG"),
        ({"image": "cut.png"}, "truncated"),
        ({"image": "huge.png"}, "400000000|20000x20000|decompression bomb"),
        ({"image": 7}, "image is int"),
        ({"image": ["good.png"]}, "image is list"),
        ({"image": {"url": "good.png"}}, "image is dict"),
        ({"image": "good.png", "audio": "absent.wav"}, "absent.wav: no such file"),
        ({"audio": "text.png"}, "no WAV"),
        ({"audio": "cut.wav"}, "cut short"),
        ({"audio": "silent.wav"}, "no samples"),
        ({"text": ""}, "no image, no audio and no text"),
        ({"text": " \n"}, "no image, no audio and no text"),
        ({"label": "alone"}, "no image, no audio and no text"),
        ({"text": "two words", "boxes": [[0, 0, 1, 1]]}, "1 boxes for 2 words"),
        ({"text": "word", "boxes": [[0, 0, 1]]}, "no list of"),
        ({"text": "word", "boxes": 3}, "no list of"),
        ({"text": "word", "boxes": "[[0, 0"}, "no list of"),
        ({"text": "word", "boxes": [[0, 0, 1001, 1]]}, "1001"),
        ({"text": "word", "boxes": [[5, 0, 4, 1]]}, "0 <= x0 <= x1"),
        ({"text": "word", "boxes": [[0, 0, 0.5, 1]]}, "whole numbers"),
    ],
)
def test_broken_rows_are_counted_and_refused_above_the_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], reason: str
) -> None:
    import re

    files = {
        "good.png": image(0),
        "text.png": b"hello",
        "empty.png": b"",
        "gif.png": gif(),
        "cut.png": image(3, size=(64, 64))[:5000],
        "huge.png": bad_pixels(),
        "cut.wav": audio(1)[:500],
        "silent.wav": audio(1, frames=0),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.png")
    path = jsonl(tmp_path / "d.jsonl", [{"image": "good.png"}, row, {"text": "good"}, {"text": "also good"}])
    assert by_id(path, 0.25).keys() == {"1", "3", "4"}
    shown = capsys.readouterr().err
    assert "1 of 4 rows can't be used: row 2: " in shown
    assert re.search(reason, shown), shown
    for tolerance in (0.0, 0.249):
        with pytest.raises(InputError, match="1 of 4 rows can't be used, first row 2: ") as e:
            read(path, tolerance)
        assert "data_tolerance" in str(e.value)


def test_the_first_ten_broken_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"absent-{i}.png", "text": "t"} for i in range(12)] + [{"text": f"t{i}"} for i in range(88)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    assert len(all_of(read(path, 0.12))) == 88
    shown = capsys.readouterr().err
    assert "12 of 100 rows" in shown
    assert all(f"absent-{i}.png" in shown for i in range(10))
    assert "absent-10.png" not in shown
    with pytest.raises(InputError, match="12 of 100"):
        read(path, 0.11)


def test_a_path_may_be_absolute_or_lead_up(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "b.png").write_bytes(image(2))
    (tmp_path / "sub").mkdir()
    path = jsonl(tmp_path / "sub" / "d.jsonl", [{"image": str(tmp_path / "a.png")}, {"image": "../b.png"}])
    assert {content(s.image) for s in all_of(read(path, 0.0))} == {image(1), image(2)}


# ---- files that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("d.jsonl", b"", "has no rows"),
        ("d.json", b"[]", "has no rows"),
        ("d.csv", b"", "has no rows"),
        ("d.csv", b"text,label\n", "has no rows"),
        ("d.xlsx", b"text", "unknown extension '.xlsx'"),
        ("d", b"text", "unknown extension ''"),
        ("d.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "b"}\n', r"line 3: Expecting value: '{\"text\": '"),
        ("d.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2 is \['b'\]"),
        ("d.json", b'[{"text": "a"},\n {"text" "b"}]', "line 2: Expecting ':' delimiter"),
        ("d.json", b'[{"text": "a"}, 3]', "item 2 is 3"),
        ("d.json", b'{\n "data": []\n}', "line 1"),
        ("d.jsonl", b"[" * 200_000, "line 1"),
        ("d.jsonl", '{"text": "ü"}'.encode("latin-1"), "utf-8"),
        ("d.jsonl", rb'{"text": "\ud800"}', "row 1: text is no text"),
        ("d.jsonl", b'{"text": {"a": 1}}', "row 1: text is no text: {'a': 1}"),
        ("d.jsonl", b'{"text": "a", "label": [["b"]]}', "row 1: the label is no text"),
        ("d.jsonl", b'{"text": "a", "id": []}', "row 1: id is no text"),
        ("d.jsonl", b'{"question": "a", "answer": "b"}', "has the columns question, answer"),
        ("d.jsonl", b'{"text": "a", "label": "b"}\n{"text": "a", "caption": "b"}', "has label and caption"),
        ("d.jsonl", b'{"text": "a", "id": 7}\n{"text": "b", "id": "7"}', "row 2 has the id '7' of row 1"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "b", "id": 1}', "row 2 has the id '1' of row 1"),
        ("d.csv", b"text,label\na,b\nc,d,e\n", "line 3 has not the 2 fields"),
        ("d.csv", b"text,label\na\n", "line 2 has not the 2 fields"),
        ("d.csv", b"text,text\na,b\n", "a column twice"),
        ("d.csv", b'text,label\n"a"b,c\n', "line 2: "),
        ("d.csv", b'text,label\n"a,c\n', "line 2: unexpected end"),
        ("d.csv", b"question,answer\na,b\n", "has the columns question, answer"),
        ("d.parquet", b"PAR1 no, not really PAR1", "cannot read"),
        ("d.parquet", b"", "cannot read"),
        ("d.tar", b"no tar at all" * 100, "cannot read"),
        ("d.tar", b"", "cannot read"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said) as e:
        read(tmp_path / name, 0.9)
    assert str(tmp_path / name) in str(e.value)
    assert "fix: " in str(e.value)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.png", image(1)), ("a.jpg", image(2))], "a.jpg is a second image"),
        ([("a.txt", b"x"), ("a.json", b"{")], "a.json: line 1"),
        ([("a.txt", b"x"), ("a.json", b"[1]")], r"a.json is \[1\]"),
        ([("a.txt", b"\xff")], "a: .*utf-8"),
        ([("a.tif", b"x")], "has the columns id, tif"),
        ([("folder/README", b"x")], "has no rows"),
        ([("a.txt", b"x"), ("a.cls", b"1"), ("a.json", b'{"caption": "c"}')], "caption"),
    ],
)
def test_a_tar_that_is_no_webdataset_is_refused(tmp_path: Path, members: list[tuple[str, bytes]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(tar(tmp_path / "d.tar", members), 0.0)


def test_a_tar_cut_short_is_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "d.tar", [("a.txt", b"x" * 2000)])
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(InputError, match="cannot read"):
        read(path, 0.0)


def test_no_file_and_no_dataset_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data file .*absent\.jsonl"):
        read(tmp_path / "absent.jsonl", 0.0)
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path, 0.0)
    path = directory(tmp_path / "d", [{"text": "a"}])
    arrow = next(path.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read"):
        read(path, 0.0)
    (path / "dataset_info.json").write_text("[]")
    with pytest.raises(InputError, match="cannot read"):
        read(path, 0.0)


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", [{"text": f"word {i}"} for i in range(500)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read"):
        read(path, 0.0)
    path.write_bytes(whole[:8] + bytes(200) + whole[208:])
    with pytest.raises(InputError, match="cannot read"):
        read(path, 0.0)
