"""What people see of scores: results.json, report.md, a picture, a table on the console.

results: {name, model, checkpoint: {path, step, sha256}, tokenizer: {name, sha256}, precision,
device, command (its words), tasks: {NAME: {kind, metric, about, options, scores: [Score],
contamination, samples: [{prompt, reply}]}}}. Whatever else there is goes into results.json too.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import time
from pathlib import Path

import torch

from lumen import machine
from lumen.errors import UserError
from lumen.files import finite, read_json, replacing, write_json
from lumen.launch import print_now
from lumen.scores import Score, from_row, in_order

COLUMNS = 100  # of a console

MEANING = {
    "acc": "share of questions whose right choice has the highest log-probability; of a cloze, "
    "whose answer is what the model would write",
    "acc_bytes": "acc by log-probability per byte, since long choices are less likely",
    "acc_tokens": "acc by log-probability per token",
    "answer_bpb": "bits per byte of the right answer, mean over questions; moves before accuracy",
    "ppl": "perplexity of the answer: e to its nats, on (geometric) average over questions",
    "bits_per_byte": "bits that the model needs for a byte of the text; compares tokenizers",
    "loss": "nats per token, as in training; compares models of one tokenizer only",
    "token_ppl": "e to the loss; compares models of one tokenizer only",
    "word_ppl": "perplexity per word (between blanks), as lm-eval's word_perplexity",
    "byte_ppl": "perplexity per byte, as lm-eval's byte_perplexity",
    "token_acc": "share of tokens that were the most likely ones",
    "exact_match": "share of replies that are the right answer, or whose pattern finds it",
    "strict_match": "share of replies whose number behind #### is right",
    "flexible_extract": "share of replies whose last number is right",
    "pass@1": "share of functions that pass their tests, one reply each",
    "heuristic": "mean of the parts below: whether a model writes at all, not whether it is right",
    "nonempty": "share of replies with any word in them",
    "distinct": "share of word pairs that are different ones",
    "unrepeated": "1 less the longest stretch that occurs twice, as a share of the reply",
    "ended": "share of replies that the model ended by itself",
    "expected": "share of replies with the expected pattern in them, of prompts that have one",
}
NOTES = """\
- **±** is the standard error, by bootstrap over questions; the interval holds 95 %.
- **chance**: a model that finds all choices, or all tokens, equally likely.
- **majority**: the answer that is most often right, given to every question; of a text, its own
  token frequencies.
- **control**: the same questions with their contexts swapped; of a text its tokens behind those of
  another. It should fall to chance; where it does not, the choices alone, or memory, tell the
  answer. Of forty controls one seems to leak by accident. Of a text it may be worse than chance.
- Choices that tie share the point, so a model that knows nothing has chance, not more."""


LEGEND = {  # under the console's table
    "majority": "the most frequent answer to every question, or a text's own token frequencies",
    "control": "the same with the questions swapped, which should fall to chance",
}
UNKNOWN = "contamination: not looked for: training data of this model are not here or not wanted"

# ---------------------------------------------------------------- files


def write(out, results: dict, say=print_now) -> None:
    """results.json, report.md and, where matplotlib is there, picture.png in folder `out`, each
    whole or not at all. OSError."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = surroundings() | results
    scores = scores_in(results)
    bad = [f"{score.task}/{score.metric}" for score in scores if score.row()["nan"]]
    write_json(out / "results.json", plain(aliases(scores) | results | {"nan": bad}))
    drawn = out / "picture.png"
    try:
        picture(drawn, scores)
    except ImportError:
        drawn.unlink(missing_ok=True)  # it would be of other scores
        say("note       picture.png needs matplotlib: pip install matplotlib")
    with replacing(out / "report.md") as file:
        file.write("\n".join(report(results, drawn.exists())).encode())


def earlier(out, about: dict, say=print_now) -> dict:
    """The tasks that results.json in folder `out` has of the same model, asked in the same way:
    they stay there beside those that are asked now. about: results without their tasks. E128: it
    has another model's."""
    file = Path(out) / "results.json"
    if not file.exists():
        return {}
    then, now = read_json(file, "E128"), plain(about)
    if then.get("checkpoint", {}).get("sha256") != now["checkpoint"]["sha256"]:
        text = f"{out} holds results of another model, {then.get('name')}"
        raise UserError("E128", f"{text}; take another --out, or remove it")
    differ = [key for key in ("precision", "device", "template") if then.get(key) != now[key]]
    if differ:
        say(f"note       {out} held results of another {', '.join(differ)}, which are replaced")
        return {}
    tasks = {}
    for name, task in then["tasks"].items():
        tasks[name] = task | {"scores": [from_row(row) for row in task["scores"]]}
    return tasks


