"""tools/gpu.py without a GPU: the logic of all parts at toy sizes, limits, crashes, the report."""

import json
import os
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_lines

import kernels
from lumen.errors import UserError
from tools import bench_step, gpu, gpu_parts

PROGRAM = """
    import os, subprocess, sys, time
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from tools import gpu
    os.dup2(2, 1)  # as a part does: what it says goes to the log
    again = {again}
    rows = gpu.Rows(Path({folder!r}), "toy", again)
    rows.header({{"card": "none"}})
"""


@pytest.fixture(autouse=True)
def no_triton(monkeypatch):
    """Its interpreter takes minutes."""
    monkeypatch.setattr(kernels, "triton", None)


def program(folder: Path, body: str):
    """words(again) of a part whose process does that; see gpu.run_part."""

    def words(again: bool) -> list[str]:
        head = textwrap.dedent(PROGRAM).format(root=str(ROOT), folder=str(folder), again=again)
        return [sys.executable, "-c", head + textwrap.dedent(body)]

    return words


def rows_of(folder: Path, part="toy") -> dict[str, dict]:
    return {row["name"]: row for row in gpu.read_rows(folder / f"{part}.jsonl")[1]}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# ---------------------------------------------------------------- the parts


def test_every_part_at_toy_size(tmp_path, capsys):
    assert gpu.main(["--toy", "A", "B", "C", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "failed: none" in said and len(said) < 12_000, "all that comes back of a GPU machine"
    for name in gpu.PARTS:
        header, rows = gpu.read_rows(tmp_path / f"{name}.jsonl")
        assert header["toy"] and header["command"].endswith(f"--out {tmp_path}")
        assert {"card", "driver", "torch", "triton", "commit", "date"} <= header.keys()
        assert rows and all(row["ok"] and not row["error"] for row in rows)
        assert all(row["seconds"] >= 0 and row["part"] == name for row in rows)
    trainer = rows_of(tmp_path, "trainer")
    assert trainer["out of memory: smaller micro-steps"]["value"] == 2
    assert trainer["a NaN gradient is dropped"]["dropped"] == 1
    assert trainer["dense: the same bytes, stopped and resumed"]["value"] is True
    assert rows_of(tmp_path, "compile")["dense, compiled, selective: gradients"]["graphs"] > 0
    edge = rows_of(tmp_path, "kernels")["grouped_mm, fp32: slots without expert"]
    assert edge["detail"] and edge["value"] < 1e-4
    # the report
    assert gpu.main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(f"### {name}\n" in text for name in gpu.PARTS) and "failed" not in text
    assert "slots without expert" not in text, "details are for the file"
    assert "TOY SIZES" in text and "| a NaN gradient is dropped | yes |" in text
    with pytest.raises(UserError, match="toy sizes"):
        gpu.main(["report", str(tmp_path), "--write"])


def test_an_output_that_nobody_writes_is_found(tmp_path, monkeypatch):
    """Where the right answer is 0, fresh memory often looks right."""

    def lazy(x, p, ids, w13, w2, backend):
        unwritten = x.detach().new_empty(x.shape)
        return unwritten + 0 * (x + p.sum() + w13.sum() + w2.sum())

    monkeypatch.setattr(kernels, "run_experts", lazy)
    before = torch.are_deterministic_algorithms_enabled()
    with gpu_parts.Here(gpu.Rows(tmp_path, "kernels", speak=print), toy=True) as here:
        _, shape, ids = gpu_parts.expert_cases(here)[-2]
        error = gpu_parts.expert_error(here, torch.float32, shape, ids, "slices")
    assert error == float("inf")
    assert torch.are_deterministic_algorithms_enabled() == before


def test_few_tiles_are_the_smallest_and_all_come_back_in_their_order(monkeypatch):
    def tile(*sizes):
        return SimpleNamespace(kwargs=dict(zip(("BM", "BN", "BK"), sizes)), num_stages=3)

    tiles = [tile(128, 64, 64), tile(16, 32, 32), tile(256, 64, 64)]
    tuner = SimpleNamespace(configs=list(tiles), cache={"key": 1}, fn=SimpleNamespace())
    around = SimpleNamespace(fn=tuner)  # a decorator
    monkeypatch.setattr(kernels, "triton", "there")
    file = SimpleNamespace(torch=torch, gmm_kernel=around, INTERPRET=False)
    monkeypatch.setitem(sys.modules, "kernels_triton", file)
    assert bench_step.tuners() == [tuner]
    bench_step.few_tiles()
    assert tuner.configs == tiles[1:2] and tuner.cache == {}
    bench_step.few_tiles(False)
    assert tuner.configs == tiles


# ---------------------------------------------------------------- rows


def test_what_fails_is_said_and_the_next_is_tried(tmp_path, capsys, monkeypatch):
    def part(here):
        attempt = here.rows.attempt
        attempt("raises", int, "x", detail=True)
        attempt("is not so", lambda: False)
        attempt("too large", lambda: 0.5, unit="nats", most=0.1)
        attempt("no number", lambda: float("nan"), most=0.1)
        attempt("right", lambda: {"value": 1234567.0, "ms": 1.5}, unit="tokens/s")
        attempt("no | cell", lambda: "a|b", detail=True)
        here.rows.note("not here", "there is none")

    monkeypatch.setattr(gpu_parts, "attention_part", part)
    words = ["--toy", "attention", "generation", "--out", str(tmp_path)]
    assert gpu.main(words) == 1
    said = capsys.readouterr().out
    assert "failed: attention; " in said and "== generation: done" in said
    assert said.count("FAILED ") == 4 and "FAILED raises: ValueError: invalid" in said
    assert "right: 1,234,567 tokens/s (ms 1.5)" in said and "no | cell" not in said
    rows = rows_of(tmp_path, "attention")
    assert [row["ok"] for row in rows.values()] == [False] * 4 + [True] * 3
    assert rows["too large"]["error"] == "0.5, at most 0.1" and rows["no number"]["value"] == "nan"
    text = "\n".join(gpu.report_lines(tmp_path))
    assert "### attention: 4 of 7 failed" in text and "| raises | **failed** | ValueError" in text
    assert "| not here | not tried | there is none |" in text and "Not run: kernels, " in text


def test_a_second_run_of_a_part_takes_the_place_of_the_first(tmp_path):
    for value in (1, 2):
        rows = gpu.Rows(tmp_path, "sync", speak=print)
        rows.header({"card": f"card {value}"})
        rows.attempt("x", lambda value=value: value)
    header, found = gpu.read_rows(tmp_path / "sync.jsonl")
    assert header["card"] == "card 2" and [row["value"] for row in found] == [2]
    assert len(read_lines(tmp_path / "sync.jsonl")) == 4, "the first stays in the file"


def test_the_report_goes_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "gpu.md"
    page.write_text(f"# Page\n{gpu.BEGIN}\nold\n{gpu.END}\nend\n")
    monkeypatch.setattr(gpu, "PAGE", page)
    rows = gpu.Rows(tmp_path, "big", speak=print)
    about = {"card": "H100", "driver": "1", "torch": "2", "triton": "3", "commit": "c", "date": "d"}
    rows.header(about | {"command": "python -m tools.gpu A"})
    rows.attempt("1.3B", lambda: 5.5, unit="tokens/s")
    for _ in range(2):  # writing again changes nothing
        assert gpu.main(["report", str(tmp_path), "--write"]) == 0
        text = page.read_text()
        assert text.startswith(f"# Page\n{gpu.BEGIN}\n### big\n") and text.endswith("\nend\n")
        assert "`python -m tools.gpu A` on H100, driver 1, torch 2, triton 3, commit c, d." in text
        assert "| 1.3B | 5.5 tokens/s |  |" in text and "old" not in text


# ---------------------------------------------------------------- processes


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found by /proc")
def test_a_part_over_its_limit_is_killed_with_its_children(tmp_path, capsys):
    body = """
        rows.attempt("quick", lambda: 1)
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        rows.attempt("child", lambda: child.pid)
        rows.attempt("slow", time.sleep, 600)
    """
    began = time.monotonic()
    assert not gpu.run_part("toy", program(tmp_path, body), 4, tmp_path)
    assert time.monotonic() - began < 60
    rows = rows_of(tmp_path)
    assert rows["quick"]["ok"] and rows["quick"]["value"] == 1, "what it had said stays"
    slow = rows["slow"]
    assert not slow["ok"] and slow["error"] == "cut off at the part's limit, 4 s"
    until = time.monotonic() + 20
    while alive(rows["child"]["value"]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(rows["child"]["value"])
    assert "FAILED slow: cut off" in capsys.readouterr().out


def test_a_part_goes_on_behind_what_has_killed_its_process(tmp_path):
    body = """
        def lost():
            raise RuntimeError("illegal memory access")

        rows.after = lost
        rows.attempt("one", lambda: 1)
        rows.attempt("dies", lambda: os._exit(7))
        rows.attempt("loses its device", lost)
        rows.attempt("last", lambda: os.getpid())
    """
    assert not gpu.run_part("toy", program(tmp_path, body), 60, tmp_path)
    lines = read_lines(tmp_path / "toy.jsonl")
    names = [line.get("name", "header") for line in lines]
    assert names == ["header", "one", "dies", "loses its device", "last"]
    rows = rows_of(tmp_path)
    assert rows["dies"]["error"].startswith("the process ended with 7")
    assert "illegal memory access" in rows["loses its device"]["error"]
    assert rows["one"]["ok"] and rows["last"]["ok"]
    ok = 'rows.attempt("fine", lambda: 1)'
    assert gpu.run_part("toy", program(tmp_path, ok), 60, tmp_path)
    assert not gpu.run_part("toy", program(tmp_path, "pass"), 60, tmp_path), "it has said nothing"


def test_a_part_that_cannot_begin(tmp_path):
    body = 'raise ImportError("no torch")'
    assert not gpu.run_part("toy", program(tmp_path, body), 60, tmp_path)
    assert "ImportError: no torch" in rows_of(tmp_path)["the start"]["error"]
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="attention: device: cuda is not there") as error:
            gpu.main(["attention", "--out", str(tmp_path)])
        assert error.value.code == "E003"


# ---------------------------------------------------------------- the list


def test_the_list_keeps_its_limits():
    """Three calls of at most 5.5 minutes; at most eight files come back of one."""
    assert gpu.CALL_SECONDS <= 330
    for call in gpu.CALLS.values():
        assert sum(call.values()) + gpu.START <= gpu.CALL_SECONDS
        assert len(call) + 1 <= 8
    assert len(gpu.PARTS) == sum(map(len, gpu.CALLS.values()))
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert page.index(gpu.BEGIN) < page.index(gpu.END)
    for name, seconds in gpu.PARTS.items():
        assert callable(gpu.part_of(name))
        assert f"| `{name}` | {seconds} |" in page


def test_unused_seconds_go_to_the_parts_behind(tmp_path, monkeypatch):
    given = {}

    def run(name, words, limit, folder):
        given[name] = limit
        return True

    monkeypatch.setattr(gpu, "run_part", run)
    assert gpu.main(["kernels", "sync", "big", "--out", str(tmp_path)]) == 0
    kernels_, sync, big = (gpu.PARTS[name] for name in ("kernels", "sync", "big"))
    wanted = [kernels_, kernels_ + sync, kernels_ + sync + big]
    assert list(given.values()) == pytest.approx(wanted, abs=1)


def test_the_list_starts_without_torch(tmp_path, monkeypatch):
    """Its own start is on the clock; and each part's command line is one of its own."""
    code = (
        "import sys; from tools import gpu; assert 'torch' not in sys.modules; gpu.options(['A'])"
    )
    assert os.system(f'cd "{ROOT}" && "{sys.executable}" -c "{code}"') == 0
    o = gpu.options(["sync", "--out", str(tmp_path)])
    o.command = "python -m tools.gpu sync"
    words = gpu.part_command("sync", o, True)
    again = gpu.options(words[3:])
    assert again.inside and again.again and again.parts == ["sync"] and again.out == tmp_path
    assert again.command == o.command and json.dumps(again.parts)
