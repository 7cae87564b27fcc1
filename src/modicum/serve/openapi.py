"""`/openapi.json`: the server's own description (OpenAPI 3.1), made from the bodies that it parses."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from modicum.serve.embeddings import EmbeddingsBody
from modicum.serve.schema import Body, ChatBody, CompletionBody, SearchBody

BODIES: Mapping[str, tuple[type[Body], str]] = {
    "/v1/completions": (CompletionBody, "Complete a prompt."),
    "/v1/chat/completions": (ChatBody, "Answer a conversation."),
    "/v1/embeddings": (EmbeddingsBody, "Texts to vectors."),
    "/v1/search": (SearchBody, "The best passages of the index."),
}
READS: Mapping[str, str] = {"/v1/models": "The models that are served.", "/health": "Whether requests are accepted."}
STREAMED = ("/v1/completions", "/v1/chat/completions")
ERRORS: Mapping[str, str] = {
    "400": "The request cannot be served as given; `param` names the field.",
    "401": "The API key is missing or wrong.",
    "403": "A local server does not answer to this host name.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "429": "Too many requests wait.",
    "500": "The engine failed.",
    "503": "The server is shutting down.",
}
TEXT = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": TEXT, "code": TEXT},
        }
    },
}


def describe() -> dict[str, Any]:
    """The description as JSON values."""
    schemas: dict[str, Any] = {"Error": ERROR}
    paths: dict[str, Any] = {}
    for path, (body, summary) in BODIES.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": _json({"$ref": f"#/components/schemas/{body.__name__}"})},
                "responses": _responses(path in STREAMED),
            }
        }
    for path, summary in READS.items():
        paths[path] = {"get": {"summary": summary, "responses": _responses(False)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "modicum", "version": importlib.metadata.version("modicum")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _responses(streamed: bool) -> dict[str, Any]:
    content = _json({"type": "object"}) | ({"text/event-stream": {}} if streamed else {})
    errors = {
        status: {"description": text, "content": _json({"$ref": "#/components/schemas/Error"})}
        for status, text in ERRORS.items()
    }
    return {"200": {"description": "Done.", "content": content}} | errors


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": dict(schema)}}
