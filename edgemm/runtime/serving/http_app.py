"""HTTP: the Open Inference Protocol's routes, /v1/answer for files, /metrics and /openapi.json."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgemm.errors import EdgemmError, InputError
from edgemm.runtime.serving.json_protocol import parse, render
from edgemm.runtime.serving.openapi import document
from edgemm.runtime.serving.options import ControlMode
from edgemm.runtime.serving.service import EXTENSIONS, NotFound, Service, one_line
from edgemm.runtime.serving.work import Expired, Failed, Rejected

JSON_SIZE = "inference-header-content-length"
MEDIA = ("image", "audio")
FIELDS = 8
LINGER = 4  # times the limit are read and thrown away, for a client that hears nothing before it has sent all
log = structlog.get_logger("edgemm.serve")
Handler = Callable[[Request], Awaitable[Response]]


class TooLarge(Exception):
    pass


class InMemory(MultiPartParser):
    """Nothing of a request is written to a disk."""

    spool_max_size = 1 << 40


def failure(status: int, why: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": why}, status, headers)


def build(service: Service, version: str, control: ControlMode) -> Starlette:
    """The ASGI application."""
    limits, metrics = service.limits, service.metrics
    most = limits.body_mb * 1_000_000

    async def body_of(request: Request) -> bytes:
        """The whole body; raises TooLarge, TimeoutError, or InputError for one that is compressed."""
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise InputError(f"content-encoding is {encoding[:80]}", fix="send the request as it is")
        thrown = 0

        async def read() -> bytes:
            nonlocal thrown
            content, size = bytearray(), int(request.headers.get("content-length", 0))  # digits: the parser saw to it
            async for chunk in request.stream():
                size = max(size, len(content) + len(chunk))
                if size <= most:
                    content += chunk
                elif (thrown := thrown + len(chunk)) > LINGER * most:
                    break
            if size > most:
                raise TooLarge
            return bytes(content)

        return await asyncio.wait_for(read(), limits.body_s)

    def answered(handler: Handler) -> Handler:
        """Turn what goes wrong into a status and a reason, and count it."""

        async def handle(request: Request) -> Response:
            response = await respond(request)
            name = getattr(request.state, "model", request.path_params.get("model", ""))
            label = name if name in service.models else ""
            metrics.requests.labels(label, "http", str(response.status_code)).inc()
            if response.status_code >= 400:
                why = bytes(response.body).decode()
                log.info("refused", protocol="http", path=request.url.path, status=response.status_code, why=why)
            return response

        async def respond(request: Request) -> Response:
            close = {"connection": "close"}
            try:
                return await handler(request)
            except InputError as e:
                return failure(400, one_line(e))
            except NotFound as e:
                return failure(404, str(e))
            except TooLarge:
                return failure(413, f"the body has over {most} bytes", close)
            except (TimeoutError, asyncio.TimeoutError):  # one class from Python 3.11 on
                return failure(408, f"the body was not there within {limits.body_s:g} s", close)
            except ClientDisconnect:
                return failure(400, "the client has gone", close)
            except Rejected as e:
                return failure(503, f"{e}; try again", {"retry-after": str(round(e.retry_s))})
            except Expired as e:
                return failure(504, str(e))
            except Failed as e:
                return failure(500, str(e))
            except EdgemmError as e:
                return failure(501, one_line(e))

        return handle

    async def live(request: Request) -> Response:
        return Response(status_code=200)

    async def ready(request: Request) -> Response:
        return Response(status_code=200 if service.ready else 503)

    async def model_ready(request: Request) -> Response:
        service.model(request.path_params["model"], request.path_params.get("version", ""))
        return Response(status_code=200 if service.ready else 503)

    async def server_metadata(request: Request) -> Response:
        return JSONResponse({"name": "edgemm", "version": version, "extensions": EXTENSIONS})

    async def model_metadata(request: Request) -> Response:
        model = service.model(request.path_params["model"], request.path_params.get("version", ""))
        return JSONResponse(service.metadata(model))

    async def infer(request: Request) -> Response:
        model = service.model(request.path_params["model"], request.path_params.get("version", ""))
        body = await body_of(request)
        size = request.headers.get(JSON_SIZE)
        if size is not None and not (size.isascii() and size.isdecimal() and len(size) < 16):
            raise InputError(f"Inference-Header-Content-Length is {size[:80]!r}", fix="give a number of bytes")
        parsed, asked = parse(body, None if size is None else int(size))
        found = await service.infer(model, asked)
        content, json_size = render(model, parsed, found)
        if json_size is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={JSON_SIZE: str(json_size)}, media_type="application/octet-stream")

    async def answer(request: Request) -> Response:
        kind = request.headers.get("content-type", "")
        if not kind.startswith("multipart/form-data"):
            raise InputError(
                f"content-type is {kind[:80]!r}", fix="send multipart/form-data: image, audio, text, boxes"
            )
        body = await body_of(request)

        async def chunks() -> AsyncGenerator[bytes, None]:
            yield body

        try:
            form = await InMemory(
                request.headers, chunks(), max_files=len(MEDIA), max_fields=FIELDS, max_part_size=most
            ).parse()
        except (MultiPartException, KeyError, ValueError) as e:
            why = e.message if isinstance(e, MultiPartException) else "it has no boundary, or is not of this encoding"
            raise InputError(f"the form can't be read: {why}"[:300], fix="send it as curl -F does") from e
        media: dict[str, bytes | str] = {}
        named: dict[str, str] = {}
        for field, value in form.multi_items():
            if field in media or field in named or field not in (*MEDIA, "text", "boxes", "model"):
                raise InputError(
                    f"the form has a field {field[:80]!r}", fix="give image, audio, text, boxes, model, once"
                )
            if (field in MEDIA) != isinstance(value, UploadFile):
                what = "a file" if field in MEDIA else "text"
                raise InputError(f"{field} is not {what}", fix=f"give {field} as {what}")
            if isinstance(value, UploadFile):
                media[field] = await value.read()
            elif field == "text":
                media[field] = value
            else:
                named[field] = value
        if "model" not in named and len(service.models) > 1:
            raise InputError("the form names no model", fix=f"give model: {', '.join(service.models)}")
        model = service.model(named.get("model", next(iter(service.models))))
        request.state.model = model.name
        made = await service.answer(model, media, named.get("boxes"))
        return JSONResponse({**made, "model_name": model.name, "model_version": model.version})

    async def index(request: Request) -> Response:
        return JSONResponse([{"name": m.name, "version": m.version, "state": "READY"} for m in service.models.values()])

    async def load(request: Request) -> Response:
        model = service.model(request.path_params["model"])
        if (await body_of(request)).strip() not in (b"", b"{}"):
            raise InputError("a load request brings parameters", fix="leave them out: the bundle says it all")
        await run_in_threadpool(service.reload, model.name)
        return Response(status_code=200)

    async def openapi(request: Request) -> Response:
        return JSONResponse(document(version, service.models.values(), loads=control == "explicit"))

    async def show_metrics(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return failure(error.status_code, error.detail, dict(error.headers or {}))

    routes = [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server_metadata),
        Route("/v2/repository/index", answered(index), methods=["POST"]),
        Route("/v1/answer", answered(answer), methods=["POST"]),
        Route("/metrics", show_metrics),
        Route("/openapi.json", openapi),
    ]
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route(f"{path}/infer", answered(infer), methods=["POST"]),
            Route(f"{path}/ready", answered(model_ready)),
            Route(path, answered(model_metadata)),
        ]
    if control == "explicit":
        routes.append(Route("/v2/repository/models/{model}/load", answered(load), methods=["POST"]))
    return Starlette(routes=routes, exception_handlers={HTTPException: on_http_error})
