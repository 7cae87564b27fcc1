"""Requests generated from the server's own description: none fails, each answer is what the description says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from serve_tools import assert_clean, engine

from modicum.serve.openapi import describe
from modicum.serve.server import BackgroundServer, ServerConfig

load_all_checks()
NAMES = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
checks = CHECKS.get_by_names(NAMES)
schema = schemathesis.openapi.from_dict(describe())


@pytest.fixture(scope="module")
def url() -> Any:
    with BackgroundServer(engine(max_sequences=8), ServerConfig(model="tiny", port=0)) as running:
        yield running.url
    assert_clean(running.server.worker.engine)


def checked(case: Any, url: str) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # else all that is generated ends at its name
        if not isinstance(case.body.get("max_tokens"), bool) and isinstance(
            case.body.get("max_tokens"), int | type(None)
        ):
            case.body["max_tokens"] = 4
    case.call_and_validate(base_url=url, checks=checks, timeout=30)


@schema.parametrize()
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_generated_requests(case: Any, url: str) -> None:
    checked(case, url)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_generated_requests(case: Any, url: str) -> None:
    checked(case, url)
