"""`edgemm serve` as clients see it: Triton's own clients, files, bad input, signals, bundles that change."""

from __future__ import annotations

import asyncio
import io
import json
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import schemathesis
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import urllib3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tritonclient.grpc import service_pb2

from edgemm import load_bundle
from edgemm.runtime.preprocess import image_to_pixels
from edgemm.runtime.serving.messages import MESSAGES, message
from edgemm.runtime.serving.model import Model
from edgemm.runtime.serving.options import Options
from tests import bundles
from tests.serving import Server, serving, two_modalities

QUESTION = "what color is the circle?"
IDS = np.array([[2, 3, 4, 5, 6, 7, 0, 0]], np.int64)  # QUESTION, padded
HTTP = urllib3.PoolManager(retries=False, timeout=20)


def png(value: int = 200, size: tuple[int, int] = (20, 14)) -> bytes:
    made = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (*size, 3)).astype(np.uint8)).save(made, "PNG")
    return made.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serving") / "looker.edgemm"
    path.write_bytes(two_modalities())
    return path


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, "--max-body-mb", "1", "--max-pixels", "100000") as running:
        yield running


def post(server: Server, path: str, body: Any = b"", **headers: str) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = HTTP.request("POST", f"http://{server.http}{path}", body=content, headers=headers)
    return answer.status, json.loads(answer.data) if answer.data else None


def ask(server: Server, **fields: Any) -> tuple[int, Any]:
    files = {n: (f"../../etc/{n}", v) if isinstance(v, bytes) else v for n, v in fields.items()}
    answer = HTTP.request("POST", f"http://{server.http}/v1/answer", fields=files)
    return answer.status, json.loads(answer.data)


def alive(server: Server) -> bool:
    return ask(server, image=png(), text=QUESTION)[0] == 200 and server.process.poll() is None


def tensors(bundle: Path, image: bytes = b"") -> dict[str, Any]:
    spec = load_bundle(bundle).program["image"]
    return {"pixel_values": image_to_pixels(image or png(), spec), "input_ids": IDS, "mask": (IDS > 0).astype(np.int64)}


def triton_inputs(client: Any, given: dict[str, Any]) -> list[Any]:
    kinds = {"float32": "FP32", "int64": "INT64"}
    made = [client.InferInput(n, list(v.shape), kinds[v.dtype.name]) for n, v in given.items()]
    for tensor, value in zip(made, given.values(), strict=True):
        tensor.set_data_from_numpy(value)
    return made


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[tuple[Any, Any]]:
    kind = triton_http if request.param == "http" else triton_grpc
    made = kind.InferenceServerClient(server.http if request.param == "http" else server.grpc)
    yield kind, made
    made.close()


def test_messages_are_the_protocol_s() -> None:
    for name in MESSAGES:
        first, *nested = name.split(".")
        theirs = service_pb2.DESCRIPTOR.message_types_by_name[first]
        for part in nested:
            theirs = theirs.nested_types_by_name[part]

        def fields(descriptor: Any) -> set[Any]:
            return {
                (f.name, f.number, f.type, f.is_repeated, f.message_type and f.message_type.full_name)
                for f in descriptor.fields
            }

        assert fields(message(name).DESCRIPTOR) == fields(theirs), name


def test_triton_s_clients_get_what_run_gets(client: tuple[Any, Any], bundle: Path) -> None:
    kind, made = client
    assert made.is_server_live() and made.is_server_ready() and made.is_model_ready("looker", "1")
    assert "binary_tensor_data" in str(made.get_server_metadata())
    assert "pixel_values" in str(made.get_model_metadata("looker"))
    given = tensors(bundle)
    found = made.infer("looker", triton_inputs(kind, given), request_id="7").as_numpy("logits")
    expected = load_bundle(bundle).run(image=png(), text=QUESTION).outputs["logits"]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)
    text = {n: v for n, v in given.items() if n != "pixel_values"}
    alone = made.infer("looker", triton_inputs(kind, text)).as_numpy("text_tokens")
    assert alone.shape == (1, 8, 4) and not alone[0, 6:].any()
    five = made.infer("looker", triton_inputs(kind, {n: v[:, :5] for n, v in text.items()}))
    np.testing.assert_array_equal(five.as_numpy("text_tokens"), alone[:, :5])  # padded to 8, and cut again
    image = {"pixel_values": np.concatenate([given["pixel_values"]] * 3)}
    wanted = [kind.InferRequestedOutput("image_tokens")]
    assert made.infer("looker", triton_inputs(kind, image), outputs=wanted).as_numpy("image_tokens").shape == (3, 4)