def surroundings() -> dict:
    """What a result depends on beside model and data: commit, versions, the machine, the date."""
    commit = machine.git_commit()
    return {
        "commit": commit.rstrip("+"),
        "dirty": commit.endswith("+"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_flags": machine.cpu_flags(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def scores_in(results: dict) -> list[Score]:
    """Of all tasks, in order."""
    return [score for task in results["tasks"].values() for score in task["scores"]]


def plain(x):
    """As strict JSON has it."""
    if isinstance(x, Score):
        return x.row()
    if dataclasses.is_dataclass(x):
        return plain(dataclasses.asdict(x))
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return str(x) if isinstance(x, Path) else finite(x)


def aliases(scores: list[Score]) -> dict:
    """Scores at the top of results.json too, as scripts of the reference systems look them up."""
    found = {}
    for score in scores:
        if score.metric == "token_ppl":
            found.setdefault("perplexity", score.value)
            found[f"ppl_{score.task}"] = score.value
        if score.headline and score.metric.startswith("acc"):
            found[f"{score.task}_accuracy"] = score.value
            found[f"{score.task}_total"] = score.n
    return found


# ---------------------------------------------------------------- words


def number(x: float | None, sign: str = "") -> str:
    if x is None:
        return "-"
    if math.isnan(x):
        return "NaN"
    for most, digits in ((10, 4), (1000, 2), (1e6, 0)):
        if abs(x) < most:
            return f"{x:{sign}.{digits}f}"
    return f"{x:{sign}.3g}"


def with_error(value: float | None, stderr: float | None) -> str:
    return number(value) if stderr is None else f"{number(value)} ± {number(stderr)}"


def shortened(text: str, most: int) -> str:
    """Its middle left out where it is longer."""
    if len(text) <= most:
        return text
    keep = max(1, most - 1)
    return text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines of a console, the first cell to the left, and cut so that all fits."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    first = max(8, COLUMNS - sum(widths[1:]) - 2 * len(widths[1:]))
    widths[0] = min(widths[0], first)
    lines = []
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([shortened(name, first).ljust(widths[0]), *cells]).rstrip())
    return lines


def table(scores: list[Score]) -> list[str]:
    """The headlines for the console, at most 100 columns; under a score what speaks against it,
    under them all what the baselines are."""
    scores = [score for score in scores if score.headline]
    if not scores:
        return []
    head = "score ± std. error" if any(s.stderr is not None for s in scores) else "score"
    rows = [["task", "metric", head, "n", "chance", "majority", "control"]]
    for s in scores:
        row = [s.task, s.metric, with_error(s.value, s.stderr), str(s.n)]
        rows.append([*row, number(s.chance), number(s.majority), number(s.control)])
    head, *body = aligned(rows)
    lines = [head]
    for score, line in zip(scores, body):
        lines.append(line)
        if score.verdict:
            lines.append(f"  ^ {score.verdict}")
    for name, text in LEGEND.items():
        if any(getattr(score, name) is not None for score in scores):
            lines.append(f"{name}: {text}")
    return lines


def markdown_table(rows: list[list[str]]) -> list[str]:
    """The first row is the head."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return [f"| {' | '.join(row)} |" for row in rows]


def score_rows(scores: list[Score]) -> list[list[str]]:
    head = ["task", "metric", "score", "95 % interval", "n", "chance", "majority", "control"]
    rows = [[*head, "verdict"]]
    for s in scores:
        row = [s.task, s.metric, with_error(s.value, s.stderr)]
        row += [f"{number(s.low)} to {number(s.high)}", str(s.n)]
        row += [number(s.chance), number(s.majority)]
        rows.append([*row, with_error(s.control, s.control_stderr), s.verdict])
    return rows


def report(results: dict, drawn: bool = False) -> list[str]:
    """report.md; whether there is a picture."""
    scores = scores_in(results)
    lines = [f"# Evaluation of {results.get('name', 'a model')}", ""]
    lines += [f"- {name}: {text}" for name, text in facts(results)]
    heads = [score for score in scores if score.headline]
    rest = [score for score in scores if not score.headline]
    lines += ["", "## Scores", "", *markdown_table(score_rows(heads)), ""]
    lines += [NOTES, ""]
    if drawn:
        lines += ["![scores](picture.png)", ""]
    if rest:
        lines += ["## Other metrics of the same answers", "", *markdown_table(score_rows(rest)), ""]
    names = {score.metric for score in scores}
    said = [f"- **{name}**: {text}" for name, text in MEANING.items() if name in names]
    lines += ["## What the metrics mean", "", *said, ""]
    lines += ["## Tasks", ""]
    for name, task in results["tasks"].items():
        about = plain(task.get("about") or {}).items()
        about = [f"{key} {value}" for key, value in about if value not in ("", None)]
        about += [f"{score.seconds:.1f} s" for score in task["scores"][:1]]
        lines.append(f"- **{name}**: {', '.join(about) or 'built in'}")
        if task.get("contamination"):
            lines.append(f"  - {seen_before(task['contamination'])}")
    if not any(task.get("contamination") for task in results["tasks"].values()):
        lines.append(f"- {UNKNOWN}")
    for name, task in results["tasks"].items():
        if task.get("samples"):
            lines += ["", f"## Samples: {name}", ""]
            for sample in task["samples"]:
                lines += [*fenced(sample["prompt"], "prompt"), *fenced(sample["reply"], "reply")]
    return [*lines, ""]


def seen_before(found: dict) -> str:
    """What lumen/overlap.py found."""
    text = f"contamination: {found['n_hit']} of {found['n']} questions ({found['share']:.1%})"
    text += " stand in the training data"
    if found.get("short"):
        text += f"; {found['short']} more are too short to look for"
    return f"{text}; {found['said']}" if found.get("said") else text


def facts(results: dict) -> list[tuple[str, str]]:
    """(what, its words) of what was evaluated, with what and where; what is not known is left."""
    checkpoint, tokenizer = results.get("checkpoint") or {}, results.get("tokenizer") or {}
    step = checkpoint.get("step")
    found = {
        "checkpoint": [checkpoint.get("path"), None if step is None else f"step {step}"],
        "sha256": [checkpoint.get("sha256")],
        "tokenizer": [tokenizer.get("name"), tokenizer.get("sha256")],
        "computed": [results.get("precision"), results.get("device")],
        "machine": [" ".join(results.get("cpu_flags") or []), f"torch {results.get('torch')}"],
        "commit": [results.get("commit"), "with changes" if results.get("dirty") else None],
        "date": [results.get("date")],
        "command": [shlex.join(results.get("command") or [])],
    }
    worded = {name: ", ".join(str(x) for x in words if x) for name, words in found.items()}
    return [(name, text) for name, text in worded.items() if text]


def fenced(text: str, title: str) -> list[str]:
    """A text that may hold any markdown, as it is."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{title}:", fence, text, fence, ""]


