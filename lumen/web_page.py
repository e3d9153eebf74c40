"""Our web pages as they are sent: serve.html by serve.py, lumen/follow.html by lumen/follow.py.

A page is one file with its style and its script inside. What it shows (a model's reply, a run's
texts) may hold anything, so the browser is told to run only what this file held when the server
started: the policy names both by their sha256 (Content Security Policy 3, w3.org/TR/CSP3).
Anything else, a reply's `<script>`, `onerror=` or `javascript:`, or a request to another host, is
refused by the browser, even if the page had a fault.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from lumen.errors import UserError

PAGE = Path(__file__).parents[1] / "serve.html"
POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
SERVED_ONLY = ("connect-src 'self'; ", "frame-ancestors 'none'; ")  # the last: no <meta> may say it
HEADERS = {  # beside the policy
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",  # a page and a policy of two versions would not fit
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
CHARSET = '<meta charset="utf-8">'
DATA = '<pre id="data" hidden></pre>'  # where a page finds what it would else ask its server for


def load(file: Path = PAGE) -> tuple[bytes, dict[str, str]]:
    """The page and the headers of its answer. UserError E108: it cannot be read, or it is not one
    page with one inline style and one inline script."""
    text, policy = read(file)
    return text.encode(), HEADERS | {"Content-Security-Policy": policy}


def alone(file: Path, data: str) -> bytes:
    """The page as a file that needs no server: with its data inside, and a policy by which it may
    ask nobody. The data are text to HTML, whatever stands in them. E108 as in `load`."""
    text, policy = read(file)
    for rule in SERVED_ONLY:
        policy = policy.replace(rule, "")
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    text = text.replace(CHARSET, f"{CHARSET}\n{meta}", 1)
    filled = DATA.replace("><", f">{html.escape(data, quote=False)}<")
    return text.replace(DATA, filled, 1).encode()


def read(file: Path) -> tuple[str, str]:
    """(text, policy) of a page."""
    try:
        # with \n only, as browsers read it: a hash over a Windows checkout's \r\n would not match
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("E108", f"{file}: the page cannot be read: {error}") from None
    hashes = {"script": source(text, "script", file), "style": source(text, "style", file)}
    return text, POLICY.format(**hashes)


def source(text: str, tag: str, file: Path) -> str:
    """How a policy names the only <tag> of a page: "sha256-", the hash of what stands in it."""
    found = re.findall(rf"<{tag}\b([^>]*)>(.*?)</{tag}\s*>", text, re.DOTALL | re.IGNORECASE)
    if len(found) != 1 or found[0][0].strip():
        raise UserError(
            "E108",
            f"{file}: {len(found)} <{tag}>; a page of ours has one, inside the file and without "
            "attributes, for its hash is all that the browser runs",
        )
    digest = hashlib.sha256(found[0][1].encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()
