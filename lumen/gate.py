"""Where a server listens, and who may speak to it: the key, and what browsers are kept from.

A server without a key is the user's own, on 127.0.0.1. But every page that the user's browser
shows may send requests there. Two things stop it: a request with the Origin of another page is
refused, and so is one whose Host is not this machine: a page whose name was made to point to
127.0.0.1 (DNS rebinding) is of our own origin to the browser, but its name stays in Host.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

from lumen.errors import UserError
from lumen.refused import Refused, to_json

OPEN = ("/health", "/")  # without a key: the page asks for it
MOST_CONNECTIONS = 1024
NAME = re.compile(rb"[A-Za-z0-9-]+(, ?[A-Za-z0-9-]+)*")
HEADERS = {b"x-content-type-options": b"nosniff", b"cache-control": b"no-store"}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to it."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket of its own, before anything long is read: a port in use is said at once. E002."""
    if not 0 <= port <= 65535:  # the system would take it modulo 65536
        raise UserError("E002", f"--port {port} is out of range; it must be 0 to 65535")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it would let two servers have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "this is no name of a machine"
        text = f"--host {host} --port {port}: {reason}; --port 0 takes any that is free"
        raise UserError("E002", text) from None
    return found


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_key(key: str | None, host: str, cors: list[str]) -> None:
    """E504: everybody could use this server, or the key is none that a header can carry."""
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        text = "--api_key (or LUMEN_API_KEY): letters, digits and signs of ASCII, without blanks"
        raise UserError("E504", f"{text} around it, not empty")
    if key is None and not is_loopback(host):
        text = f"--host {host} lets others use this server: give it a key, in LUMEN_API_KEY or"
        raise UserError("E504", f"{text} with --api_key, or stay with 127.0.0.1")
    for origin in cors:
        if origin == "*" and key is None:
            text = "--cors '*' without --api_key lets every page in your browser use this server"
            raise UserError("E504", f"{text}: name the page, or give a key")
        if origin != "*" and origin_of(origin) is None:
            text = f"--cors {origin}: an origin is http://name:port or https://name, without a path"
            raise UserError("E504", text)


def origin_of(text: str) -> tuple[str, str, int] | None:
    """(scheme, name, port); None: it is no origin of a page."""
    try:
        parts = urlsplit(text)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    if not port or not parts.hostname or parts.path or parts.query or parts.fragment:
        return None
    return parts.scheme, parts.hostname, port


class Gate:
    """ASGI around `app`. connections: a function, how many are open."""

    def __init__(self, app, gauges, key=None, host="127.0.0.1", cors=(), connections=None):
        self.app = app
        self.gauges = gauges
        self.digest = hashlib.sha256(key.encode()).digest() if key else None
        self.host = host
        self.any_origin = "*" in cors
        self.origins = {origin_of(origin) for origin in cors}
        self.connections = connections or (lambda: 0)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        more = dict(HEADERS)

        async def send_more(message) -> None:
            if message["type"] == "http.response.start":
                self.gauges.answered(scope["path"], message["status"])
                named = {name for name, _ in message["headers"]}
                extra = [(k, v) for k, v in more.items() if k not in named]
                message = message | {"headers": [*message["headers"], *extra]}
            await send(message)

        try:
            more |= self.origin_headers(headers)
            if scope["method"] == "OPTIONS" and b"access-control-allow-origin" in more:
                await send_empty(send_more, self.preflight(headers))
                return
            self.check(scope["path"], headers)
        except Refused as error:
            self.gauges.errors[error.code] += 1
            await send_refused(send_more, error)
            return
        await self.app(scope, receive, send_more)

    def check(self, path: str, headers: dict) -> None:
        if self.connections() > MOST_CONNECTIONS:
            text = f"more than {MOST_CONNECTIONS} connections are open"
            raise Refused("E503", text, status=503, retry_after=5)
        if path == "/health":
            return
        if self.digest is None:
            self.check_host(headers.get(b"host", b"").decode("latin-1"))
        elif path not in OPEN:
            self.check_key(headers.get(b"authorization", b""))

    def check_host(self, given: str) -> None:
        if is_our_host(given, self.host):
            return
        text = f"Host {given[:80]!r} is not this machine, and this server has no key: a page may"
        text += " be behind it (DNS rebinding); use http://127.0.0.1, or start it with --api_key"
        raise Refused("E504", text, status=403)

    def check_key(self, given: bytes) -> None:
        """Both as sha256, so that neither the comparison nor its length takes time by the key."""
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        if scheme.lower() != b"bearer" or not hmac.compare_digest(digest, self.digest):
            text = "send the key of this server: Authorization: Bearer KEY"
            what = "the key is another one" if given else "no key came"
            raise Refused("E504", f"{what}; {text}", status=401, word="invalid_api_key")

    # ------------------------------------------------------------ pages of others

    def origin_headers(self, headers: dict) -> dict[bytes, bytes]:
        """What lets the page that asks read the answer; {} for our own, and for no page. E504: it
        is a page that nobody has let in."""
        given = headers.get(b"origin")
        if given is None:
            return {}
        origin = origin_of(given.decode("latin-1"))
        host = headers.get(b"host", b"").decode("latin-1")
        if origin and origin == origin_of(f"{origin[0]}://{host}"):
            return {}
        if self.any_origin or (origin and origin in self.origins):
            return {
                b"access-control-allow-origin": given,
                b"vary": b"Origin",
                b"access-control-expose-headers": b"Retry-After",
            }
        text = f"a page of {given[:80].decode('latin-1')!r} may not use this server;"
        raise Refused("E504", f"{text} --cors ORIGIN lets it in", status=403)

    def preflight(self, headers: dict) -> dict[bytes, bytes]:
        asked = headers.get(b"access-control-request-headers", b"")
        allowed = asked if NAME.fullmatch(asked) else b"authorization, content-type"
        found = {
            b"access-control-allow-methods": b"GET, POST",
            b"access-control-allow-headers": allowed,
            b"access-control-max-age": b"600",
        }
        if headers.get(b"access-control-request-private-network"):
            found[b"access-control-allow-private-network"] = b"true"
        return found


def is_our_host(given: str, host: str) -> bool:
    """Whether the Host of a request is this machine, or what the server was bound to."""
    name = urlsplit("//" + given).hostname if valid(given) else None
    return bool(name) and (is_loopback(name) or name == host.strip("[]").lower())


def valid(host: str) -> bool:
    try:
        urlsplit("//" + host).port  # noqa: B018 (a port that is none raises)
    except ValueError:
        return False
    return not set(host) & set("/\\@?# ")


async def send_refused(send, error: Refused) -> None:
    data = to_json(error.body())
    headers = [(b"content-type", b"application/json")]
    headers += [(k.lower().encode(), v.encode()) for k, v in error.headers().items()]
    await send_answer(send, error.status, headers, data)


async def send_empty(send, headers: dict[bytes, bytes]) -> None:
    await send_answer(send, 204, list(headers.items()), b"")


async def send_answer(send, status: int, headers: list, data: bytes) -> None:
    if status != 204:
        headers = [*headers, (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
