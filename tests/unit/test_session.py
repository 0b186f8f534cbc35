"""A session over a bundle: what it loads, shares between sessions and threads, encodes once, and writes as it goes."""

from __future__ import annotations

import gc
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgemm import load_bundle
from edgemm.errors import InputError
from edgemm.runtime import onnxruntime
from edgemm.runtime.generation import pieces
from edgemm.runtime.query import Answer
from edgemm.runtime.session import Session
from tests.graphs import BACKENDS, captions, two_encoders

pytestmark = pytest.mark.usefixtures("one_thread")
THREADS, ROUNDS = 6, 12
TEXTS = ("is it red ?", "is it light ?", "w1 w2 w3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


def bundle(folder: Path, kind: str, backend: str, **options: Any) -> Path:
    path = folder / f"{kind}-{backend}-{options}.edgemm"
    if not path.is_file():
        made = captions(folder, backend, **options) if kind == "captions" else two_encoders(backend, **options)
        path.write_bytes(made)
    return path


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def loaded(session: Session) -> set[str]:
    return {name for name, component in session.components.items() if component.loaded}


def same(a: Answer, b: Answer) -> bool:
    return a.answer == b.answer and all(np.array_equal(v, b.outputs[n]) for n, v in a.outputs.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_absent_modality_is_not_even_loaded(backend: str, folder: Path) -> None:
    session = load_bundle(bundle(folder, "pair", backend, joined=False))
    assert loaded(session) == set()
    assert session.run(text="is it red ?").outputs.keys() == {"text_embeds"}
    assert loaded(session) == {"text_encoder"}
    assert session.run(image=image(0)).outputs.keys() == {"image_embeds"}
    assert loaded(session) == {"text_encoder", "image_encoder"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_modality_that_is_needed_is_asked_for(backend: str, folder: Path) -> None:
    session = load_bundle(bundle(folder, "pair", backend, joined=True))
    with pytest.raises(InputError, match="give image and text"):
        session.run(text="is it red ?")
    assert "fusion" not in loaded(session)


def test_sessions_of_one_bundle_compile_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: Counter[str] = Counter()
    compile_component = onnxruntime.compile_component

    def counted(files: Any, spec: dict[str, Any], settings: dict[str, Any]) -> Any:
        compiled[spec["name"]] += 1
        return compile_component(files, spec, settings)

    monkeypatch.setattr(onnxruntime, "compile_component", counted)
    path = bundle(folder, "pair", "onnxruntime", joined=True, gain=2.0)
    sessions = [load_bundle(path), load_bundle(str(path))]
    queries = [{"image": image(i), "text": TEXTS[i % 3]} for i in range(4)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda i: sessions[i % 2].run_many(queries), range(THREADS)))
    assert compiled == dict.fromkeys(sessions[0].components, 1)
    sessions.clear()
    gc.collect()
    load_bundle(path).run_many(queries)
    assert compiled == dict.fromkeys(compiled, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_get_what_one_gets(backend: str, folder: Path) -> None:
    path = bundle(folder, "pair", backend, joined=True)
    sessions = [load_bundle(path) for _ in range(2)]
    assert sessions[0].components is sessions[1].components
    asked = [{"image": image(i), "text": text} for i in range(4) for text in TEXTS]
    alone = [sessions[0].run(**query) for query in asked]
    with ThreadPoolExecutor(THREADS) as pool:
        made = list(pool.map(lambda i: sessions[i % 2].run(**asked[i % len(asked)]), range(ROUNDS * len(asked))))
    assert all(same(answer, alone[i % len(asked)]) for i, answer in enumerate(made))
    assert len({answer.outputs["logits"].tobytes() for answer in alone}) == len(asked)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_write_the_texts_that_one_writes(backend: str, beams: int, folder: Path) -> None:
    session = load_bundle(bundle(folder, "captions", backend, beams=beams))
    images = [image(i) for i in range(8)]
    alone = [session.run(image=i).answer for i in images]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda i: session.run(image=images[i % 8]).answer, range(32))) == alone * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_encoded_is_not_encoded_again(backend: str, folder: Path) -> None:
    session = load_bundle(bundle(folder, "pair", backend, joined=True))
    ran: Counter[str] = Counter()
    alone = [session.run(image=image(0), text=text) for text in TEXTS]
    session.observe = lambda name, _: ran.update([name])
    picture = session.encode(image=image(0))
    answers = session.run_many([{"image": picture, "text": text} for text in TEXTS])
    question = session.encode(text=TEXTS[0])
    answers.append(session.run(image=picture, text=question))
    assert all(map(same, answers, [*alone, alone[0]]))
    assert ran["image_encoder"] == 1
    assert ran["text_encoder"] == len(TEXTS) + 1


def test_an_embedding_is_what_run_gives(folder: Path) -> None:
    session = load_bundle(bundle(folder, "pair", "onnxruntime", joined=False))
    made = session.encode(image=image(1))
    np.testing.assert_array_equal(made.tensors["image_embeds"][0], session.run(image=image(1)).outputs["image_embeds"])
    assert same(session.run(image=made), session.run(image=image(1)))


def test_a_foreign_encoding_is_refused(folder: Path) -> None:
    session = load_bundle(bundle(folder, "pair", "onnxruntime", joined=True))
    other = load_bundle(bundle(folder, "pair", "onnxruntime", joined=True, gain=3.0))
    with pytest.raises(InputError, match=r"encode the image with this session's model"):
        session.run(image=other.encode(image=image(0)), text=TEXTS[0])
    with pytest.raises(InputError, match="text is image that"):
        session.run(image=image(0), text=session.encode(image=image(0)))
    with pytest.raises(InputError, match="image and text can't be encoded alone"):
        session.encode(image=image(0), text=TEXTS[0])
    with pytest.raises(InputError, match="there is nothing to run"):
        session.encode()


@pytest.mark.parametrize(
    ("row", "said"),
    [({"picture": b""}, "'picture'"), ({"image": 3}, "image is 3"), ({"text": b"x"}, "text is b'x'"), ({}, "nothing")],
)
def test_a_row_that_is_no_input_is_refused(row: dict[str, Any], said: str, folder: Path) -> None:
    session = load_bundle(bundle(folder, "pair", "onnxruntime", joined=True))
    with pytest.raises(InputError, match=said):
        session.run_many([row])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_join_to_the_answer_while_others_run(backend: str, beams: int, folder: Path) -> None:
    session = load_bundle(bundle(folder, "captions", backend, beams=beams))
    answers = [session.run(image=image(i)).answer for i in range(4)]
    streams = [session.stream(image=image(i)) for i in range(4)]
    made = ["" for _ in streams]
    open_ = set(range(4))
    while open_:  # one piece of each in turn
        for i in sorted(open_):
            if (piece := next(streams[i], None)) is None:
                open_.remove(i)
            else:
                made[i] += piece
    assert made == answers
    if beams == 1:
        assert len(list(session.stream(image=image(0)))) > 3


def test_a_stream_that_is_left_hurts_nobody(folder: Path) -> None:
    session = load_bundle(bundle(folder, "captions", "openvino", beams=1))
    answer = session.run(image=image(1)).answer
    left = session.stream(image=image(0))
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert session.run(image=image(1)).answer == answer


def test_a_model_without_a_decoder_streams_nothing(folder: Path) -> None:
    with pytest.raises(InputError, match="token by token"):
        load_bundle(bundle(folder, "pair", "onnxruntime", joined=True)).stream(image=image(0), text="is")


@pytest.mark.parametrize(
    ("texts", "made"),
    [
        (["a", "a cat", "a cat sits", "a cat sits."], ["a", " cat", " sits."]),
        (["do", "do n", "don't", "don't go"], ["do", "n't", " go"]),
        (["你", "你好", "你好\ufffd", "你好吗"], ["你", "好", "吗"]),
        (["caf\ufffd", "café", "café au", "café au lait"], ["café", " au", " lait"]),
        (["abc"], ["abc"]),
        ([""], []),
        ([], []),
    ],
)
def test_a_piece_is_given_when_it_stays(texts: list[str], made: list[str]) -> None:
    assert list(pieces(texts)) == made
    assert "".join(made) == (texts[-1] if texts else "")
