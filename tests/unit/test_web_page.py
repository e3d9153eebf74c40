"""The web chat's page as it is sent: a policy that fits it, and nothing in it that could bypass
the policy. What it does in a browser: tests/runs/test_web_chat.py."""

import base64
import hashlib
import re

import pytest
from conftest import ROOT

from lumen import web_page
from lumen.errors import UserError

SMALL = "<!doctype html><style>p { color: red }</style><script>\nlet x = 1;\n</script>"


def written(tmp_path, text: str, newline="\n"):
    file = tmp_path / "page.html"
    file.write_text(text, newline=newline)
    return file


def policy(headers: dict) -> dict[str, str]:
    parts = headers["Content-Security-Policy"].split("; ")
    return dict(part.split(" ", 1) for part in parts)


def sha256(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def test_the_policy_names_the_script_and_the_style_and_nothing_else(tmp_path):
    body, headers = web_page.load(written(tmp_path, SMALL))
    assert body == SMALL.encode()
    rules = policy(headers)
    assert rules.pop("script-src") == sha256("\nlet x = 1;\n")
    assert rules.pop("style-src") == sha256("p { color: red }")
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_checkout_with_windows_line_ends_has_the_same_page_and_policy(tmp_path):
    unix = web_page.load(written(tmp_path, SMALL))
    assert web_page.load(written(tmp_path, SMALL, newline="\r\n")) == unix


WRONG = {
    "two scripts": SMALL + "<script>let y</script>",
    "no script": SMALL.replace("script", "p"),
    "no style": SMALL.replace("style", "p"),
    "a script from elsewhere": SMALL.replace("<script>", "<script src='https://x/y.js'>"),
    "a style for print": SMALL.replace("<style>", "<style media=print>"),
    "a script in capitals": SMALL + "<SCRIPT>let y</SCRIPT >",
    "empty": "",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_page_that_its_policy_would_not_cover_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="page.html: ") as error:
        web_page.load(written(tmp_path, text))
    assert error.value.code == "E108"


def test_a_page_that_cannot_be_read_says_so(tmp_path):
    (tmp_path / "bytes.html").write_bytes(b"\xff\xfe<style>")
    for name in ("none.html", "bytes.html", "."):
        with pytest.raises(UserError, match="cannot be read") as error:
            web_page.load(tmp_path / name)
        assert error.value.code == "E108"


FORBIDDEN = {  # what could run a reply's text, or ask another host
    "HTML of text": r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML",
    "code of text": r"\beval\b|new Function|javascript:|setTimeout\(\s*[\"'`]",
    "what the policy refuses": r"<[a-z][^>]*\s(on[a-z]+|style)\s*=",
    "another host": r"(src|href|action)\s*=\s*[\"']?(https?:)?//|url\(|@import|fetch\([\"']http",
}


@pytest.mark.parametrize("pattern", FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_page_never_makes_html_or_code_of_text(pattern):
    assert not re.search(pattern, (ROOT / "serve.html").read_text())


def test_the_only_link_that_the_page_makes_is_the_export():
    text = (ROOT / "serve.html").read_text()
    assert re.findall(r".*href = .*", text) == [
        '  link.href = URL.createObjectURL(new Blob([JSON.stringify(row) + "\\n"]));'
    ]


def test_the_page_is_read_as_the_code_is():
    lines = (ROOT / "serve.html").read_text().split("\n")
    assert len(lines) <= 800
    assert max(map(len, lines)) <= 100
