"""New classes from a few examples: against plain references, through bundles, and whatever is wrong with the input."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from typer.testing import CliRunner

from edgemm import load_bundle
from edgemm.cli import build_app
from edgemm.errors import InputError
from edgemm.runtime.few_shot import RIDGE, FewShot, Learned, Linear, learn, prototypes, read_learned
from edgemm.runtime.query import Query
from tests.graphs import BACKENDS, captions, two_encoders

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "is it red ?"
SHADES = {"black": 10, "grey": 128, "pale": 190}


def drawn(
    counts: dict[str, int], seed: int = 0, width: int = 6, apart: float = 3.0
) -> tuple[NDArray[np.float64], list[str]]:
    """Normal embeddings of one covariance about means of their own, so many of each label."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width))
    rows, labels = [], []
    for label, count in counts.items():
        mean = apart * np.random.default_rng(ord(label[0])).standard_normal(width)
        rows.append(mean + rng.standard_normal((count, width)) @ mixing)
        labels += [label] * count
    return np.concatenate(rows), labels


def answers(found: Linear, x: Any) -> list[str]:
    return [found.labels[i] for i in (x @ found.weights.T + found.biases).argmax(1)]


def test_a_score_is_half_the_squared_distance_from_the_prototype_less_what_chance_adds() -> None:
    counts = {"a": 7, "b": 16, "c": 4}
    x, labels = drawn(counts)
    found = prototypes(x, labels)
    means = {name: np.mean([v for v, of in zip(x, labels, strict=True) if of == name], 0) for name in counts}
    away = [v - means[of] for v, of in zip(x, labels, strict=True)]
    sample = sum(np.outer(v, v) for v in away) / (27 - 3)
    covariance = sample + RIDGE * np.mean(np.square(away)) * np.eye(6)
    for query in drawn({"a": 3, "b": 3}, seed=1)[0]:
        scores = []
        for name, count in counts.items():
            v = query - means[name]
            by_chance = np.trace(np.linalg.solve(covariance, sample)) / count
            scores.append((by_chance - v @ np.linalg.solve(covariance, v)) / 2)
        made = found.weights @ query + found.biases
        np.testing.assert_allclose(made - made[0], np.array(scores) - scores[0], rtol=1e-9)
    assert found.labels == ("a", "b", "c")


def test_of_many_examples_it_is_linear_discriminant_analysis() -> None:
    """scikit-learn's, which has no ridge and weighs by how many there are: here as many of each."""
    x, labels = drawn({"a": 4000, "b": 4000, "c": 4000})
    asked = drawn({"a": 500, "b": 500, "c": 500}, seed=1)[0]
    theirs = LinearDiscriminantAnalysis().fit(x, labels).predict(asked)
    assert np.mean(np.array(answers(prototypes(x, labels), asked)) == theirs) > 0.995


def test_of_one_example_each_the_nearest_answers() -> None:
    x, labels = drawn({"a": 1, "b": 1, "c": 1})
    asked = drawn({"a": 20, "b": 20, "c": 20}, seed=1)[0]
    nearest = [labels[i] for i in ((asked[:, None] - x) ** 2).sum(-1).argmin(1)]
    assert answers(prototypes(x, labels), asked) == nearest


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_known_labels_lose_to_one_with_few_examples_the_share_that_was_asked_for(share: float) -> None:
    asked, right = drawn({"a": 500, "b": 500, "c": 500}, seed=1, apart=0.7)
    taken, found = [], []
    for seed in range(20):
        made = answers(prototypes(*drawn({"a": 200, "b": 200, "c": 5}, seed=2 + seed, apart=0.7), share), asked)
        taken.append(np.mean([a == "c" for a, of in zip(made, right, strict=True) if of != "c"]))
        found.append(np.mean([a == "c" for a, of in zip(made, right, strict=True) if of == "c"]))
    assert np.mean(taken) == pytest.approx(share, abs=0.03)
    assert np.mean(found) > share + 0.2


def test_few_examples_of_all_labels_are_weighed_alike() -> None:
    """A label with one example is found about as often as those with 15."""
    asked, right = drawn({"a": 300, "b": 300, "c": 300}, seed=1, width=12)
    shares = []
    for seed in range(40):
        hits = np.array(answers(prototypes(*drawn({"a": 15, "b": 15, "c": 1}, seed=2 + seed, width=12)), asked))
        shares.append([(hits == right)[np.array(right) == name].mean() for name in "abc"])
    a, b, c = np.mean(shares, 0)
    assert c > 0.6
    assert abs(c - (a + b) / 2) < 0.25


