"""What the HTTP side speaks, as OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from edgemm.runtime.serving.json_protocol import Request
from edgemm.runtime.serving.model import Model

SCHEMAS = "#/components/schemas/"
BINARY: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
TEXT = {"type": "string"}
OBJECT: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
ERROR = {
    "description": "why not",
    "content": {"application/json": {"schema": {"$ref": f"{SCHEMAS}Error"}}},
}


def document(version: str, models: Collection[Model], *, loads: bool) -> dict[str, Any]:
    """The document of a server of `models`, for JSON; `loads`: whether they can be loaded anew by request."""
    name, versions = {**TEXT, "enum": [m.name for m in models]}, {**TEXT, "enum": sorted({m.version for m in models})}
    files = {part: {"type": "string", "format": "binary"} for part in ("image", "audio")}
    fields = {**files, "text": TEXT, "boxes": TEXT, "model": name}
    form = {"type": "object", "properties": fields, "additionalProperties": False}
    request = Request.model_json_schema(ref_template=f"{SCHEMAS}{{model}}")
    schemas = {
        **request.pop("$defs"),
        "Request": request,
        "Error": {"type": "object", "properties": {"error": TEXT}, "required": ["error"]},
    }
    tensors = {"application/json": {"schema": {"$ref": f"{SCHEMAS}Request"}}}
    model = _parameter("model", name)
    paths: dict[str, Any] = {
        "/v2": {"get": _operation("server metadata", OBJECT)},
        "/v2/health/live": {"get": _operation("the process answers")},
        "/v2/health/ready": {"get": _operation("models are loaded")},
        "/v2/repository/index": {
            "post": _operation("names of the models", {"application/json": {"schema": {"type": "array"}}})
        },
        "/v1/answer": {
            "post": _operation("an answer to files and a text", OBJECT, body={"multipart/form-data": {"schema": form}})
        },
        "/metrics": {"get": _operation("Prometheus metrics", {"text/plain": {"schema": TEXT}})},
    }
    for path, given in (
        ("/v2/models/{model}", [model]),
        ("/v2/models/{model}/versions/{version}", [model, _parameter("version", versions)]),
    ):
        paths |= {
            path: {"parameters": given, "get": _operation("model metadata", OBJECT)},
            f"{path}/ready": {"parameters": given, "get": _operation("the model answers")},
            f"{path}/infer": {
                "parameters": given,
                "post": _operation("outputs of inputs", OBJECT | BINARY, body=tensors | BINARY),
            },
        }
    if loads:
        load = _operation("take the bundle that is on the disk now")
        paths["/v2/repository/models/{model}/load"] = {"parameters": [model], "post": load}
    info = {
        "title": "edgemm",
        "version": version,
        "description": "Open Inference Protocol v2, and /v1/answer for files",
    }
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _operation(
    summary: str, content: dict[str, Any] | None = None, *, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    found = {"200": {"description": summary, **({"content": content} if content else {})}, "4XX": ERROR, "5XX": ERROR}
    return {
        "summary": summary,
        "responses": found,
        **({"requestBody": {"content": body, "required": True}} if body else {}),
    }
