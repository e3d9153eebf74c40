"""The page that follows runs, in a real browser. By hand, as tests/runs/test_web_chat.py is:

apt-get install chromium && pip install playwright
python -m pytest -m nightly tests/runs/test_follow_page.py        # SHOTS=DIR keeps screenshots"""

import json
import math
import threading
from contextlib import contextmanager

import pytest
from test_web_chat import browser, shot, until  # noqa: F401 - browser is a fixture

from lumen import follow

pytestmark = pytest.mark.nightly
HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>"


def rows(first, last, attempt=1):
    for step in range(first, last, 10):
        row = {"step": step, "loss": 3 + math.exp(-step / 900), "lr": 1e-3, "tokens": step * 100}
        row |= {"grad_norm": 1.0, "tokens_per_second": 1e5, "health": "warning"}
        row |= {"health_causes": [HOSTILE], "experts/dead": 1, "attempt": attempt}
        yield row | {f"experts/share/{i}": [0.6, 0.39, 0.01, None] for i in range(3)}
    yield {"step": last, "val_loss": 3.5}


def write(out, *parts):
    with open(out / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for part in parts for row in part)


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "<i>run"
    out.mkdir()
    (out / "status.json").write_text('{"state": "running", "code": 0, "attempt": 2}')
    (out / "owner.json").write_text("{}")
    (out / "config.yaml").write_text("max_steps: 10000\n")
    write(out, rows(10, 3000), rows(2500, 4000, 2))
    decision = {"id": 1, "turn": 5, "step": 2000, "attempt": 1, "mode": "act", "level": 2}
    decision |= {"time": "12:00", "trigger": "divergence", "action": "rollback", "executed": True}
    decision |= {"reason": HOSTILE, "confidence": 1.0, "basis": "observed", "blocked_by": None}
    (out / "decisions.jsonl").write_text(json.dumps(decision) + "\n")
    return out


@contextmanager
def opened(browser, url, size=(1300, 1500)):  # noqa: F811
    """The page, drawn. Afterwards: it threw nothing, broke no rule of its policy, asked nobody
    else, and nothing of a run became HTML."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(f"threw {error}"))
    page.on("dialog", lambda dialog: said.append("a dialog") or dialog.accept())
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    until(page, "document.querySelectorAll('#charts svg').length === 4")
    yield page
    assert not [text for text in said if not text.startswith("Failed to load resource")]
    assert all(one.startswith(url) or one.startswith("data:") for one in asked)
    assert not page.locator("i, img").count()
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    context.close()


def test_a_run_is_followed(browser, run):  # noqa: F811
    other = run.parent / "other"
    other.mkdir()
    write(other, rows(10, 500))
    with follow.Server(follow.Runs([str(run), str(other)]), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with opened(browser, f"http://127.0.0.1:{server.socket.getsockname()[1]}/") as page:
            cards = page.locator("#runs label")
            assert "4000 of 10000 steps" in cards.nth(0).inner_text()
            assert f"warning: {HOSTILE}" in cards.nth(0).inner_text()
            assert "no sign of life" not in cards.nth(0).inner_text()
            assert page.locator("#charts polyline.val_loss").count() == 2
            assert page.locator("#charts .lost").count() == 4 * 50 + 1  # validation's too
            assert (
                page.locator("#charts line.level2 title").first.text_content().startswith("<i>run")
            )
            assert HOSTILE in page.inner_text("#decisions")
            red = "[...canvas.getContext('2d').getImageData(50, 5, 1, 1).data.slice(0, 3)]"
            canvas = "document.querySelector('canvas')"
            assert page.evaluate(red.replace("canvas", canvas, 1)) == [210, 59, 59]
            page.locator("canvas").first.hover(position={"x": 50, "y": 30})
            assert "layer 1, expert 2: 0.03 of a fair share" in page.inner_text("#experts")

            picture = page.locator("#charts svg").first
            picture.hover(position={"x": 300, "y": 80})
            assert "3." in page.locator("figcaption").first.inner_text()
            shot(page, "follow")
            write(run, rows(4010, 5000, 2))
            until(page, "data.runs[0].step === 5000")
            assert "5000 of 10000 steps" in cards.nth(0).inner_text()
            box = picture.bounding_box()
            page.mouse.move(box["x"] + 200, box["y"] + 80)
            page.mouse.down()
            page.mouse.move(box["x"] + 400, box["y"] + 80)
            page.mouse.up()
            assert page.evaluate("0 < zoom[0] && zoom[0] < zoom[1] && zoom[1] < 5000")
            picture.dblclick()
            assert page.evaluate("zoom") is None
            cards.nth(0).locator("input").uncheck()
            assert page.locator("#charts polyline.loss").count() == 1
            server.shutdown()
            server.server_close()
            until(page, "document.querySelector('#note').textContent.startsWith('no answer')")


def test_a_file_needs_nobody(browser, run):  # noqa: F811
    file = run.parent / "page.html"
    follow.write([str(run)], str(file))
    with opened(browser, file.as_uri(), size=(380, 900)) as page:
        assert page.inner_text("#note").startswith("as of 20")
        assert HOSTILE in page.inner_text("#decisions")
        assert page.locator("canvas").count() == 1
        shot(page, "follow_file")
