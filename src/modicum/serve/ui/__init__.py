"""The chat page of `modicum serve --ui`: one HTML file with its styles and script inside.

Nothing on it comes from elsewhere, and its Content-Security-Policy holds it to that: the one script and the
one style sheet run by their hashes, requests go to this server alone, and text never becomes markup
(`require-trusted-types-for` makes the browser refuse innerHTML and its like).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

FILE = Path(__file__).with_name("index.html")


@functools.cache
def page() -> bytes:
    return FILE.read_bytes()


@functools.cache
def headers() -> dict[str, str]:
    """HTTP headers that the page is sent with."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script"),
        "style-src": _hashes("style"),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }


def _hashes(tag: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in bodies)
