"""A request that is not answered, and what its client is told: OpenAI's shape of an error."""

from __future__ import annotations

import json

from lumen.errors import UserError

TYPES = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}


class Refused(UserError):
    """status: of HTTP; param: the field that is wrong; word: what OpenAI calls it, as clients may
    look for; retry_after: seconds."""

    def __init__(self, code: str, text: str, status=400, param=None, word=None, retry_after=None):
        super().__init__(code, text)
        self.status = status
        self.param = param
        self.word = word
        self.retry_after = retry_after

    def body(self) -> dict:
        """The code stands before the message, and where OpenAI has no word of its own."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": f"{self.code}: {self.text}",
            "type": TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.word or self.code,
        }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after:
            found["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def refused(error: UserError) -> Refused:
    """Any error of ours as an answer."""
    return error if isinstance(error, Refused) else Refused(error.code, error.text)


def to_json(value) -> bytes:
    """Lone surrogates, which a client may send in JSON, are no UTF-8: they come back as "?"."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")
