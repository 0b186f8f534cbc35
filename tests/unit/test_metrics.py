"""Metrics against hand-made cases, the kept libraries' own corpus figures, and plain references."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import jiwer
import numpy as np
import pytest
import sacrebleu
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from edgemm.errors import InputError, ToolchainError
from edgemm.metrics._answers import normalised
from edgemm.plugins import names, plugin
from edgemm.verdict import compare

Outputs = dict[str, Any]
COLOURS = ("red", "green", "blue", "gray")
CORPUS = [
    ("Press one, for sales!", "PRESS one; for sale."),
    ("the cat sat on the mat", "the cat sat on mat"),
    ("Don't", "dont"),
    ("thank you", ""),
    ("please hold the line", "please please please hold a line now"),
]


def labels(best: list[str]) -> Outputs:
    """Outputs of a classifier whose best labels are these."""
    return {"logits": np.array([[float(c == b) for c in COLOURS] for b in best], np.float32), "labels": COLOURS}


def texts(*said: str) -> Outputs:
    return {"text": np.array(said)}


def values(name: str, outputs: Outputs, targets: list[Any], reference: Outputs | None = None) -> NDArray[np.float64]:
    found = plugin("metrics", name).values(outputs, outputs if reference is None else reference, targets)
    assert (found.shape, found.dtype) == ((len(targets),), np.float64)
    return found


# Labels


def test_accuracy_compares_the_text_of_the_best_label() -> None:
    assert values("accuracy", labels(["red", "blue", "gray"]), ["red", "green", "gray"]).tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["accuracy", "macro_f1"])
def test_targets_that_are_no_labels_are_refused(name: str) -> None:
    """Both models would score 0, and their difference would pass."""
    with pytest.raises(InputError, match=r"'Red' of sample 0(.|\n)*'red', 'green'"):
        values(name, labels(["red", "blue"]), ["Red", "Blue"])


def test_target_that_is_no_label_is_wrong_when_others_are() -> None:
    assert values("accuracy", labels(["red", "blue"]), ["red", "mauve"]).tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(5))
def test_mean_is_macro_f1_of_the_classes_that_targets_name(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice(COLOURS[: 2 + seed % 3], 60).tolist()
    best = [t if rng.random() < 0.7 else str(rng.choice(COLOURS)) for t in truth]
    expected = f1_score(truth, best, labels=sorted(set(truth)), average="macro", zero_division=0)
    assert values("macro_f1", labels(best), truth).mean() == pytest.approx(expected, abs=1e-12)


def macro_f1(prior: NDArray[Any], confusion: NDArray[Any]) -> float:
    joint = prior[:, None] * confusion
    return float((2 * np.diag(joint) / (joint.sum(0) + joint.sum(1))).mean())


def noisy(rate: NDArray[Any]) -> NDArray[np.float64]:
    """Probability of each class after a move to another one at this rate, [from,to]."""
    others = 1 - np.eye(len(rate))
    return np.diag(1 - rate) + others * rate[:, None] / (len(rate) - 1)


@pytest.mark.parametrize(
    ("prior", "flips"),
    [([0.25] * 4, [0.1] * 4), ([0.6, 0.2, 0.1, 0.1], [0.02, 0.02, 0.2, 0.3])],
    ids=["balanced", "rare classes lose"],
)
def test_bound_on_macro_f1_covers_the_true_drop(prior: list[float], flips: list[float]) -> None:
    """95 % of the time, at three standard errors of 300 draws; F1 shared out within its class covers 76 %."""
    rng, n, draws = np.random.default_rng(0), 400, 300
    weights, base = np.array(prior), noisy(np.full(4, 0.2))
    drop = macro_f1(weights, base) - macro_f1(weights, base @ noisy(np.array(flips)))
    covered = 0
    for draw in range(draws):
        true = rng.choice(4, n, p=weights)
        fp32 = np.where(rng.random(n) < 0.2, (true + rng.integers(1, 4, n)) % 4, true)
        moved = rng.random(n) < np.array(flips)[fp32]
        compressed = np.where(moved, (fp32 + rng.integers(1, 4, n)) % 4, fp32)
        truth, before, after = ([COLOURS[i] for i in index] for index in (true, fp32, compressed))
        pair = [values("macro_f1", labels(best), truth) for best in (before, after)]
        covered += compare(*pair, np.arange(n), margin=0.05, seed=draw, resamples=500).upper >= drop
    assert covered / draws >= 0.95 - 3 * (0.95 * 0.05 / draws) ** 0.5


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        ("red", "red|" * 4 + "blue|" * 6, 1.0),
        ("red", "red|" * 3 + "blue|" * 7, 0.9),  # 3 of 10 see 2 others: 2/3; 7 see 3: 1
        ("red", "red|" * 2 + "blue|" * 8, 0.6),
        ("red", "red|" + "blue|" * 9, 0.3),
        ("red", "blue|" * 10, 0.0),
        ("red", "red", 1.0),
        ("red", "blue", 0.0),
        ("red", "red|red", 1.0),
        ("red", "red|blue", 0.5),
        ("red", "red|red|blue", 2 / 3),
        ("Two dogs.", "2 dogs|two dogs|the two dogs", 1.0),
        ("1,000", "1000", 1.0),
        ("3.5", "35", 0.0),
        ("don't know", "dont know", 1.0),
        ("yes/no", "yes no", 1.0),
        ("a, b", "b", 1.0),
    ],
)
def test_vqa_accuracy_by_hand(answer: str, target: str, expected: float) -> None:
    assert values("vqa_accuracy", texts(answer), [target]) == pytest.approx([expected])


def test_vqa_accuracy_of_labels_and_of_no_answers() -> None:
    assert values("vqa_accuracy", labels(["red", "gray"]), ["red|Red", "red"]).tolist() == [1, 0]
    with pytest.raises(InputError, match=r"sample 1: the target ' \| ' has no answer"):
        values("vqa_accuracy", texts("red", "red"), ["red", " | "])


# Texts


@pytest.mark.parametrize(
    "text", ["Don't  STOP;\tgo\n", "Ümlaut—ÉCOLE «ça»", "$5.00 & 10%", "こんにちは。 世界!", "", "...", "ΣΑΣ?"]
)
def test_normalisation_is_that_of_jiwers_transforms(text: str) -> None:
    transform = jiwer.Compose(
        [
            jiwer.ToLowerCase(),
            jiwer.RemovePunctuation(),
            jiwer.RemoveWhiteSpace(replace_by_space=True),
            jiwer.RemoveMultipleSpaces(),
            jiwer.Strip(),
        ]
    )
    assert normalised(text) == transform(text)


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("wer", CORPUS, [1, 1, 0, 2, 4]),  # sale; the; -; thank you; please please, a, now
        ("cer", [("ab cd", "abcd"), ("abc", "AXC!"), ("a", "")], [1, 1, 1]),
    ],
)
def test_error_rates_by_hand(name: str, words: list[tuple[str, str]], expected: list[int]) -> None:
    truth, said = zip(*words, strict=True)
    clean = [normalised(t) for t in truth]
    total = sum(len(t.split()) if name == "wer" else len(t) for t in clean)
    found = values(name, texts(*said), list(truth))
    np.testing.assert_allclose((1 - found) * total / len(words), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_mean_is_one_less_the_corpus_rate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, said = (
        [" ".join(rng.choice(["a", "bee", "sea", "dee"], rng.integers(fewest, 7))) for _ in range(1 + seed)]
        for fewest in (1, 0)
    )
    assert 1 - values("wer", texts(*said), truth).mean() == pytest.approx(jiwer.wer(truth, said), abs=1e-12)
    assert 1 - values("cer", texts(*said), truth).mean() == pytest.approx(jiwer.cer(truth, said), abs=1e-12)
    found = values("text_agreement_wer", texts(*said), [None] * len(said), reference=texts(*truth))
    assert 1 - found.mean() == pytest.approx(jiwer.wer(truth, said), abs=1e-12)


def test_words_where_fp32_is_silent_are_errors_and_silence_agrees() -> None:
    fp32 = texts("Press one.", "", "...")
    assert values("text_agreement_wer", texts("press one", "", ""), [None] * 3, fp32).tolist() == [1, 1, 1]
    assert values("text_agreement_wer", texts("press one", "um", ""), [None] * 3, fp32).tolist() == [1, 1 - 3 / 2, 1]
    with pytest.raises(InputError, match="all 2 are empty"):
        values("text_agreement_wer", texts("a", "b"), [None] * 2, reference=texts("", "."))


@pytest.mark.parametrize("name", ["wer", "cer", "bleu", "rouge_l"])
@pytest.mark.parametrize("target", ["", " ", "?!"])
def test_target_without_a_word_is_refused(name: str, target: str) -> None:
    with pytest.raises(InputError, match="sample 1: the target"):
        values(name, texts("one", "two"), ["one", target])


def test_exact_match_ignores_case_punctuation_and_space_alone() -> None:
    said = texts("Red.", " dark  red", "reds", "+", "?", "?")
    expected = [1, 1, 0, 0, 1, 0]
    assert values("exact_match", said, ["red", "Dark red!", "red", "-", "?", "!"]).tolist() == expected
    assert values("exact_match", labels(["red", "gray"]), ["Red", "red"]).tolist() == [1, 0]


def test_bleu_is_sacrebleus_of_the_sentence() -> None:
    said = ("a man rides a horse on the beach", "a dog", "", "quite another thing")
    truth = ["a man rides a brown horse on the beach", "A dog", "a cat", "the red car is parked here"]
    expected = [
        sacrebleu.sentence_bleu(s, [t], use_effective_order=True).score / 100 for s, t in zip(said, truth, strict=True)
    ]
    found = values("bleu", texts(*said), truth)
    np.testing.assert_allclose(found, expected)
    assert 0.4 < found[0] < 1
    assert found[2:].tolist() == [0, 0]
    assert values("bleu", texts("one two three", "yes"), ["one two three", "yes"]).tolist() == [1, 1]


def test_rouge_l_by_hand() -> None:
    """Longest common subsequence 4 of 4 and 6 words: F = 2 * 1 * 4/6 / (1 + 4/6)."""
    found = values("rouge_l", texts("the cat on mat", "The cat!", "dog"), ["the cat sat on the mat", "the cat", "cat"])
    np.testing.assert_allclose(found, [0.8, 1, 0])


def test_rouge_l_refuses_a_script_that_it_does_not_see() -> None:
    with pytest.raises(InputError, match=r"sample 0: the target 'こんにちは'(.|\n)*use bleu or cer"):
        values("rouge_l", texts("こんにちは"), ["こんにちは"])


# Embeddings


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pairs(n: int, noise: float, seed: int, captions: int = 1) -> Outputs:
    """n images, each with so many captions: n * captions rows."""
    rng = np.random.default_rng(seed)
    image = np.repeat(rng.standard_normal((n, 8)), captions, 0)
    return {"image": unit(image), "text": unit(image + noise * rng.standard_normal(image.shape))}


def naive_recall(outputs: Outputs, image_of: list[int], k: int) -> list[float]:
    """Rank by rank, with every image once."""
    one_of = {image: row for row, image in enumerate(image_of)}
    images, n = sorted(one_of), len(image_of)

    def score(image: int, text: int) -> float:
        return float(outputs["image"][one_of[image]] @ outputs["text"][text])

    found = []
    for row, own in enumerate(image_of):
        to_text = sorted(range(n), key=lambda text, own=own: -score(own, text))
        to_image = sorted(images, key=lambda image, row=row: -score(image, row))
        hits = any(image_of[text] == own for text in to_text[:k]), own in to_image[:k]
        found.append(sum(hits) / 2)
    return found


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("captions", [1, 3])
def test_recall_is_the_naive_ranking(k: int, captions: int) -> None:
    outputs = pairs(20, 3.0, seed=k, captions=captions)
    image_of = np.repeat(range(20), captions).tolist()
    expected = naive_recall(outputs, image_of, k)
    assert 0 < np.mean(expected) < 1
    assert values(f"recall_at_{k}", outputs, [None] * 20 * captions).tolist() == expected


def test_samples_with_the_same_text_or_target_are_right_for_each_other() -> None:
    rows = np.eye(4, dtype=np.float32)
    crossed = {"image": rows[:3], "text": rows[[1, 0, 2]]}
    assert values("recall_at_1", crossed, [None] * 3).tolist() == [0, 0, 1]
    assert values("recall_at_1", crossed, ["cat", "cat", "dog"]).tolist() == [1, 1, 1]
    shared = {"image": rows, "text": rows[[1, 1, 2, 3]]}  # images 0 and 1 have one text, which image 0 is not near
    assert values("recall_at_1", shared, [None] * 4).tolist() == [0.5, 1, 1, 1]


def test_order_of_samples_and_names_of_modalities_change_nothing() -> None:
    outputs = pairs(15, 1.0, seed=3, captions=2)
    order = np.random.default_rng(0).permutation(30)
    found = values("recall_at_1", outputs, [None] * 30)
    mixed = {"text": outputs["text"][order], "audio": outputs["image"][order]}
    assert values("recall_at_1", mixed, [None] * 30).tolist() == found[order].tolist()


def test_model_that_maps_everything_to_one_point_finds_nothing() -> None:
    fp32 = pairs(12, 0.1, seed=0)
    point = {name: np.ones_like(rows) / 8**0.5 for name, rows in fp32.items()}
    assert values("recall_at_1", fp32, [None] * 12).mean() > 0.9
    assert values("recall_at_1", point, [None] * 12, reference=fp32).tolist() == [0] * 12
    assert values("agreement", point, [None] * 12, reference=fp32).mean() < 0.2


@pytest.mark.parametrize(("k", "n"), [(1, 1), (5, 5), (10, 10)])
def test_recall_that_no_model_could_miss_is_refused(k: int, n: int) -> None:
    with pytest.raises(InputError, match=f"recall at {k} with {n} different (image|text)s"):
        values(f"recall_at_{k}", pairs(n, 0.1, seed=0), [None] * n)
    values(f"recall_at_{k}", pairs(n + 1, 0.1, seed=0), [None] * (n + 1))


def test_recall_with_few_texts_for_many_images_is_refused() -> None:
    outputs = pairs(40, 0.1, seed=0)
    outputs["text"] = outputs["text"][np.arange(40) % 5]
    with pytest.raises(InputError, match="recall at 5 with 5 different texts"):
        values("recall_at_5", outputs, [None] * 40)


# Agreement with FP32


def test_agreement_of_labels_and_texts() -> None:
    fp32 = labels(["red", "blue", "gray"])
    assert values("agreement", labels(["red", "red", "gray"]), [None] * 3, reference=fp32).tolist() == [1, 0, 1]
    assert values("agreement", texts("Yes", "no"), [None] * 2, reference=texts("yes", "no")).tolist() == [0, 1]


def test_agreement_of_embeddings_is_on_the_item_and_not_on_its_copy() -> None:
    rows = np.eye(3, dtype=np.float32)
    fp32 = {"image": rows[[0, 0, 1, 2]], "text": rows[[0, 0, 1, 2]]}
    # Image 2 moves to text 0, of which there are two; texts 1..3 still find their images, text 0 too.
    moved = {**fp32, "image": unit(rows[[0, 0, 1, 2]] + np.array([[0], [0], [0], [2]]) * rows[0])}
    assert values("agreement", fp32, [None] * 4).tolist() == [1, 1, 1, 1]
    assert values("agreement", moved, [None] * 4, reference=fp32).tolist() == [1, 1, 1, 0.5]
    longer = {**fp32, "image": fp32["image"] * np.array([[1], [1.01], [1], [1]], np.float32)}
    assert values("agreement", longer, [None] * 4, reference=fp32).tolist() == [1, 1, 1, 1], "nearest is a copy"


def test_cosine_is_the_mean_over_tensors() -> None:
    fp32 = {"image": np.array([[1, 0], [3, 4], [0, 0], [0, 0]], np.float32), "text": np.ones((4, 2, 2), np.float32)}
    other = {"image": np.array([[0, 2], [4, 3], [0, 0], [1, 0]], np.float32), "text": -7 * fp32["text"]}
    expected = [(0 - 1) / 2, (0.96 - 1) / 2, (1 - 1) / 2, (0 - 1) / 2]
    np.testing.assert_allclose(values("cosine", other, [None] * 4, reference=fp32), expected)
    np.testing.assert_allclose(values("cosine", fp32, [None] * 4), 1)


def test_cosine_of_other_shapes_is_refused() -> None:
    fp32 = {"tokens": np.ones((2, 5, 4), np.float32)}
    with pytest.raises(InputError, match=r"tokens has the shape \(2, 3, 4\), and \(2, 5, 4\)"):
        values("cosine", {"tokens": np.ones((2, 3, 4), np.float32)}, [None] * 2, reference=fp32)


# Every metric


def needs_targets(metric: ModuleType) -> bool:
    return bool(getattr(metric, "NEEDS_TARGETS", True))


@pytest.mark.parametrize("name", [n for n in names("metrics") if needs_targets(plugin("metrics", n))])
def test_missing_target_is_named(name: str) -> None:
    outputs = labels(["red"] * 4) if "labels" in plugin("metrics", name).OUTPUTS else texts(*["red"] * 4)
    with pytest.raises(InputError, match="sample 2 has no target"):
        values(name, outputs, ["red", "red", None, "red"])


@pytest.mark.parametrize(
    ("library", "name"),
    [
        *(("jiwer", name) for name in ("wer", "cer", "text_agreement_wer")),
        ("sacrebleu", "bleu"),
        ("rouge_score", "rouge_l"),
    ],
)
def test_absent_library_says_what_to_install(library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ToolchainError, match=rf"{library} is not installed\n  fix: pip install 'edgemm\[compress\]'"):
        values(name, texts("one"), ["one"])
