"""serve.html as serve.py answers it at GET /: its bytes, and the headers that lock it down.

The page is one file with its style and its script inside. A model's reply may hold anything, so
the browser is told to run only what this file held when the server started: the policy names both
by their sha256 (Content Security Policy 3, w3.org/TR/CSP3). Anything else, a reply's `<script>`,
`onerror=` or `javascript:`, or a request to another host, is refused by the browser, even if the
page had a fault.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from lumen.errors import UserError

PAGE = Path(__file__).parents[1] / "serve.html"
POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {  # beside the policy
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",  # a page and a policy of two versions would not fit
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def load(file: Path = PAGE) -> tuple[bytes, dict[str, str]]:
    """The page and the headers of its answer. UserError E108: it cannot be read, or it is not one
    page with one inline style and one inline script."""
    try:
        # with \n only, as browsers read it: a hash over a Windows checkout's \r\n would not match
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("E108", f"{file}: the web chat cannot be read: {error}") from None
    policy = POLICY.format(script=source(text, "script", file), style=source(text, "style", file))
    return text.encode(), HEADERS | {"Content-Security-Policy": policy}


def source(text: str, tag: str, file: Path) -> str:
    """How a policy names the only <tag> of a page: "sha256-", the hash of what stands in it."""
    found = re.findall(rf"<{tag}\b([^>]*)>(.*?)</{tag}\s*>", text, re.DOTALL | re.IGNORECASE)
    if len(found) != 1 or found[0][0].strip():
        raise UserError(
            "E108",
            f"{file}: {len(found)} <{tag}>; the web chat has one, inside the file and without "
            "attributes, for its hash is all that the browser runs",
        )
    digest = hashlib.sha256(found[0][1].encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()