def test_texts_are_padded_to_lengths_that_change_nothing(bundle: Path, tmp_path: Path) -> None:
    model = Model(bundle, Options())
    assert (model.buckets, model.text_axes) == ([8, 16], {("text_tokens", 1)})
    assert [len(t) for t in model.medium("text", "what is")["mask"]] == [8]
    (tmp_path / "m.edgemm").write_bytes(two_modalities(masked=False))
    assert Model(tmp_path / "m.edgemm", Options()).buckets == [16]


def test_json_tensors(server: Server, bundle: Path) -> None:
    given = tensors(bundle)
    inputs = [
        {"name": n, "shape": list(v.shape), "datatype": "INT64" if v.dtype == np.int64 else "FP32", "data": v.tolist()}
        for n, v in given.items()
    ]
    status, answer = post(server, "/v2/models/looker/infer", {"id": "a", "inputs": inputs})
    assert status == 200 and answer["id"] == "a" and answer["model_version"] == "1"
    expected = load_bundle(bundle).run(image=png(), text=QUESTION).outputs["logits"]
    np.testing.assert_allclose(answer["outputs"][0]["data"], expected, rtol=1e-5, atol=1e-5)


def test_a_stream_answers_in_order_and_goes_on_after_an_error(server: Server, bundle: Path) -> None:
    given, answers = tensors(bundle), queue.Queue[Any]()
    with triton_grpc.InferenceServerClient(server.grpc) as made:
        made.start_stream(lambda result, error: answers.put((result, error)))
        for name in ("looker", "nobody", "looker"):
            made.async_stream_infer(name, triton_inputs(triton_grpc, given))
        got = [answers.get(timeout=20) for _ in range(3)]
        made.stop_stream()
    assert [error is None for _, error in got] == [True, False, True]


def test_files_are_answered_as_run_does(server: Server, bundle: Path) -> None:
    status, answer = ask(server, image=png(), text=QUESTION)
    expected = load_bundle(bundle).run(image=png(), text=QUESTION)
    assert status == 200
    assert (answer["answer"], answer["model_name"]) == (expected.answer, "looker")
    assert answer["probability"] == pytest.approx(expected.probability, abs=1e-5)


def test_many_at_once_get_what_each_gets_alone(server: Server, bundle: Path) -> None:
    session = load_bundle(bundle)
    images = [png(i) for i in range(12)]
    alone = [session.run(image=image, text=QUESTION).outputs["logits"] for image in images]
    found: dict[int, Any] = {}

    def run(i: int) -> None:
        with triton_grpc.InferenceServerClient(server.grpc) as made:
            given = triton_inputs(triton_grpc, tensors(bundle, images[i]))
            found[i] = [made.infer("looker", given).as_numpy("logits")[0] for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in enumerate(alone):
        np.testing.assert_allclose(found[i], [logits] * 5, rtol=1e-5, atol=1e-5)
    text = HTTP.request("GET", f"http://{server.http}/metrics").data.decode()
    assert 'edgemm_cache_total{component="image_encoder",model="looker",result="hit"}' in text
    for name in ("queue_seconds", "compute_seconds", "batch_size", "padding_elements_total", "request_seconds"):
        assert f"edgemm_{name}" in text


BAD_INFER: dict[str, tuple[Any, str]] = {
    "no json": (b"{", "not valid"),
    "not an object": (b"[]", "not valid"),
    "no inputs": ({}, "inputs"),
    "deep": (b'{"inputs":' + b"[" * 100_000, "not valid"),
    "unknown input": ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}, "no input 'x'"),
    "datatype": ({"inputs": [{"name": "mask", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}, "BYTES"),
    "half a text": ({"inputs": [{"name": "mask", "shape": [1, 1], "datatype": "INT64", "data": [1]}]}, "missing"),
    "huge shape": (
        {"inputs": [{"name": "mask", "shape": [1 << 31] * 4, "datatype": "INT64", "data": [1]}]},
        "1 values",
    ),
    "negative shape": ({"inputs": [{"name": "mask", "shape": [-1], "datatype": "INT64", "data": []}]}, "shape"),
    "too large": ({"inputs": [{"name": "mask", "shape": [1], "datatype": "INT64", "data": [1 << 70]}]}, "hold"),
    "float for int": ({"inputs": [{"name": "mask", "shape": [1], "datatype": "INT64", "data": [1.5]}]}, "else"),
    "binary size": (
        {"inputs": [{"name": "mask", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}}]},
        "binary_data_size",
    ),
    "id beyond": (
        {
            "inputs": [
                {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [1, 1 << 40]},
                {"name": "mask", "shape": [1, 2], "datatype": "INT64", "data": [1, 1]},
            ]
        },
        "input_ids holds",
    ),
    "too long": (
        {
            "inputs": [
                {"name": n, "shape": [1, 17], "datatype": "INT64", "data": [1] * 17} for n in ("input_ids", "mask")
            ]
        },
        "1 to 16",
    ),
    "not finite": (
        b'{"inputs":[{"name":"pixel_values","shape":[1,3,8,8],"datatype":"FP32","data":[' + b"1e999," * 191 + b"1]}]}",
        "finite",
    ),
}


