"""What is told of a journey: its plan, a stage's last words, and report.md.

Nothing here knows what a stage does. It looks at what stands in its folder: metrics.jsonl (it
trained), results.json (it evaluated), compare.md; of a stage that left none of these, its log is
what it has to say.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from pathlib import Path

from lumen import files, machine
from lumen.launch import clock, print_now
from lumen.stages import PLANNED, arguments, left_out

SHOWN = 40  # lines of a log in the report, at most
# the first words of what a dry run shows of a training stage
SHOWN_OF_PLAN = ("SIMULATION", "parameters", "length", "time", "memory     about", "smallest")
SHOWN_OF_PLAN += ("checkpoint",)


def tail(path: Path, n: int) -> list[str]:
    """The last lines of a file that may still grow, each with its end; [] where there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 20_000))
            return file.read().decode("utf-8", "replace").splitlines(keepends=True)[-n:]
    except OSError:
        return []


def trained(folder: Path) -> dict:
    """The last evaluation that a run has written down; {}: it is none."""
    rows = files.read_lines(folder / "metrics.jsonl")
    held_out = [row for row in rows if row.get("val_loss") is not None]
    return held_out[-1] if held_out else {}


def said(folder: Path) -> str:
    """A stage's result in a few words."""
    row = trained(folder)
    if not row:
        return ""
    bits = f", {row['val_bpb']:.3f} bits per byte" if row.get("val_bpb") else ""
    return f", val_loss {row['val_loss']:.4f}{bits}{warning(folder)}"


def warning(folder: Path) -> str:
    """What a run's last words say against it."""
    reason = files.read_json(folder / "status.json").get("reason")
    return f"; {reason}" if reason else ""


# ---------------------------------------------------------------- --dry_run


def plan(journey) -> None:
    """A line a stage, and what a planner wants of what the training stages say of themselves."""
    rows, times, sizes = [["stage", "time", "MB", "", "command"]], [], []
    for s in journey.stages:
        what, why, cells = journey.state(s), left_out(s), ["-", "-"]
        if what != "done" and why:
            what = f"left out: {why}"
        else:
            times.append(0.0 if what == "done" else journey.seconds(s) or None)
            sizes.append(journey.rows.get(s.name, {}).get("bytes", 0) / 1e6 or s.mb)
            cells = [a_time(times[-1]), mb(sizes[-1])]
        rows.append([s.name, *cells, what, shlex.join(s.words)])
    known = any(times) or any(sizes)
    if known:
        total = [clock(sum(x or 0.0 for x in times)), mb(sum(sizes))]
        rows.append(["known" if None in times else "in all", *total, "", ""])
    for name, time_, size, *rest in rows:
        print_now("  ".join([name.ljust(12), time_.rjust(7), size.rjust(7), *rest]).rstrip())
    if known:
        print_now("times and sizes: as seen here, or else as the YAML has them from elsewhere")
    if None in times:
        print_now("?          not measured yet: a stage's time is known once it has run here")
    print_now(f"folder     {journey.out}")
    for s in journey.stages:
        if s.script in PLANNED and journey.state(s) != "done":
            plan_training(journey, s)


def a_time(seconds: float | None) -> str:
    return "?" if seconds is None else clock(seconds)


def mb(size: float | None) -> str:
    return f"{size:,.0f}" if size else "?"


def plan_training(journey, s) -> None:
    """Parameters, length, memory and time, as its own --dry_run finds them."""
    more = [f"--{k}={v}" for k, v in (journey.tree.get("plan") or {}).items()]
    words = [s.script, *s.words[s.words.index(s.script) + 1 :], "--dry_run", *more]
    waits = [t.name for t in journey.stages if t.name in s.needs and journey.state(t) != "done"]
    found = subprocess.run(arguments(words), capture_output=True, text=True)
    if found.returncode and waits:
        print_now(f"\n{s.name}: known once {' and '.join(waits)} {be(waits)} done")
        return
    print_now(f"\n{s.name}: all of it by python {shlex.join(words)}")
    if found.returncode:
        print_now(found.stderr.rstrip())
    lines = found.stdout.splitlines()
    for begin in SHOWN_OF_PLAN:
        for line in [line for line in lines if line.startswith(begin)][-1:]:  # the last is measured
            print_now(f"  {line}")


