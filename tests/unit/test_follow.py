"""lumen/follow.py: what is read of runs that train, what the page gets of it, and who may ask. What
the page does in a browser: tests/runs/test_follow_page.py."""

import contextlib
import html
import http.client
import json
import math
import os
import re
import threading

import pytest
from test_web_page import FORBIDDEN, policy, sha256

from lumen import follow, report, web_page
from lumen.errors import UserError

HOSTILE = "</pre></script><script>alert(1)</script><!-- &lt; \u2028 \ud800 \0"


def append(file, *rows):
    with open(file, "ab") as f:
        f.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def row(step, loss=None, **more):
    return {"step": step, "loss": step / 10 if loss is None else loss} | more


def decision(number, step, **changes):
    made = {"id": number, "turn": step, "step": step, "attempt": 1, "mode": "act", "level": 1}
    made |= {"time": "12:00", "trigger": "nonfinite", "action": "drop", "executed": True}
    made |= {"reason": "why", "confidence": 1.0, "basis": "observed", "blocked_by": None}
    return made | changes


def make_run(out, *rows):
    out.mkdir(parents=True)
    (out / "status.json").write_text('{"state": "running", "code": 0, "step": 0, "attempt": 1}')
    append(out / "metrics.jsonl", *rows)
    return out


def read(runs) -> list[dict]:
    return json.loads(runs.read())["runs"]


def loss(runs, which="kept", run=0):
    return read(runs)[run]["curves"]["loss"][which]


# ---------------------------------------------------------------- reading what grows


def test_only_new_bytes_are_read_and_half_a_line_is_not_lost(tmp_path, monkeypatch):
    lines = follow.Lines(tmp_path / "x.jsonl")
    assert list(lines.news()) == [], "it is not there yet"
    append(lines.path, *(row(step) for step in range(1000)))
    assert len(list(lines.news())) == 1000 and list(lines.news()) == []
    parsed = []
    monkeypatch.setattr(follow.json, "loads", lambda line: parsed.append(line) or {})
    whole = b'{"step": 1000, "loss": 1.5}\n'
    for part, found in ((whole[:9], 0), (whole[9:-1], 0), (b"\n" + whole[:3], 1), (b"", 0)):
        with open(lines.path, "ab") as f:
            f.write(part)
        assert len(list(lines.news())) == found
    assert parsed == [whole]


def test_a_file_that_is_another_one_is_read_from_its_beginning(tmp_path):
    out = make_run(tmp_path / "run", row(1), row(2, 7.0), row(3))
    runs = follow.Runs([str(out)])
    assert loss(runs)[0] == [1, 2, 3]
    (out / "metrics.jsonl").unlink()
    assert loss(runs)[0] == [1, 2, 3], "as long as there is nothing else"
    append(out / "metrics.jsonl", *(row(step, 9.0) for step in range(1, 6)))  # longer than before
    assert loss(runs) == [[1, 2, 3, 4, 5], [9.0] * 5] and loss(runs, "lost") == [[], []]
    (out / "metrics.jsonl").write_text(json.dumps(row(1, 9.0)) + "\n")  # shorter, the same head
    assert loss(runs) == [[1], [9.0]]


def test_what_is_no_row_is_passed_over(tmp_path):
    out = make_run(tmp_path / "run", row(1))
    with open(out / "metrics.jsonl", "ab") as f:
        f.write(b'\xff\n[1]\n{"step"\n\n{"loss": 1.0}\n{"step": "2", "loss": 1.0}\n')
        f.write(b'{"step": 2, "loss": NaN}\n{"step": 3, "loss": null, "mfu": 1e999}\n')
    append(out / "metrics.jsonl", row(4))
    append(out / "decisions.jsonl", {"trigger": "of another version"}, decision(1, 2))
    (out / "status.json").write_text("{")
    runs = follow.Runs([str(out)])
    assert loss(runs)[0] == [1, 4]
    assert read(runs)[0]["newest"]["mfu"] is None
    assert len(read(runs)[0]["decisions"]) == 1


def test_what_was_rolled_back_lies_apart(tmp_path):
    out = make_run(tmp_path / "run", row(10), row(20), {"step": 20, "val_loss": 2.0}, row(30, 9.0))
    append(out / "metrics.jsonl", {"step": 30, "val_loss": 9.0}, row(40, 9.0))
    runs = follow.Runs([str(out)])
    assert loss(runs)[0] == [10, 20, 30, 40]
    append(out / "metrics.jsonl", row(30, 3.0))
    run = read(runs)[0]
    assert run["curves"]["loss"] == {"kept": [[10, 20, 30], [1, 2, 3]], "lost": [[40, 30], [9, 9]]}
    assert run["curves"]["val_loss"] == {"kept": [[20], [2]], "lost": [[30], [9]]}, "at once"
    append(out / "metrics.jsonl", row(30, 3.5))
    assert loss(runs)[1][-1] == 3.5, "the last line of a step counts"