def detailed(name: str, lines: list[dict]) -> str:
    """All replies of a task of kind reply as markdown, for --detailed."""
    said = [f"# {name}: every reply", ""]
    for line in in_order(lines):
        label = f", label {line['label']}" if line.get("label") else ""
        said += [f"## {line['i']}{label}", ""]
        found = ", ".join(f"{key} {number(value)}" for key, value in line["found"].items())
        said += [f"{found}; {line['tokens']} tokens, {ended(line)}", ""]
        said += fenced(line.get("prompt", ""), "prompt") + fenced(line["reply"], "reply")
    return "\n".join(said) + "\n"


def chosen(name: str, lines: list[dict], questions: list, metric: str) -> str:
    """What a task of kind choice was asked and what the model chose by `metric`, as markdown.
    questions: lumen.questions.Question of each line."""
    said = [f"# {name}: every choice, by {metric}", ""]
    for line, question in zip(lines, questions):
        sizes = line.get(metric.removeprefix("acc_"), [1] * len(line["logprobs"]))
        values = [a / max(1, size) for a, size in zip(line["logprobs"], sizes)]
        said += [f"## {line['i']}", "", *fenced(question.pairs[line["answer"]][0], "context")]
        for k, ((_, text), value) in enumerate(zip(question.pairs, values)):
            marks = []
            if k == line["answer"]:
                marks.append("right")
            if value == max(values):
                marks.append("chosen")
            said.append(f"- {value:.3f} {' and '.join(marks) or '-'}: {text!r}")
        said.append("")
    return "\n".join(said) + "\n"


def ended(line: dict) -> str:
    return "ended by itself" if line["ended"] else "cut off"


# ---------------------------------------------------------------- the picture


def picture(path: Path, scores: list[Score]) -> None:
    """Headlines as dots with their intervals, and where their baselines lie. ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Score]] = {}
    for score in scores:
        if score.headline and math.isfinite(score.value):
            name = "0 to 1" if score.better == "higher" else score.metric
            panels.setdefault(name, []).append(score)
    if not panels:
        return
    heights = [len(rows) + 1 for rows in panels.values()]
    size = (8, 0.9 + 0.36 * sum(heights) + 0.5 * len(heights))
    layout = {"squeeze": False, "height_ratios": heights, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, **layout)
    for ax, (name, rows) in zip(axes[:, 0], panels.items()):
        draw(ax, rows)
        ax.set_xlabel(f"{name} ({rows[0].better} is better)")
        if name.endswith("ppl"):  # chance has thousands of times what a model has
            ax.set_xscale("log")
        if rows[0].better == "higher":
            ax.set_xlim(-0.02, 1.02)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def draw(ax, rows: list[Score]) -> None:
    """One score a row, the first on top."""
    places = range(len(rows))
    lows = [s.value - (s.value if s.low is None else s.low) for s in rows]
    highs = [(s.value if s.high is None else s.high) - s.value for s in rows]
    ends = [[max(0.0, x) for x in side] for side in (lows, highs)]
    values = [s.value for s in rows]
    ax.errorbar(values, places, xerr=ends, fmt="o", color="tab:blue", capsize=3, label="score")
    nan = math.nan
    for name, marker, colour in (
        ("chance", "|", "0.6"),
        ("majority", "|", "tab:red"),
        ("control", "x", "tab:orange"),
    ):
        xs = [nan if getattr(s, name) is None else getattr(s, name) for s in rows]
        size = 160 if marker == "|" else 36
        ax.scatter(xs, places, marker=marker, color=colour, s=size, label=name, zorder=3)
    names = [shortened(s.task, 28).replace("$", r"\$") for s in rows]  # $: no formulas
    ax.set_yticks(places, names)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