def test_examples_that_never_differ_are_told_apart() -> None:
    x = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert answers(prototypes(x, ["a", "a", "b", "b"]), np.array([[0.9, 0.2], [0.1, 0.6]])) == ["a", "b"]


@pytest.mark.parametrize(("labels", "what"), [([], "no examples"), (["a", "a"], "'a' alone")])
def test_there_is_nothing_to_tell_apart(labels: list[str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        prototypes(np.zeros((len(labels), 3)), labels)


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_no_share_of_false_alarms(share: float) -> None:
    with pytest.raises(InputError, match="false alarms"):
        prototypes(np.eye(2), ["a", "b"], share)


# Through bundles


def picture(shade: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(-9, 9, (8, 8, 3)) + shade
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def examples(each: int, **more: Any) -> tuple[list[Query], list[str]]:
    rows = [(Query(image=picture(shade, i), **more), name) for name, shade in SHADES.items() for i in range(each)]
    return [query for query, _ in rows], [name for _, name in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("few")


def bundle(folder: Path, backend: str = "onnxruntime", *, joined: bool = False, gain: float = 1.0) -> Path:
    path = folder / f"{backend}-{joined}-{gain}.edgemm"
    if not path.is_file():
        path.write_bytes(two_encoders(backend, joined=joined, gain=gain))
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bundle_learns_shades_that_it_has_no_answer_for(backend: str, folder: Path, tmp_path: Path) -> None:
    session = load_bundle(bundle(folder, backend))
    learn(session, *examples(5)).write(tmp_path / "new.json")
    known = FewShot(session, read_learned(tmp_path / "new.json"))
    assert (known.known.tensor, known.known.examples) == ("image_embeds", (5, 5, 5))
    for name, shade in SHADES.items():
        found = known.answer(Query(image=picture(shade, 77)))
        assert found.answer == name
        assert found.probability is not None
        assert 0.5 < found.probability <= 1


def test_the_probability_is_the_softmax_of_the_scores(folder: Path) -> None:
    session = load_bundle(bundle(folder))
    known = learn(session, *examples(3))
    query = Query(image=picture(100, 5))
    found = FewShot(session, known).answer(query)
    embedding = session.answer(query).outputs["image_embeds"].astype(np.float64)
    scores = [sum(w * e for w, e in zip(row, embedding, strict=True)) for row in known.weights]
    chances = np.exp(np.array(scores) + known.biases - np.max(np.array(scores) + known.biases))
    assert found.probability == pytest.approx(float((chances / chances.sum()).max()), rel=1e-6)


def test_the_models_own_answers_stay_and_new_ones_come_to_them(folder: Path) -> None:
    session = load_bundle(bundle(folder, joined=True))
    queries, labels = examples(6, text=TEXT)
    own = [session.answer(query).answer for query in queries]
    taught = [label if label == "grey" else str(answer) for label, answer in zip(labels, own, strict=True)]
    known = FewShot(session, learn(session, queries, taught))
    assert known.known.tensor == "logits"
    for shade in SHADES.values():
        query = Query(image=picture(shade, 50), text=TEXT)
        plain, found = session.answer(query), known.answer(query)
        if shade == SHADES["grey"]:
            assert (found.answer, plain.answer in "ab") == ("grey", True)
        else:
            assert (found.answer, found.probability) == (plain.answer, plain.probability)


def manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def shades(folder: Path, each: int = 3) -> list[dict[str, Any]]:
    rows = []
    for name, shade in SHADES.items():
        for i in range(each):
            (folder / f"{name}-{i}.png").write_bytes(picture(shade, i))
            rows.append({"image": f"{name}-{i}.png", "label": name})
    return rows


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(build_app(), [*map(str, arguments)])


def test_what_was_learned_answers_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    data, file = manifest(tmp_path / "rows.jsonl", shades(tmp_path)), tmp_path / "new.json"
    box = bundle(folder)
    made = call("learn", box, "--data", data, "-o", file)
    assert (made.exit_code, made.stdout.strip()) == (0, str(file)), made.stderr
    asked = call("run", box, "--learned", file, "--image", tmp_path / "pale-0.png", "--json")
    answer = json.loads(asked.stdout)
    assert answer["answer"] == "pale"
    assert set(answer) == {"answer", "probability"}
    assert call("run", box, "--learned", file, "--image", tmp_path / "black-1.png").stdout == "black\n"
    many = [json.loads(line) for line in call("run", box, "--learned", file, "--data", data).stdout.splitlines()]
    assert [line["answer"] for line in many] == [row["label"] for row in shades(tmp_path)]


def test_the_same_examples_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    data = manifest(tmp_path / "rows.jsonl", shades(tmp_path))
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        assert call("learn", bundle(folder), "--data", data, "-o", file).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()


# Bad input


@pytest.fixture
def learned(folder: Path, tmp_path: Path) -> Path:
    learn(load_bundle(bundle(folder)), *examples(2)).write(tmp_path / "new.json")
    return tmp_path / "new.json"


def test_another_bundles_prototypes_are_refused(folder: Path, learned: Path) -> None:
    other = bundle(folder, gain=2.0)
    result = call("run", other, "--learned", learned, "--text", TEXT)
    assert result.exit_code == 2
    assert "it was learned by the bundle" in result.stderr


def test_another_modality_than_that_of_the_examples_is_refused(folder: Path, learned: Path) -> None:
    result = call("run", bundle(folder), "--learned", learned, "--text", TEXT)
    assert result.exit_code == 2
    assert "no image_embeds" in result.stderr


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"schema": 2}, "schema"),
        ({"labels": ["a", "a", "b"]}, "different labels"),
        ({"labels": ["a"]}, "labels"),
        ({"biases": [0.0, float("nan"), 0.0]}, "biases.1"),
        ({"weights": [[0.0] * 4, [0.0] * 4, [0.0] * 3]}, "differ in length"),
        ({"weights": [[0.0] * 3] * 3}, "3 values were learned"),
        ({"more": 1}, "more"),
    ],
)
def test_a_file_that_is_not_what_learn_writes(folder: Path, learned: Path, change: Any, what: str) -> None:
    learned.write_text(json.dumps(json.loads(learned.read_text("utf-8")) | change), encoding="utf-8")
    (learned.parent / "x.png").write_bytes(picture(9, 9))
    result = call("run", bundle(folder), "--learned", learned, "--image", learned.parent / "x.png")
    assert result.exit_code == 2
    assert what in result.stderr


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{" * 10_000])
def test_a_file_that_is_no_object(folder: Path, learned: Path, content: bytes) -> None:
    learned.write_bytes(content)
    assert call("run", bundle(folder), "--learned", learned, "--text", TEXT).exit_code == 2


def test_a_file_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    result = call("run", bundle(folder), "--learned", tmp_path / "no.json", "--text", TEXT)
    assert (result.exit_code, "cannot read" in result.stderr) == (2, True)


def test_rows_that_teach_nothing(folder: Path, tmp_path: Path) -> None:
    rows = shades(tmp_path)
    for wrong, what in (
        (rows[:3], "'black' alone"),
        ([*rows, {"image": "black-0.png"}], "no label"),
        ([*rows, {"image": "gone.png", "label": "pale"}], "no such file"),
        ([*rows, {"text": TEXT, "label": "pale"}], "do not give one output"),
        ([row | {"text": TEXT} for row in rows], "do not give one output"),
    ):
        result = call("learn", bundle(folder), "--data", manifest(tmp_path / "r.jsonl", wrong), "-o", tmp_path / "o")
        assert (result.exit_code, what in result.stderr) == (2, True), result.stderr
        assert not (tmp_path / "o").exists()


def test_an_output_can_be_named_and_must_be_there(folder: Path) -> None:
    session = load_bundle(bundle(folder))
    queries, labels = examples(3, text=TEXT)
    assert learn(session, queries, labels, "image_embeds").tensor == "image_embeds"
    with pytest.raises(InputError, match="no output 'pixels'"):
        learn(session, queries, labels, "pixels")
    with pytest.raises(InputError, match="no examples"):
        learn(session, [], [])


def test_a_model_that_writes_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.edgemm").write_bytes(captions(tmp_path, "onnxruntime"))
    with pytest.raises(InputError, match="writes text"):
        learn(load_bundle(tmp_path / "w.edgemm"), *examples(1))


def test_stream_goes_with_no_prototypes(folder: Path, learned: Path) -> None:
    result = call("run", bundle(folder), "--learned", learned, "--image", "x.png", "--stream")
    assert (result.exit_code, "--learned" in result.stderr) == (2, True)


def test_a_row_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="not one row"):
        Learned(model="m", tensor="t", labels=("a", "b"), examples=(1, 1), weights=((1.0,),), biases=(0.0, 0.0))