@pytest.mark.parametrize("case", BAD_INFER)
def test_bad_tensors_are_refused_with_a_reason(server: Server, case: str) -> None:
    body, why = BAD_INFER[case]
    status, answer = post(server, "/v2/models/looker/infer", body)
    assert status == 400 and why in answer["error"], answer


@pytest.mark.parametrize(
    ("fields", "status", "why"),
    [
        ({"image": b"no image", "text": "what"}, 400, "cannot read the image"),
        ({"image": b"", "text": "what"}, 400, "cannot read"),
        ({"image": b"%!PS-Adobe-3.0 EPSF-3.0\n", "text": "what"}, 400, "cannot read"),
        ({"image": png()}, 400, "needs more"),
        ({"text": " ", "image": png()}, 400, "empty"),
        ({"text": "what " * 40, "image": png()}, 400, "tokens"),
        ({"audio": b"RIFF"}, 400, "takes no audio"),
        ({}, 400, ""),
        ({"image": "a string", "text": "what"}, 400, "is not a file"),
        ({"path": "/etc/passwd"}, 400, "has a field"),
        ({"model": "nobody", "text": "what"}, 404, "no model"),
        ({"image": bytes(2_000_000), "text": "what"}, 413, "over 1000000 bytes"),
    ],
)
def test_bad_files_are_refused_with_a_reason(server: Server, fields: dict[str, Any], status: int, why: str) -> None:
    got, answer = ask(server, **fields)
    assert got == status and why in answer["error"], answer


def test_a_decompression_bomb_is_not_decoded(server: Server) -> None:
    bomb = io.BytesIO()
    Image.new("1", (5_000, 5_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    status, answer = ask(server, image=bomb.getvalue(), text="what")
    assert status == 400 and "5000x5000 pixels" in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/models/../../etc/passwd", 404),
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/looker/versions/2", 404),
        ("GET", "/v2/models/looker/infer", 405),
        ("POST", "/v2/repository/models/looker/load", 404),
        ("POST", "/v1/answer", 400),
    ],
)
def test_paths_that_are_not_there(server: Server, method: str, path: str, status: int) -> None:
    answer = HTTP.request(method, f"http://{server.http}{path}")
    assert answer.status == status and json.loads(answer.data)["error"]


def test_a_compressed_body_is_refused(server: Server) -> None:
    assert post(server, "/v2/models/looker/infer", b"x", **{"Content-Encoding": "gzip"})[0] == 400
    assert post(server, "/v2/models/looker/infer", b"x", **{"Inference-Header-Content-Length": "-1"})[0] == 400
    assert post(server, "/v2/models/looker/infer", b"x", **{"Inference-Header-Content-Length": "9"})[0] == 400


