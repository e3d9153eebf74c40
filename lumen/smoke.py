"""Smoke prompts in eight categories: does a model write at all, and what. And samples.

Each reply gets parts of 0 to 1 that anybody can check, and their mean. It is a heuristic: it finds
models that are silent, that repeat themselves, that never end. It says nothing of quality.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from lumen.clean import NO_BLANKS
from lumen.errors import UserError, expand
from lumen.evaluation_files import Record, mended, table
from lumen.files import sha256
from lumen.questions import Options
from lumen.replying import Prompt, Replies, Reply
from lumen.values import short

OWN = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
SAMPLES = 8
TOKENS = 64
FORMS = '{"categories": {NAME: [prompts]}}, {NAME: [prompts]}, a list of prompts, or .jsonl rows'
# what is counted: a word, a mark, a stretch of nothing
PIECE = re.compile(rf"[{NO_BLANKS}]|[^\W{NO_BLANKS}]+|[^\w\s]|\s{{16}}")
PARTS = "nonempty, distinct: share of different ones among its pairs of words, unrepeated: 1 - the"
PARTS += " longest stretch that occurs twice, ended: by itself, expected: the pattern was found"


def task(name: str, options: Options) -> Replies:
    """`smoke`, or `samples`: a few of its prompts at temperature 0.8, not judged. E127."""
    path = Path(expand(options.prompts)) if options.prompts else OWN
    records = read_prompts(path)
    about = {"path": str(path), "sha256": sha256(path)}
    if name == "samples":
        about["said"] = "seeded samples at temperature 0.8; nothing is judged"
        made = Replies(name, options, about, first_of_each(records), ask_smoke, judge_nothing)
        made.metric, made.temperature = "", 0.8
    else:
        about["said"] = f"heuristic: the mean of {PARTS}"
        made = Replies(name, options, about, records, ask_smoke, judge_smoke)
        made.metric = "heuristic"
    made.swap, made.controlled = ("prompt", "base"), ("expected",)
    made.told, made.held = ("category",), ("prompt", "base")
    return made


def first_of_each(records: list[dict]) -> list[dict]:
    """Of each category the first prompt, then the second, until there are enough."""
    seen: dict[str, int] = {}
    places = []
    for i, record in enumerate(records):
        rank = seen[record["category"]] = seen.get(record["category"], 0) + 1
        places.append((rank, i))
    return [records[i] for _, i in sorted(places)[:SAMPLES]]


def ask_smoke(record: dict, talks: bool) -> Prompt:
    return Prompt(record["prompt"] if talks else record["base"], "", (), TOKENS)


def judge_nothing(record: dict, reply: Reply) -> dict:
    return {}


# ---------------------------------------------------------------- the heuristic


def judge_smoke(record: dict, reply: Reply) -> dict:
    pieces = PIECE.findall(reply.text) if reply.text.strip() else []
    pairs = list(zip(pieces, pieces[1:]))
    found = {"nonempty": float(bool(pieces)), "distinct": 0.0, "unrepeated": 0.0}
    if pieces:
        found["distinct"] = len(set(pairs)) / len(pairs) if pairs else 1.0
        found["unrepeated"] = 1 - longest_repeat(pieces) / max(1, len(pieces) - 1)
    found["ended"] = float(reply.ended)
    if record["expect"]:
        found["expected"] = float(bool(re.search(record["expect"], reply.text, re.IGNORECASE)))
    return {"heuristic": sum(found.values()) / len(found)} | found


def longest_repeat(pieces: list[str]) -> int:
    """How many pieces the longest stretch has that occurs twice; both may overlap."""
    low, high = 0, max(0, len(pieces) - 1)
    while low < high:  # a stretch of n holds one of n - 1
        n = (low + high + 1) // 2
        stretches = [tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1)]
        if len(set(stretches)) < len(stretches):
            low = n
        else:
            high = n - 1
    return low


# ---------------------------------------------------------------- files of prompts


def read_prompts(path: Path) -> list[dict]:
    """{prompt, base, category, expect} each, of a file in one of FORMS, as JSON or YAML. E127."""
    if ".jsonl" in path.suffixes:
        rows = [(row.line, row.row) for row in table(path)]
        return [prompt_of(Record(path, line, row), "own") for line, row in rows]
    data = parsed(path)
    if isinstance(data, dict):
        data = data.get("categories", data)
    groups = data if isinstance(data, dict) else {"own": data}
    found = []
    for category, rows in groups.items():
        if not isinstance(rows, list) or not rows:
            text = f"{path}: {category}: {short(rows)} is no list of prompts"
            raise UserError("E127", f"{text}; a file of prompts is {FORMS}")
        for i, row in enumerate(rows, 1):
            row = row if isinstance(row, dict) else {"prompt": row}
            found.append(prompt_of(Record(path, i, row), str(category)))
    return found


def parsed(path: Path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        return mended(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except OSError as error:
        raise UserError("E127", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError("E127", f"{path}: {why}; a file of prompts is {FORMS}") from error


def prompt_of(row: Record, category: str) -> dict:
    """Of a row; `base` is what a base model continues."""
    prompt = row.text("prompt")
    base = row.text("base") if "base" in row.row else prompt
    expect = row.row.get("expect") or ""
    try:
        re.compile(expect)
    except (re.error, TypeError) as error:
        raise row.bad("expect", f"it is no regular expression: {error}") from error
    category = str(row.row.get("category", category))
    return {"category": category, "prompt": prompt, "base": base, "expect": expect}
