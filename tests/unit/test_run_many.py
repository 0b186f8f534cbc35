"""`edgemm run` on a directory, a JSON Lines file and a pipe: a line for each input, whatever is wrong with it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from edgemm import load_bundle
from edgemm.cli import build_app
from tests.graphs import captions, two_encoders

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "is it red ?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "m.edgemm"
    path.write_bytes(two_encoders("onnxruntime", joined=True))
    return path


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    (folder / "m.edgemm").write_bytes(captions(folder, "onnxruntime"))
    return folder / "m.edgemm"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images, one that is none, and a file that is no image."""
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    return tmp_path


def call(*arguments: Any, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(build_app(), ["run", *map(str, arguments)], input=stdin)


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_directory_gives_a_line_for_each_image(bundle: Path, folder: Path) -> None:
    result = call(bundle, "--image", folder, "--text", TEXT)
    made = lines(result)
    assert [Path(line["image"]).name for line in made] == [*(f"{i:02}.png" for i in range(20)), "broken.png"]
    session = load_bundle(bundle)
    alone = [session.run(image=folder / f"{i:02}.png", text=TEXT) for i in range(20)]
    assert [line["answer"] for line in made[:20]] == [a.answer for a in alone]
    assert [line["probability"] for line in made[:20]] == [round(a.probability or 0, 6) for a in alone]
    assert made[20].keys() == {"image", "error", "fix"}
    assert "cannot read" in made[20]["error"]
    assert result.exit_code == 2
    assert "1 of 21 inputs have no answer" in result.stderr
    (folder / "broken.png").unlink()
    assert (done := call(bundle, "--image", folder, "--text", TEXT)).exit_code == 0
    assert done.stderr == ""


ROWS: list[tuple[str, str | None]] = [
    ('{"image": "00.png", "text": "is it red ?", "id": "first", "label": "a"}', None),
    ('{"image": "01.png", "text": "is it light ?", "audio": null, "text2": 1}', None),
    ("", ""),
    ("{broken", "the line is no JSON"),
    ("[1, 2]", "the line is no object"),
    ("[" * 100_000, "the line is no JSON"),
    ('{"image": "absent.png", "text": "is"}', "absent.png: no such file"),
    ('{"image": "broken.png", "text": "is"}', "cannot read"),
    ('{"image": "../../../etc", "text": "is"}', "no such file"),
    ('{"image": 3, "text": "is"}', "image is 3"),
    ('{"image": "00.png", "text": ["is"]}', "text is ['is']"),
    ('{"image": "00.png", "text": "is", "boxes": [[1]]}', "boxes"),
    ('{"image": "00.png", "text": "is", "boxes": [[1, 2, 3, 4]]}', "takes no boxes"),
    ('{"image": "00.png"}', "needs more"),
    ("{}", "there is nothing to run"),
    ('{"audio": "00.png"}', "takes no audio"),
    ('{"image": "00.png", "text": "\\ud800", "id": "\\ud800"}', None),
    ('{"image": "a\\u0000b", "text": "is"}', "a\0b"),
    ('{"image": "02.png", "text": "is"}', None),
]


def test_rows_of_a_file_are_answered_and_none_is_lost(bundle: Path, folder: Path, tmp_path: Path) -> None:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row for row, _ in ROWS), encoding="utf-8")
    result = call(bundle, "--data", file)
    made = lines(result)
    assert [line["line"] for line in made] == [i for i, (row, _) in enumerate(ROWS, 1) if row]
    wanted = [error for row, error in ROWS if row]
    for line, error in zip(made, wanted, strict=True):
        if error is None:
            assert "answer" in line or "\ud800" in line["id"], line
        else:
            assert error in line["error"], line
            assert line["fix"]
    assert made[0]["id"] == "first"
    assert result.exit_code == 2


def test_bytes_that_are_no_text_are_one_bad_line(bundle: Path, folder: Path) -> None:
    result = call(bundle, "--data", "-", stdin=b'\xff\xfe\n{"text": "is", "image": "%s/00.png"}\n' % bytes(folder))
    first, second = lines(result)
    assert "no JSON" in first["error"]
    assert second["answer"] in "ab"


def test_a_pipe_is_answered_line_by_line(bundle: Path, folder: Path) -> None:
    """Whoever writes one line gets its answer before writing the next."""
    command = [sys.executable, "-m", "edgemm", "run", str(bundle), "--data", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdin and process.stdout
        for i in range(3):
            process.stdin.write(json.dumps({"image": f"0{i}.png", "text": TEXT}) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["line"] == i + 1
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "rows.jsonl", "--text", "is"), "--data says what goes in"),
        (("--data", "absent.jsonl"), "absent.jsonl"),
        (("--data", "."), "cannot read"),
        (("--image", "empty"), "holds no image"),
        (("--image", ".", "--audio", "."), "both directories"),
        (("--image", ".", "--stream"), "--stream is for one text"),
        (("--stream", "--json", "--text", "is"), "--stream is for one text"),
        (("--stream", "--image", "00.png", "--text", "is"), "token by token"),
    ],
)
def test_what_can_not_be_together_is_refused(
    arguments: tuple[str, ...], said: str, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "rows.jsonl").write_text("{}", encoding="utf-8")
    result = call(bundle, *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "fix: " in result.stderr
    assert result.stdout == ""


def test_stream_prints_what_run_prints(writer: Path, folder: Path) -> None:
    image = folder / "00.png"
    assert call(writer, "--image", image, "--stream").stdout == call(writer, "--image", image).stdout


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from edgemm import console

    for error, out, drawn in ((False, False, False), (True, False, True), (True, True, False)):
        stream = io.StringIO()
        monkeypatch.setattr(console, "_err", Console(file=stream, force_terminal=error))
        monkeypatch.setattr(console, "_out", Console(file=io.StringIO(), force_terminal=out))
        assert list(console.progress(iter("abc"), "inputs", 3, printing=True)) == ["a", "b", "c"]
        assert bool(stream.getvalue()) == drawn