raw = st.binary(max_size=200)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "binary_data_size"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["mask", "input_ids", "pixel_values"]) | st.text(max_size=5),
        "shape": st.lists(st.integers(-2, 20), max_size=4) | VALUES,
        "datatype": st.sampled_from(["INT64", "FP32", "BOOL", "BYTES"]),
        "data": st.lists(st.integers(-3, 9), max_size=20) | VALUES,
    }
)
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(
    body=VALUES.map(lambda v: json.dumps(v).encode())
    | raw
    | st.fixed_dictionaries({"inputs": st.lists(TENSOR, max_size=3)}).map(lambda v: json.dumps(v).encode())
)
def test_no_json_breaks_it(server: Server, body: bytes) -> None:
    status, answer = post(server, "/v2/models/looker/infer", body)
    assert status == 200 or (400 <= status < 500 and answer["error"])


@QUICK
@given(body=raw, path=st.sampled_from(["ModelInfer", "ModelReady", "ModelMetadata", "RepositoryModelLoad"]))
def test_no_protobuf_breaks_it(server: Server, body: bytes, path: str) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{path}")
        try:
            call(body, timeout=20)
        except grpc.RpcError as e:
            assert e.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), e


@QUICK
@given(body=raw)
def test_no_bytes_break_it(server: Server, body: bytes) -> None:
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /v2/models/looker/infer HTTP/1.1\r\n" + body + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass


def test_nothing_that_its_schema_allows_or_forbids_breaks_it(server: Server) -> None:
    """Statuses, types and bodies are those of /openapi.json; what it forbids is refused, and nothing is 5xx."""
    operations = [
        o.ok() for o in schemathesis.openapi.from_url(f"http://{server.http}/openapi.json").get_all_operations()
    ]
    assert len(operations) == 12
    for operation in operations:
        given_any = len(operation.body) or len(operation.path_parameters)
        for mode in GenerationMode if given_any else (GenerationMode.POSITIVE,):

            @settings(max_examples=30, deadline=None, suppress_health_check=[*HealthCheck])
            @given(case=operation.as_strategy(generation_mode=mode))
            def holds(case: Any) -> None:
                # A tensor may have the right type and the wrong name.
                case.call_and_validate(excluded_checks=[positive_data_acceptance])

            holds()


def test_it_is_still_there(server: Server) -> None:
    assert alive(server)
    assert not [line for line in server.log if "Traceback" in str(line)]


def test_a_thousand_connections_and_slow_readers(bundle: Path) -> None:
    """Each is answered, or told to come back; those that never finish their request do not keep the others out."""

    async def one(host: str, port: int, body: bytes) -> int:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            head = f"POST /v2/models/looker/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            return int((await reader.readline()).split()[1])
        finally:
            writer.close()

    async def everyone(host: str, port: int) -> list[int]:
        mask = [{"name": n, "shape": [1, 3], "datatype": "INT64", "data": [1, 1, 1]} for n in ("input_ids", "mask")]
        body = json.dumps({"inputs": mask}).encode()
        slow = [await asyncio.open_connection(host, port) for _ in range(100)]
        for _, writer in slow:
            writer.write(b"POST /v2/models/looker/infer HTTP/1.1\r\ncontent-length: 1000\r\n\r\n{")
        found = await asyncio.gather(*(one(host, port, body) for _ in range(1000)))
        for _, writer in slow:
            writer.close()
        return list(found)

    with serving(bundle) as running:
        host, port = running.http.split(":")
        statuses = asyncio.run(asyncio.wait_for(everyone(host, int(port)), 60))
        assert set(statuses) <= {200, 503} and statuses.count(200) >= 500
        assert alive(running)


def test_heads_have_an_end(server: Server) -> None:
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 40_000 + b"\r\n")
        assert b" 431 " in connection.recv(4096)


def test_a_new_bundle_is_taken_without_a_lost_request(bundle: Path, tmp_path: Path) -> None:
    """Through the link `current`, as `edgemm install` moves it; a bundle that is no good changes nothing."""
    for slot, content in (("a", two_modalities()), ("b", two_modalities(2, gain=-3.0))):
        (tmp_path / slot).mkdir()
        (tmp_path / slot / "model.edgemm").write_bytes(content)
    link = tmp_path / "current"
    link.symlink_to("a")
    with serving(link / "model.edgemm", "--model-control-mode", "poll") as running:
        first, versions = ask(running, image=png(), text=QUESTION)[1], []
        stop = threading.Event()

        def keep_asking() -> None:
            while not stop.is_set():
                versions.append(ask(running, image=png(), text=QUESTION))

        asking = threading.Thread(target=keep_asking)
        asking.start()
        (tmp_path / "new").symlink_to("b")
        (tmp_path / "new").replace(link)
        running.wait_for("loaded", 2)
        (tmp_path / "b" / "model.edgemm").write_bytes(b"no bundle")
        running.wait_for("reload refused")
        stop.set()
        asking.join()
        last = ask(running, image=png(), text=QUESTION)[1]
    assert {status for status, _ in versions} == {200}
    assert {answer["model_version"] for _, answer in versions} == {"1", "2"}
    assert (first["model_version"], last["model_version"]) == ("1", "2")
    assert first["answer"] != last["answer"] or first["probability"] != last["probability"]