def be(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


# ---------------------------------------------------------------- report.md


def write(journey) -> None:
    """OUT/report.md of a Journey whose stages are done."""
    sections = [stages_table(journey), losses(journey), scores(journey), texts(journey)]
    sections.append(onward(journey))
    lines = [line for section in sections if section for line in (*section, "")]
    with files.replacing(journey.out / "report.md") as file:
        file.write("\n".join(lines).encode())


def stages_table(journey) -> list[str]:
    total = sum(journey.rows[s.name]["seconds"] for s in journey.stages if s.name in journey.rows)
    when = time.strftime("%Y-%m-%d %H:%M")
    where = f"CPU flags {' '.join(machine.cpu_flags())}; commit {machine.git_commit()}, {when}"
    lines = [f"# {journey.path.stem}: {clock(total)}", "", where, ""]
    lines += ["| stage | time | MB | command |", "|---|---|---|---|"]
    for s in journey.stages:
        words = shlex.join(s.words).replace("|", "\\|")
        row = journey.rows.get(s.name)
        if row is None:
            lines.append(f"| {s.name} | - | - | left out: {left_out(s)}; `{words}` |")
            continue
        size = f"{row['bytes'] / 1e6:,.1f}"
        lines.append(f"| {s.name} | {clock(row['seconds'])} | {size} | `{words}` |")
    refused = [line for s in journey.stages if (line := rejected(s))]
    return [*lines, "", *refused] if refused else lines


def rejected(s) -> str:
    """How many rows a preparation has left out, and where they are; "": none, or it is another."""
    report = files.read_json(s.folder / "report.json")
    found = report.get("rejected")
    if not found:
        return ""
    why = "; ".join(f"{row['rows']:,} {code}, {row['meaning']}" for code, row in found.items())
    n = sum(row["rows"] for row in found.values())
    rows = f"{n:,} of {report['counts']['rows']:,} rows left out"
    return f"- {s.name}: {rows}: {s.folder / 'rejected.jsonl'} ({why})"


def losses(journey) -> list[str]:
    lines = ["## Training", "", "| stage | steps | tokens | val loss | bits per byte | tokens/s |"]
    lines.append("|---|---|---|---|---|---|")
    for s in journey.stages:
        if row := trained(s.folder):
            bits = f"{row['val_bpb']:.4f}" if row.get("val_bpb") else "-"
            rows = files.read_lines(s.folder / "metrics.jsonl")
            speeds = sorted(r["tokens_per_second"] for r in rows if r.get("tokens_per_second"))
            speed = f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-"
            cells = [
                s.name + warning(s.folder),
                row["step"],
                f"{row['tokens']:,}",
                f"{row['val_loss']:.4f}",
            ]
            lines.append(f"| {' | '.join(map(str, [*cells, bits, speed]))} |")
    return lines if len(lines) > 4 else []


def scores(journey) -> list[str]:
    """The headlines of every evaluation, a column for each; comparisons below."""
    found = {}
    for s in journey.stages:
        results = files.read_json(s.folder / "results.json")
        if results:
            found[s.name] = results
    if not found:
        return []
    from lumen.scoreboard import from_row, markdown_table, number, scores_in, with_error

    cells, about = {}, {}
    for name, results in found.items():
        for score in map(from_row, scores_in(results)):
            if score.headline:
                what = (score.task, score.metric)
                cells.setdefault(what, {})[name] = with_error(score.value, score.stderr)
                about[what] = [str(score.n), number(score.chance), number(score.majority)]
    rows = [["task", "metric", *found, "n", "chance", "majority"]]
    for what, by_stage in cells.items():
        rows.append([*what, *(by_stage.get(name, "-") for name in found), *about[what]])
    lines = ["## Scores", "", *markdown_table(rows)]
    for s in journey.stages:
        compared = s.folder / "compare.md"
        if compared.exists():
            text = compared.read_text(encoding="utf-8").rstrip()
            lines += ["", text.replace("\n#", "\n##").replace("# ", "### ", 1)]
    return lines


def texts(journey) -> list[str]:
    """The words of stages that left nothing else: samples, replies."""
    lines = []
    for s in journey.stages:
        if s.folder.exists() and not any(s.folder.iterdir()):
            said = tail(journey.out / f"{s.name}.log", SHOWN)
            lines += [f"### {s.name}", "", "~~~text", "".join(said).rstrip(), "~~~", ""]
    return ["## What the models write", "", *lines[:-1]] if lines else []


def onward(journey) -> list[str]:
    lines = [f"python {line}" for line in journey.tree["next"]]
    lines.append(f"python journey.py {journey.path}   # again: what has changed runs anew")
    return ["## To go on", "", "```sh", *lines, "```"]
