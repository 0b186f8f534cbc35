"""gRPC: the Open Inference Protocol's service, with Triton's stream and repository calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import structlog
from google.protobuf.message import DecodeError

from edgemm.errors import EdgemmError, InputError
from edgemm.runtime.query import Array
from edgemm.runtime.serving.checks import DATATYPES
from edgemm.runtime.serving.json_protocol import MAX_NAMES, from_bytes
from edgemm.runtime.serving.messages import METHODS, SERVICE, message
from edgemm.runtime.serving.options import ControlMode
from edgemm.runtime.serving.service import EXTENSIONS, Inference, NotFound, Service, one_line
from edgemm.runtime.serving.work import Expired, Failed, Rejected

log = structlog.get_logger("edgemm.serve")
CONTENTS = {"FP32": "fp32_contents", "INT64": "int64_contents", "INT32": "int_contents", "BOOL": "bool_contents"}
CODES = (
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Rejected, grpc.StatusCode.UNAVAILABLE),
    (Expired, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Failed, grpc.StatusCode.INTERNAL),
    (EdgemmError, grpc.StatusCode.UNIMPLEMENTED),
)
FAILURES = tuple(kind for kind, _ in CODES)
_Response = {name: message(f"{name}Response") for name in METHODS}


class Servicer:
    """One method for each call: a request's message to its response's."""

    def __init__(self, service: Service, version: str, control: ControlMode) -> None:
        self.service, self.version, self.control = service, version, control

    async def server_live(self, request: Any) -> Any:
        return _Response["ServerLive"](live=True)

    async def server_ready(self, request: Any) -> Any:
        return _Response["ServerReady"](ready=self.service.ready)

    async def model_ready(self, request: Any) -> Any:
        self.service.model(request.name, request.version)
        return _Response["ModelReady"](ready=self.service.ready)

    async def server_metadata(self, request: Any) -> Any:
        return _Response["ServerMetadata"](name="edgemm", version=self.version, extensions=EXTENSIONS)

    async def model_metadata(self, request: Any) -> Any:
        return _Response["ModelMetadata"](**self.service.metadata(self.service.model(request.name, request.version)))

    async def model_infer(self, request: Any) -> Any:
        model = self.service.model(request.model_name, request.model_version)
        asked = Inference(_inputs(request), [o.name for o in request.outputs], _parameters(request.parameters))
        found = await self.service.infer(model, asked)
        response = _Response["ModelInfer"](model_name=model.name, model_version=model.version, id=request.id)
        for name, value in found.items():
            response.outputs.add(name=name, datatype=DATATYPES[value.dtype.name], shape=value.shape)
            response.raw_output_contents.append(np.ascontiguousarray(value).tobytes())
        return response

    async def model_stream_infer(self, request: Any) -> Any:
        try:
            return _Response["ModelStreamInfer"](infer_response=await self.model_infer(request))
        except FAILURES as e:
            return _Response["ModelStreamInfer"](error_message=one_line(e))

    async def repository_index(self, request: Any) -> Any:
        models = [{"name": m.name, "version": m.version, "state": "READY"} for m in self.service.models.values()]
        return _Response["RepositoryIndex"](models=models)

    async def repository_model_load(self, request: Any) -> Any:
        if self.control != "explicit":
            raise InputError("models are not loaded by request", fix="edgemm serve --model-control-mode explicit")
        if request.parameters:
            raise InputError("a load request brings parameters", fix="leave them out: the bundle says it all")
        model = self.service.model(request.model_name)
        await asyncio.get_running_loop().run_in_executor(None, self.service.reload, model.name)
        return _Response["RepositoryModelLoad"]()


def _inputs(request: Any) -> dict[str, Array]:
    """Tensors by name; InputError where they break the protocol."""
    raw = request.raw_input_contents
    if len(request.inputs) > MAX_NAMES or (raw and len(raw) != len(request.inputs)):
        raise InputError(
            f"there are {len(request.inputs)} inputs and {len(raw)} raw contents",
            fix="give as many of both, or none raw",
        )
    inputs: dict[str, Array] = {}
    for i, tensor in enumerate(request.inputs):
        if tensor.name in inputs:
            raise InputError(f"input {tensor.name[:80]!r} is there twice", fix="give it once")
        shape = list(tensor.shape)
        if raw:
            if tensor.HasField("contents"):
                raise InputError(f"input {tensor.name[:80]!r} has raw and typed contents", fix="give one of them")
            content = raw[i]
        else:
            field = CONTENTS.get(tensor.datatype)
            values = getattr(tensor.contents, field) if field else []
            dtypes = {"FP32": "<f4", "INT64": "<i8", "INT32": "<i4", "BOOL": "?"}
            content = np.array(values, dtypes.get(tensor.datatype, "<f4")).tobytes()
        inputs[tensor.name] = from_bytes(tensor.name, tensor.datatype, shape, content)
    return inputs


def _parameters(given: Any) -> dict[str, Any]:
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in given.items()}
    return {name: getattr(given[name], kind) for name, kind in chosen.items() if kind}


def build(service: Service, version: str, control: ControlMode) -> grpc.aio.Server:
    """The server, not started. Limits are those of HTTP; a slow reader is held back by the library's own windows."""
    limits, metrics = service.limits, service.metrics
    servicer = Servicer(service, version, control)

    def parse(kind: Any, content: bytes) -> Any:
        try:
            return kind.FromString(content)
        except DecodeError as e:
            raise InputError("the message can't be read", fix="send it as the protocol has it") from e

    def snake(name: str) -> str:
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")

    def unary(name: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        kind, method = message(f"{name}Request"), getattr(servicer, snake(name))

        async def call(content: bytes, context: Any) -> bytes:
            model = ""
            try:
                request = parse(kind, content)
                model = getattr(request, "model_name", "") or getattr(request, "name", "")
                response: bytes = (await method(request)).SerializeToString()
            except FAILURES as e:
                code = next(code for kind, code in CODES if isinstance(e, kind))
                count(model, code.name)
                log.info("refused", protocol="grpc", call=name, status=code.name, why=one_line(e))
                if isinstance(e, Rejected):
                    context.set_trailing_metadata((("retry-after", str(round(e.retry_s))),))
                await context.abort(code, one_line(e))
            count(model, "OK")
            return response

        return call

    def stream(name: str) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]:
        kind, method = message("ModelInferRequest"), getattr(servicer, snake(name))

        async def call(contents: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for content in contents:
                try:
                    request = parse(kind, content)
                except InputError as e:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, one_line(e))
                yield (await method(request)).SerializeToString()

        return call

    def count(model: str, code: str) -> None:
        metrics.requests.labels(model if model in service.models else "", "grpc", code).inc()

    handlers = {
        name: grpc.stream_stream_rpc_method_handler(stream(name))
        if streams
        else grpc.unary_unary_rpc_method_handler(unary(name))
        for name, streams in METHODS.items()
    }
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limits.body_mb * 1_000_000),
            ("grpc.max_metadata_size", limits.header_bytes),
            ("grpc.max_connection_idle_ms", limits.idle_s * 1000),
            ("grpc.server_handshake_timeout_ms", round(limits.header_s * 1000)),
            ("grpc.max_concurrent_streams", limits.connections),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=limits.connections,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    return server
