"""python serve.py as a process: what it says, SIGTERM, the end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from conftest import ROOT
from serving import wait
from test_sample import make, save

from lumen import chat
from tools import bench_serve


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "talker"
    save(out, 3, model=make(3, max_seq_len=2048), template=chat.describe("chatml"))
    return str(out)


class Served:
    """A server as a process; its lines come one by one."""

    def __init__(self, run, *options):
        argv = [sys.executable, "serve.py", run, "--port", "0", "--device", "cpu", *options]
        environment = os.environ | {"LUMEN_API_KEY": "from-the-environment"}
        self.process = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("http://"):
                break
        url = self.lines[-1].split()[0]
        key = {"Authorization": "Bearer from-the-environment"}
        self.http = httpx.Client(base_url=url, timeout=60, headers=key)
        self.rest = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self.rest.start()

    def stream(self, received):
        """Text of a reply in the background; the thread."""

        def read():
            body = {"prompt": "a secret", "max_tokens": 1200, "stream": True, "ignore_eos": True}
            with contextlib.suppress(httpx.RemoteProtocolError):
                with self.http.stream("POST", "/v1/completions", json=body) as response:
                    received.extend(line for line in response.iter_lines() if line)

        thread = threading.Thread(target=read)
        thread.start()
        return thread


def test_sigterm_drains_and_a_second_one_ends_at_once(run):
    one = Served(run, "--slots", "2", "--precision", "fp32")
    said = "".join(one.lines)
    assert "step 3" in said and "template chatml" in said and "2 slots of 2048 tokens" in said
    assert httpx.get(one.http.base_url.join("/v1/models")).status_code == 401
    received = []
    reader = one.stream(received)
    wait(lambda: received)
    one.process.send_signal(signal.SIGTERM)
    wait(lambda: one.http.get("/health").status_code == 503)
    response = one.http.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert response.json()["error"]["message"].startswith("E503")
    reader.join(60)
    assert received[-1] == "data: [DONE]"
    assert json.loads(received[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert one.process.wait(60) == 0
    one.rest.join(20)
    assert "closing: 1 sequences" in one.lines[-1] and "secret" not in "".join(one.lines)


@pytest.mark.nightly
def test_a_second_signal_ends_at_once(run):
    two = Served(run)
    received = []
    reader = two.stream(received)
    wait(lambda: received)
    two.process.send_signal(signal.SIGINT)
    wait(lambda: any("closing" in line for line in two.lines))
    two.process.send_signal(signal.SIGINT)
    assert two.process.wait(20) == 130
    reader.join(20)
    two.rest.join(20)


@pytest.mark.nightly
def test_the_load_test_finds_nothing(run, tmp_path, capfd):
    out = tmp_path / "found.json"
    words = [run, "--clients", "20", "--seconds", "8", "--slots", "2", "--queue", "10"]
    assert bench_serve.main([*words, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    kinds = {name.split(",")[0] for name in found["by_kind"]}
    assert found["n_faults"] == 0 and {"whole", "stream", "leaves"} <= kinds