@pytest.mark.parametrize("n", [0, 1, 2, 1999, 2000, 2001, 100_000])
def test_thinning_keeps_the_first_the_last_and_the_extremes(n):
    values = [math.sin(i) for i in range(n)]
    if n > 1:
        values[n // 3], values[n // 2] = 1e9, -1e9
    steps, kept = follow.thin(range(0, 10 * n, 10), values)
    assert len(steps) == len(kept) <= 2000 and steps == sorted(set(steps))
    if n <= 2000:
        assert len(steps) == n
        return
    assert (steps[0], steps[-1]) == (0, 10 * n - 10) and len(steps) > 1900
    assert (max(kept), min(kept)) == (1e9, -1e9)
    assert max(b - a for a, b in zip(steps, steps[1:])) < 10 * n / 400, "no gap"


def test_the_newest_shares_of_experts_and_the_length(tmp_path):
    shares = {"experts/share/0": [0.5, None, 0.5], "experts/share/11": [1.0, 0.0, None]}
    out = make_run(tmp_path / "run", row(1, **{"experts/share/0": [1.0]}), row(2, **shares))
    append(out / "metrics.jsonl", {"step": 2, "val_loss": 1.0})
    (out / "config.yaml").write_text("seed: 1\nmax_steps: 850\n")
    run = read(follow.Runs([str(out)]))[0]
    layers = {"0": [0.5, None, 0.5], "11": [1.0, 0.0, None]}
    assert run["experts"] == {"step": 2, "layers": layers} and run["max_steps"] == 850


def test_decisions_with_their_outcomes_and_only_the_newest(tmp_path, monkeypatch):
    out = make_run(tmp_path / "run", row(1))
    told = [decision(1, 5), decision(2, 6), decision(3, 90, executed=False, blocked_by="mode")]
    append(out / "decisions.jsonl", *told)
    runs = follow.Runs([str(out)])
    first, second = read(runs)[0]["decisions"]
    assert first["text"].startswith("step 5 to 6: nonfinite: drop") and first["outcome"] is None
    assert "NOT done: mode" in second["text"] and not second["executed"]
    append(out / "decisions.jsonl", {"kind": "outcome", "id": 3, "verdict": "better", "step": 190})
    assert read(runs)[0]["decisions"][1]["outcome"] == "better"
    monkeypatch.setattr(follow.story, "MOST_TOLD", 1)
    append(out / "decisions.jsonl", decision(4, 300))
    run = read(runs)[0]
    assert [made["step"] for made in run["decisions"]] == [300] and run["earlier"] == 2


def test_the_answer_is_the_same_until_something_is_written(tmp_path):
    out = make_run(tmp_path / "run", row(1))
    runs = follow.Runs([str(out)])
    first = runs.read()
    assert runs.read() == first
    for name, text in (("status.json", '{"state": "finished"}'), ("owner.json", "{}")):
        (out / name).write_text(text)
        assert runs.read() != first
        first = runs.read()


def test_several_runs_have_names_of_their_own(tmp_path):
    folders = [make_run(tmp_path / name, row(1)) for name in ("a/x", "b/x", "b/y")]
    runs = follow.Runs([str(folder) for folder in [*folders, tmp_path / "b" / ".." / "b" / "y"]])
    names = [run["name"] for run in read(runs)]
    assert names == [str(folders[0]), str(folders[1]), "y"], "the same folder once"


def test_a_run_that_has_said_nothing_yet_is_one_and_a_folder_is_none(tmp_path):
    out = make_run(tmp_path / "run")
    (out / "metrics.jsonl").unlink()
    assert loss(follow.Runs([str(out)])) == [[], []]
    for folder in ("none", "."):
        for option in (["--serve", "--port", "0"], ["--html", str(tmp_path / "x.html")]):
            with pytest.raises(UserError, match="is no run, it holds neither") as error:
                report.main([str(out), str(tmp_path / folder), *option])
            assert error.value.code == "E108"
    assert not (tmp_path / "x.html").exists()


# ---------------------------------------------------------------- the server


@contextlib.contextmanager
def serving(*folders, host="127.0.0.1"):
    """ask(path, **headers) -> (status, headers, body)"""
    with follow.Server(follow.Runs([str(f) for f in folders]), host, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def ask(path="/", method="GET", **headers):
            with contextlib.closing(
                http.client.HTTPConnection(*server.socket.getsockname()[:2])
            ) as c:
                c.request(
                    method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
                )
                answer = c.getresponse()
                return answer.status, answer.headers, answer.read()

        yield ask
        server.shutdown()


def test_the_page_and_its_policy(tmp_path):
    with serving(make_run(tmp_path / "run", row(1))) as ask:
        status, headers, body = ask("/?x")
    assert status == 200 and body == follow.PAGE.read_bytes()
    text = body.decode()
    rules = policy(headers)
    for tag in ("script", "style"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        assert rules[f"{tag}-src"] == sha256(inside)
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff" and "Python" not in headers["Server"]


def test_data_come_once_until_there_are_new_ones(tmp_path):
    out = make_run(tmp_path / "run", row(1))
    with serving(out) as ask:
        status, headers, body = ask("/data")
        assert status == 200 and json.loads(body)["runs"][0]["name"] == "run"
        assert headers["Content-Type"] == "application/json"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
        assert ask("/data", If_None_Match=headers["ETag"])[::2] == (304, b"")
        append(out / "metrics.jsonl", row(2))
        status, _, body = ask("/data", If_None_Match=headers["ETag"])
        assert json.loads(body)["runs"][0]["curves"]["loss"]["kept"][0] == [1, 2]


def test_nothing_else_can_be_asked_for(tmp_path):
    out = make_run(tmp_path / "run", row(1))
    (out / "secret.txt").write_text("classified")
    paths = ["/secret.txt", "/run/secret.txt", f"/{out}/secret.txt", "/../secret.txt"]
    paths += ["/data/", "/data/..", "/%2e%2e/secret.txt", "/metrics.jsonl", "*", "x"]
    with serving(out) as ask:
        for path in paths:
            status, _, body = ask(path)
            assert status == 404 and b"E505" in body and b"classified" not in body
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask("/data", method)[0] == 501


FOREIGN = ["evil.example", "evil.example:6006", "127.0.0.1.evil.example", "localhost.evil", ""]
FOREIGN += ["127.0.0.1@evil.example", "192.168.1.1", "[::1", "a b", "127.0.0.1:x"]
OURS = ["127.0.0.1", "127.0.0.1:9", "localhost", "LOCALHOST:6006", "[::1]:6006"]


def test_another_host_is_refused(tmp_path):
    with serving(make_run(tmp_path / "run", row(1))) as ask:
        for path in ("/", "/data", "/x"):
            for host in FOREIGN:
                status, _, body = ask(path, Host=host)
                assert status == 403 and b"E504" in body and b"DNS" in body, host
        assert {ask(Host=host)[0] for host in OURS} == {200}
    with serving(make_run(tmp_path / "run2", row(1)), host="0.0.0.0") as ask:
        assert ask(Host="0.0.0.0:1")[0] == 200 and ask(Host="evil.example")[0] == 403


def test_a_port_in_use_is_said(tmp_path):
    runs = follow.Runs([str(make_run(tmp_path / "run", row(1)))])
    with follow.Server(runs, "127.0.0.1", 0) as server:
        with pytest.raises(UserError, match="--port 0 takes any that is free") as error:
            follow.Server(runs, "127.0.0.1", server.socket.getsockname()[1])
    assert error.value.code == "E002"
    for port in (-1, 65536):
        with pytest.raises(UserError, match="out of range"):
            follow.Server(runs, "127.0.0.1", port)


# ---------------------------------------------------------------- the page, and as a file


def test_a_file_holds_the_data_and_nothing_breaks_out_of_it(tmp_path, capsys):
    out = make_run(tmp_path / "run", row(1, health=HOSTILE))
    append(out / "decisions.jsonl", decision(1, 1, reason=HOSTILE))
    file = tmp_path / "page.html"
    assert report.main([str(out), "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    text = file.read_text(encoding="utf-8")
    page = follow.PAGE.read_text()
    assert text.count("<script") == page.count("<script") == 1
    for tag in ("script", "style", "body"):
        assert text.count(f"</{tag}>") == page.count(f"</{tag}>") == 1
    meta = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)[1]
    rules = dict(part.split(" ", 1) for part in meta.split("; "))
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert rules["script-src"] == sha256(script) and rules["default-src"] == "'none'"
    assert "connect-src" not in rules and "frame-ancestors" not in rules
    inside = re.search(r'<pre id="data" hidden>([^<]+)</pre>', text)[1]
    run = json.loads(html.unescape(inside))["runs"][0]
    kept = HOSTILE.replace("\ud800", "?")
    assert run["newest"]["health"] == kept and kept in run["decisions"][0]["text"]


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    out = make_run(tmp_path / "run", row(1))
    with pytest.raises(UserError, match="--html") as error:
        report.main([str(out), "--html", str(tmp_path)])
    assert error.value.code == "E002"


@pytest.mark.parametrize("pattern", FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_page_never_makes_html_or_code_of_text(pattern):
    text = follow.PAGE.read_text().replace("http://www.w3.org/2000/svg", "")  # SVG's name
    assert not re.search(pattern, text)


def test_the_page_is_read_as_the_code_is():
    lines = follow.PAGE.read_text().split("\n")
    assert len(lines) <= 420 and max(map(len, lines)) <= 100
    assert "\n".join(lines).count(web_page.DATA) == "\n".join(lines).count(web_page.CHARSET) == 1


def test_the_command_takes_one_of_its_forms(tmp_path):
    out = str(make_run(tmp_path / "run", row(1)))
    for words in (
        ["--serve", "--picture"],
        ["--serve", "--html", "x"],
        ["--port", "x"],
        ["--serv"],
    ):
        with pytest.raises(UserError) as error:
            report.main([out, *words])
        assert error.value.code == "E002"
    assert os.listdir(tmp_path) == ["run"]
