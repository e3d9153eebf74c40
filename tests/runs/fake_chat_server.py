"""A server for the web chat's tests: serve.py's routes with scripted answers, on 127.0.0.1."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lumen import web_page

MODEL = {"id": "out/chat", "object": "model", "context": 2048, "conversations": True}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/":
            body, headers = web_page.load()
            self.whole(200, body, headers)
        elif self.refused():
            return
        elif self.path == "/v1/models":
            self.json(200, {"object": "list", "data": [self.server.model]})
        else:
            self.error(404, "no such route")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.refused():
            self.server.asked.append((self.path, body))
            self.server.answer(self)

    def refused(self) -> bool:
        """Whether the key is missing or wrong; then that was said."""
        wanted = self.server.key
        if wanted is None or self.headers["Authorization"] == f"Bearer {wanted}":
            return False
        self.error(401, "a key is needed", "E504")
        return True

    def log_message(self, *args):
        """Nothing: pytest shows what is wrong."""

    # ------------------------------------------------------------ answers

    def whole(self, status: int, body: bytes, headers: dict):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, value, **headers):
        self.whole(
            status, json.dumps(value).encode(), {"Content-Type": "application/json"} | headers
        )

    def error(self, status: int, message: str, code="E505", **headers):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self.json(status, {"error": error}, **headers)

    def begin(self):
        """The headers of a stream; it ends with the connection."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def event(self, data):
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def piece(self, text=None, finish=None, **delta):
        chat = self.path.endswith("/chat/completions")
        choice = {"index": 0, "finish_reason": finish}
        if chat:
            choice["delta"] = delta if text is None else delta | {"content": text}
        else:
            choice["text"] = text or ""
        self.event({"object": "chat.completion.chunk", "choices": [choice]})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.model = dict(MODEL)
        self.key = None
        self.asked = []  # (path, body) of each request
        self.gone = threading.Event()  # a client went before its stream ended
        self.answer = says("Good day.")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


@contextmanager
def serving(port=0):
    server = Server(port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------- scripted answers


def says(*pieces: str, finish="stop", gate: threading.Semaphore | None = None):
    """An answer that streams `pieces`; before each it waits for `gate`, if there is one."""

    def answer(handler: Handler):
        handler.begin()
        try:
            handler.piece(role="assistant")
            for piece in pieces:
                if gate:
                    gate.acquire(timeout=20)
                handler.piece(piece)
            handler.piece(finish=finish)
            used = {"prompt_tokens": 10, "completion_tokens": len(pieces)}
            used["total_tokens"] = 10 + len(pieces)
            handler.event({"choices": [], "usage": used})
            handler.event("[DONE]")
        except OSError:
            handler.server.gone.set()

    return answer


def refuses(status: int, message: str, code="E505", **headers):
    return lambda handler: handler.error(status, message, code, **headers)


def breaks_off(handler: Handler):
    handler.begin()
    handler.piece("Half a")


def dies_midway(handler: Handler):
    """As a server that is killed: the stream's chunks have no end."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    text = b'data: {"choices": [{"delta": {"content": "Half a"}}]}\n\n'
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
    handler.close_connection = True


def fails_midway(handler: Handler):
    handler.begin()
    handler.piece("Half a")
    handler.event({"error": {"message": "took longer than 60 s", "code": "E503"}})


def sends_no_json(handler: Handler):
    handler.begin()
    handler.event("<b>oops</b>")


def sends_a_proxy_page(handler: Handler):
    handler.whole(502, b"<html><script>hit = 1</script>Bad gateway", {"Content-Type": "text/html"})