def test_load_by_request_and_signal(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "looker.edgemm"
    path.write_bytes(two_modalities())
    with serving(path, "--model-control-mode", "explicit") as running:
        client = triton_http.InferenceServerClient(running.http)
        assert client.get_model_repository_index()[0]["version"] == "1"
        path.write_bytes(two_modalities(2))
        client.load_model("looker")
        assert client.get_model_repository_index()[0]["version"] == "2"
        status, answer = post(running, "/v2/repository/models/looker/load", {"parameters": {"config": "{}"}})
        assert status == 400 and "parameters" in answer["error"]
        path.write_bytes(two_modalities(3))
        running.process.send_signal(1)
        running.wait_for("loaded", 3)
        with triton_grpc.InferenceServerClient(running.grpc) as other:
            assert other.get_model_repository_index().models[0].version == "3"


def test_it_ends_cleanly_and_answers_what_it_took(bundle: Path) -> None:
    """Requests that wait (here for more of their batch) when SIGTERM comes are answered."""
    with serving(bundle, "--max-queue-delay-us", "9000000", "--cache-mb", "0") as running:
        answers: list[Any] = []
        asking = [
            threading.Thread(target=lambda i=i: answers.append(ask(running, image=png(i), text=QUESTION)))
            for i in range(4)
        ]
        for thread in asking:
            thread.start()
        while "edgemm_pending 4.0" not in HTTP.request("GET", f"http://{running.http}/metrics").data.decode():
            pass
        assert running.stop() == 0
        for thread in asking:
            thread.join()
        assert [status for status, _ in answers] == [200] * 4
        assert running.wait_for("stopped")


def test_a_full_queue_says_when_to_come_back(bundle: Path) -> None:
    with serving(bundle, "--max-queue-size", "1", "--max-queue-delay-us", "9000000") as running:
        thread = threading.Thread(target=ask, args=(running,), kwargs={"image": png(), "text": QUESTION})
        thread.start()
        while "edgemm_pending 1.0" not in HTTP.request("GET", f"http://{running.http}/metrics").data.decode():
            pass
        files = {"image": ("x", png(5)), "text": QUESTION}
        refused = HTTP.request("POST", f"http://{running.http}/v1/answer", fields=files)
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
        assert running.stop() == 0
        thread.join()


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "edgemm", "serve", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_what_cannot_be_served_is_said(bundle: Path, tmp_path: Path, server: Server) -> None:
    for arguments, code, why in (
        ((tmp_path / "nothing.edgemm",), 2, "nothing.edgemm"),
        ((bundle, bundle), 2, "both of 'looker'"),
        ((bundle, "--port", server.http.split(":")[1]), 2, "cannot listen"),
        ((bundle, "--p99-ms", "0"), 2, "p99_ms"),
        ((bundle, "--priority-levels", "2", "--default-priority", "3"), 2, "default_priority"),
        ((bundle, "--require-signature", bundles.key_pair(tmp_path)[1]), 2, "cannot read signature"),
    ):
        done = command(*arguments, *(() if "--port" in arguments else ("--port", "0")), "--grpc-port", "0")
        assert done.returncode == code and why in done.stderr and "fix:" in done.stderr, done.stderr


def test_a_signed_bundle_is_served(tmp_path: Path) -> None:
    private, public = bundles.key_pair(tmp_path)
    path = bundles.signed(tmp_path / "looker.edgemm", two_modalities(), private)
    with serving(path, "--require-signature", public) as running:
        assert alive(running)
        path.write_bytes(two_modalities(2))  # its signature is another's
        running.process.send_signal(1)
        running.wait_for("reload refused")
        assert ask(running, image=png(), text=QUESTION)[1]["model_version"] == "1"
