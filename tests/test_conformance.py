"""Every method of every port passes its port's conformance suite."""

from __future__ import annotations

import pytest

from modicum.bench import conformance


@pytest.mark.parametrize(
    ("port", "key", "name"), [pytest.param(*case, id="/".join(case)) for case in conformance.every()]
)
def test_conforms(port: str, key: str, name: str) -> None:
    conformance.check(port, name, key)
