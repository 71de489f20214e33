"""The chat page: one file, which may load and run nothing but what is in it."""

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.responses import HTMLResponse


@functools.cache
def _content() -> tuple[str, str]:
    """The page, and the policy that browsers are to hold it to."""
    text = files("dsjax.serving").joinpath("page.html").read_text(encoding="utf-8")
    allowed = {
        element: " ".join(
            f"'sha256-{_digest(found)}'" for found in re.findall(f"<{element}>(.*?)</{element}>", text, re.S)
        )
        for element in ("script", "style")
    }
    policy = {
        "default-src": "'none'",
        "script-src": allowed["script"],
        "style-src": allowed["style"],
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in policy.items())


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page() -> HTMLResponse:
    """Return the page."""
    text, policy = _content()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)
