"""What a document must be like to be kept: rules, each named by what it keeps.

    Rules(settings).look(text)      ->  Verdict: kept or dropped, by which rule, and why
    Rules(settings).look_all(text)  ->  every rule that would drop it if it stood alone
    Examples                        ->  the table of a dry run, made of many look_all

The limits are those of Gopher (Rae 2021, A.1.1), FineWeb (Penedo 2024) and C4 (Raffel 2020), made
for English web pages; what they do to other text, such as code, the dry run shows. Unlike there

- letters of any script are letters, and full stops of any script end a line;
- words are what stands between blanks. In scripts without blanks (Han, kana, Thai: see
  clean.NO_BLANKS) two letters count as a word, and the length of words is not looked at;
- blank lines are no lines: they neither repeat one another nor lack a full stop;
- an n-gram is repeated from its second occurrence on, and each of its characters counts once.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b
from typing import NamedTuple

from lumen.clean import clean
from lumen.errors import UserError, nearest
from lumen.measures import Measures, identifier, share
from lumen.pii import mask
from lumen.values import short

DEFAULTS = {  # name: (default, default with preset web, what it may be)
    "preset": ("none", "web", "none or web"),
    "rules": ([], [], "a list of names to add to the preset's; -name takes one out"),
    "language": (None, None, "null, or a list of the codes to keep, as [en, de]"),
    "language_threshold": (0.8, 0.8, "0 to 1: a less probable language is undecided, and kept"),
    "ftfy": (False, True, "true or false: whether wrongly decoded text is mended"),
    "pii": (None, None, "null or mask"),
    "min_chars": (None, 50, "null or characters"),
    "max_chars": (None, None, "null or characters"),
    "quality_threshold": (None, None, "null, or 0 to 1"),
}
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
ELLIPSES = ("...", "…")
BULLETS = set("•‣▶►◦■□▪▫●-*")
MAY_BE_WRONG = re.compile(r"[^\x00-\x7e]|&")
VERSION = 1  # of the rules: part of the settings, and so of a dataset's fingerprint
ANY = "any of them"


class Rule(NamedTuple):
    name: str
    keeps: str  # behind "keeps"
    check: Callable[[Measures], str]  # "": kept; else the measured value and the limit


class Verdict(NamedTuple):
    text: str  # mended and masked
    dropped: str  # name of the rule, or ""
    why: str  # the measured value and the limit
    language: str  # its code; und: undecided; "": not asked for, or dropped before
    score: float  # quality, 0 to 1; -1: not asked for, or dropped before
    masked: int  # addresses


# ---------------------------------------------------------------- checks


def at_most(value: float, limit: float) -> str:
    return f"{said(value)} > {said(limit)}" if value > limit else ""


def at_least(value: float, limit: float) -> str:
    return f"{said(value)} < {said(limit)}" if value < limit else ""


def said(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def number_of_words(m: Measures) -> str:
    return at_least(m.n_words, 50) or at_most(m.n_words, 100_000)


def mean_word_length(m: Measures) -> str:
    length = m.mean_word_length
    if length is None:
        return ""
    return at_least(length, 3) or at_most(length, 10)


def symbols(m: Measures, of: tuple) -> str:
    return at_most(sum(map(m.text.count, of)) / m.n_words, 0.1)


def bullets(m: Measures) -> str:
    begins = [line[0] for line in m.lines]
    return at_most(share(map(BULLETS.__contains__, begins), len(begins)), 0.9)


def trailing_off(m: Measures) -> str:
    if not any(ellipsis in m.text for ellipsis in ELLIPSES):
        return ""
    return at_most(share([line.endswith(ELLIPSES) for line in m.lines], len(m.lines)), 0.3)


def stop_words(m: Measures) -> str:
    found = 0
    for word in m.words:
        found += word in STOP_WORDS
        if found == 2:
            return ""
    # telling the language takes longer than all else: only where it matters
    if m.language[0] != "en":
        return ""
    return at_least(found, 2)


def lines_per_word(m: Measures) -> str:
    return at_most(m.text.count("\n") / m.n_words, 0.3)


def measured(m: Measures, name: str, limit: Callable, at: float) -> str:
    return limit(getattr(m, name), at)


def repeated_items(m: Measures, name: str, of: int, limit: float) -> str:
    return at_most(getattr(m, name)[of], limit)


def top_ngram(m: Measures, n: int, limit: float) -> str:
    return at_most(m.top_ngram(n, limit), limit)


def repeated_ngrams(m: Measures, n: int, limit: float) -> str:
    return at_most(m.repeated(n, limit), limit)


def without(m: Measures, phrase: str) -> str:
    at = m.text.lower().find(phrase)
    return f"{phrase!r} at character {at:,}" if at >= 0 else ""


def size(m: Measures, limit: Callable, at: int) -> str:
    return limit(len(m.text), at)


def language(m: Measures, codes: tuple) -> str:
    code, probability = m.language
    if code in (*codes, "und"):
        return ""
    return f"{code}, {probability:.2f}"


# ---------------------------------------------------------------- the rules


def repetition_rules() -> list[Rule]:
    rules = []
    for what in ("line", "paragraph"):
        measure = f"duplicate_{what}s"
        keeps = f"texts where at most 30 % of the {what}s came before"
        check = partial(repeated_items, name=measure, of=0, limit=0.3)
        rules.append(Rule(f"duplicate_{what}s_at_most_30_percent", keeps, check))
        keeps = f"texts with at most 20 % of their characters in {what}s that came before"
        check = partial(repeated_items, name=measure, of=1, limit=0.2)
        rules.append(Rule(f"duplicate_{what}_characters_at_most_20_percent", keeps, check))
    for n, percent in ((2, 20), (3, 18), (4, 16)):
        keeps = f"texts whose most frequent {n} words in a row have at most {percent} % of them"
        check = partial(top_ngram, n=n, limit=percent / 100)
        rules.append(Rule(f"top_{n}_gram_at_most_{percent}_percent", keeps, check))
    for n, percent in ((5, 15), (6, 14), (7, 13), (8, 12), (9, 11), (10, 10)):
        keeps = f"texts with at most {percent} % in {n} words in a row that came before"
        check = partial(repeated_ngrams, n=n, limit=percent / 100)
        rules.append(Rule(f"repeated_{n}_grams_at_most_{percent}_percent", keeps, check))
    return rules


GOPHER_QUALITY = [
    Rule("words_50_to_100000", "texts of 50 to 100,000 words", number_of_words),
    Rule(
        "mean_word_length_3_to_10",
        "texts whose words have 3 to 10 characters on average",
        mean_word_length,
    ),
    Rule(
        "hashes_at_most_10_percent",
        "texts with at most one # to ten words",
        partial(symbols, of=("#",)),
    ),
    Rule(
        "ellipses_at_most_10_percent",
        "texts with at most one ... to ten words",
        partial(symbols, of=ELLIPSES),
    ),
    Rule(
        "bullets_at_most_90_percent",
        "texts where at most 90 % of the lines begin with a bullet",
        bullets,
    ),
    Rule(
        "trailing_off_at_most_30_percent",
        "texts where at most 30 % of the lines end with ...",
        trailing_off,
    ),
    Rule(
        "letters_in_80_percent_of_words",
        "texts where at least 80 % of the words have a letter, of any script",
        partial(measured, name="words_with_letters", limit=at_least, at=0.8),
    ),
    Rule(
        "two_stop_words",
        f"texts with two of {', '.join(sorted(STOP_WORDS))}, and what is not English",
        stop_words,
    ),
]
FINEWEB_QUALITY = [
    Rule(
        "punctuation_ends_12_percent_of_lines",
        "texts where at least 12 % of the lines end with a full stop, a quotation mark or so",
        partial(measured, name="ended_lines", limit=at_least, at=0.12),
    ),
    Rule(
        "short_lines_at_most_67_percent",
        "texts where at most 67 % of the lines have 30 characters or less (10 without blanks)",
        partial(measured, name="short_lines", limit=at_most, at=0.67),
    ),
    Rule(
        "duplicate_line_characters_at_most_1_percent",
        "texts with at most 1 % of their characters in lines that came before",
        partial(repeated_items, name="duplicate_lines", of=1, limit=0.01),
    ),
    Rule(
        "line_ends_at_most_30_percent",
        "texts with at most three line ends to ten words",
        lines_per_word,
    ),
]
C4_RULES = [
    Rule("no_lorem_ipsum", "texts without lorem ipsum", partial(without, phrase="lorem ipsum")),
    Rule("no_curly_bracket", "texts without {", partial(without, phrase="{")),
]
RULES = {
    rule.name: rule for rule in [*GOPHER_QUALITY, *FINEWEB_QUALITY, *C4_RULES, *repetition_rules()]
}
PRESETS = {"none": (), "web": tuple(name for name in RULES if name != "no_curly_bracket")}


def passed_rules(m: Measures) -> float:
    names = PRESETS["web"]
    return share([not RULES[name].check(m) for name in names], len(names))


# What the quality is the mean of, each 0 to 1: shares of
SCORE_PARTS = {
    "rules": passed_rules,  # web rules that would keep it
    "letters": lambda m: m.letters,  # letters among the characters but blanks
    "lines_that_end": lambda m: m.ended_lines,  # lines with a full stop or its like
    "new_lines": lambda m: 1 - m.duplicate_lines[0],  # lines that did not come before
}


def score_parts(m: Measures) -> dict[str, float]:
    return {name: part(m) for name, part in SCORE_PARTS.items()}


def quality(m: Measures, limit: float) -> str:
    parts = score_parts(m)
    m.score = sum(parts.values()) / len(parts)
    if m.score >= limit:
        return ""
    shown = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    return f"{at_least(m.score, limit)}: {shown}"


# ---------------------------------------------------------------- settings


def complete(settings: dict) -> dict:
    """Every setting, as plain JSON; where one is absent, what its preset says. What is complete
    stays as it is. E002."""
    settings = {key: value for key, value in settings.items() if key != "version"}
    for key in settings:
        if key not in DEFAULTS:
            near = nearest(key, DEFAULTS)
            known = f"did you mean {near}?" if near else f"there are {', '.join(DEFAULTS)}"
            raise UserError("E002", f"clean: no {key}; {known}")
    preset = settings.get("preset") or "none"
    if preset not in PRESETS:
        raise UserError("E002", f"clean.preset: {short(preset)} is not {DEFAULTS['preset'][2]}")
    full = {}
    for key, defaults in DEFAULTS.items():
        full[key] = settings.get(key, defaults[preset == "web"])
    full["preset"] = preset
    for key in ("rules", "language"):
        value = full[key]
        names = [value] if isinstance(value, str) else value or []
        good = isinstance(names, list) and all(isinstance(name, str) for name in names)
        check(key, value, good)
        full[key] = sorted(set(names))
    full["language"] = full["language"] or None
    for key in ("language_threshold", "quality_threshold"):
        empty = full[key] is None and key == "quality_threshold"
        check(key, full[key], empty or (is_number(full[key]) and 0 <= full[key] <= 1))
    for key in ("min_chars", "max_chars"):
        value = full[key]
        check(key, value, value is None or (is_number(value) and value >= 1 and value % 1 == 0))
    check("ftfy", full["ftfy"], isinstance(full["ftfy"], bool))
    check("pii", full["pii"], full["pii"] in (None, "mask"))
    if (full["min_chars"] or 0) > (full["max_chars"] or 1e99):
        raise UserError("E002", "clean: min_chars is more than max_chars: nothing would be left")
    return full | {"version": VERSION}


def check(key: str, value, good: bool) -> None:
    if not good:
        raise UserError("E002", f"clean.{key}: {short(value)} is not {DEFAULTS[key][2]}")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def chosen_rules(full: dict) -> list[Rule]:
    """What the settings ask for, in the order in which they are looked at: the costly ones last.
    E002: a rule or a language that is not."""
    names = set(PRESETS[full["preset"]])
    for given in full["rules"]:
        name = given.removeprefix("-")
        if name not in RULES:
            near = nearest(name, RULES)
            known = f"did you mean {near}?" if near else f"there are {', '.join(RULES)}"
            raise UserError("E002", f"clean.rules: no {short(name)}; {known}")
        if given.startswith("-"):
            names.discard(name)
        else:
            names.add(name)
    rules = []
    if at := full["min_chars"]:
        keeps = f"texts of at least {at:,} characters"
        rules.append(Rule(f"characters_{at}_or_more", keeps, partial(size, limit=at_least, at=at)))
    if at := full["max_chars"]:
        keeps = f"texts of at most {at:,} characters"
        rules.append(Rule(f"characters_{at}_or_less", keeps, partial(size, limit=at_most, at=at)))
    rules += [rule for name, rule in RULES.items() if name in names]
    if codes := full["language"]:
        threshold = full["language_threshold"]
        keeps = f"texts in {' or '.join(codes)}, and where no language is {threshold:g} probable"
        name = f"language_{'_or_'.join(codes)}"
        rules.append(Rule(name, keeps, partial(language, codes=tuple(codes))))
    if (limit := full["quality_threshold"]) is not None:
        keeps = f"texts of quality {limit:g} or more, the mean of {', '.join(SCORE_PARTS)}"
        rules.append(Rule(f"quality_{limit:g}_or_more", keeps, partial(quality, limit=limit)))
    return rules


class Rules:
    """The rules of a dataset, from settings (DEFAULTS' keys, any of them). Picklable.

    E002 other keys, names and values; E003 a package that they need is missing.
    """

    def __init__(self, settings: dict):
        self.settings = complete(settings)
        self.rules = chosen_rules(self.settings)
        names = {rule.name for rule in self.rules}
        scored = self.settings["quality_threshold"] is not None
        if "two_stop_words" in names or self.settings["language"] or scored:
            known = identifier().labels
            for code in self.settings["language"] or []:
                if code not in known:
                    known = ", ".join(sorted(known))
                    raise UserError("E002", f"clean.language: no {short(code)}; there are {known}")
        if self.settings["ftfy"]:
            fixer()
        self.active = bool(self.rules or self.settings["ftfy"] or self.settings["pii"])

    def measures(self, text: str) -> Measures:
        if self.settings["ftfy"]:
            text = mend(text)
        return Measures(text, self.settings["language_threshold"])

    def look(self, text: str) -> Verdict:
        """text: cleaned already. The verdict names the first rule that drops it."""
        if not self.active:
            return Verdict(text, "", "", "", -1.0, 0)
        m = self.measures(text)
        dropped = why = ""
        for rule in self.rules:
            if why := rule.check(m):
                dropped = rule.name
                break
        known = vars(m)
        code = known["language"][0] if self.settings["language"] and "language" in known else ""
        text, masked = m.text, 0
        if self.settings["pii"] and not dropped:
            text, masked = mask(text)
        return Verdict(text, dropped, why, code, m.score, masked)

    def look_all(self, text: str) -> dict[str, str]:
        """{name: why} of every rule that would drop the text if it stood alone."""
        m = self.measures(text)
        failed = {}
        for rule in self.rules:
            if why := rule.check(m):
                failed[rule.name] = why
        return failed

    def rewrite(self, text: str) -> tuple[str, int]:
        """(mended and masked, addresses masked): what `look` does to a text that it keeps."""
        if self.settings["ftfy"]:
            text = mend(text)
        return mask(text) if self.settings["pii"] else (text, 0)

    def explain(self) -> list[str]:
        """The active rules, with what each keeps; empty: there are none."""
        lines = []
        if self.settings["ftfy"]:
            lines.append("ftfy: wrongly decoded text is mended first")
        width = max([len(rule.name) for rule in self.rules], default=0)
        for rule in self.rules:
            lines.append(f"{rule.name:<{width}}  keeps {rule.keeps}")
        if self.settings["pii"]:
            lines.append(
                "pii: e-mail, public IP and telephone numbers with their country are replaced"
            )
        return lines


def mend(text: str) -> str:
    """Undoes wrong decodings (ftfy: mojibake, entities, lost bytes). Not its taste: quotes,
    ligatures and wide letters stay. Entities stay in a text that has a <: it is HTML, or about it.
    E003."""
    fix_text, config = fixer()
    if not MAY_BE_WRONG.search(text):
        return text
    if "<" in text:
        config = config._replace(unescape_html=False)
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if MAY_BE_WRONG.search(line):  # ftfy takes 100 times as long to see that nothing is wrong
            lines[i] = fix_text(line, config)
    mended = "\n".join(lines)
    return text if mended == text else clean(mended)


@cache
def fixer():
    """(ftfy.fix_text, its configuration). E003."""
    try:
        import ftfy
    except ImportError as error:
        text = "mending wrongly decoded text needs ftfy: pip install ftfy; without: ftfy: false"
        raise UserError("E003", text) from error
    config = ftfy.TextFixerConfig(
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        remove_terminal_escapes=False,
        explain=False,
    )
    return ftfy.fix_text, config


# ---------------------------------------------------------------- a dry run


EXAMPLES = 3  # of each rule
EXCERPT = 100  # characters


class Examples:
    """What each rule would drop: documents, bytes and a few examples. Picklable.

    The examples are those whose places have the smallest hashes: spread over the sources, and the
    same in whatever order documents are added and parts are merged.
    """

    def __init__(self):
        self.documents = 0
        self.bytes = 0
        self.dropped: dict[str, list] = {}  # rule: [documents, bytes, examples]

    def add(self, where: str, text: str, failed: dict[str, str]) -> None:
        """One document: where it is, cleaned, and what Rules.look_all said."""
        size = len(text) if text.isascii() else len(text.encode())
        self.documents += 1
        self.bytes += size
        if not failed:
            return
        place = blake2b(where.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
        excerpt = " ".join(text[: 4 * EXCERPT].split())[:EXCERPT]
        self.count(ANY, 1, size, [])
        for name, why in failed.items():
            self.count(name, 1, size, [(place, where, why, excerpt)])

    def count(self, name: str, documents: int, size: int, examples: list) -> None:
        entry = self.dropped.setdefault(name, [0, 0, []])
        entry[0] += documents
        entry[1] += size
        entry[2] = heapq.nsmallest(EXAMPLES, {*entry[2], *examples})

    def merge(self, other: Examples) -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        for name, (documents, size, examples) in other.dropped.items():
            self.count(name, documents, size, examples)

    def sorted(self) -> list[tuple]:
        """(rule, documents, bytes, examples), the largest first; before all, any rule."""
        rows = [(name, *entry) for name, entry in self.dropped.items()]
        return sorted(rows, key=lambda row: (row[0] != ANY, -row[2], row[0]))

    def lines(self) -> list[str]:
        """The table, as one reads it."""
        megabytes = self.bytes / 1e6
        lines = [
            f"each rule alone, of {self.documents:,} documents, {megabytes:,.1f} MB, would drop"
        ]
        for name, documents, size, examples in self.sorted():
            share = size / max(1, self.bytes)
            lines.append(f"{documents:>12,} {size / 1e6:>9,.1f} MB {share:>7.1%}  {name}")
            for _, where, why, excerpt in examples:
                lines.append(f"{'':12} {where}: {why}: {excerpt}")
        if not self.dropped:
            lines.append("nothing")
        return lines

    def to_json(self) -> dict:
        """For report.json."""
        rules = {}
        for name, documents, size, examples in self.sorted():
            rules[name] = {"documents": documents, "bytes": size}
            if examples:
                keys = ("file", "why", "excerpt")
                rules[name]["examples"] = [dict(zip(keys, example[1:])) for example in examples]
        return {"documents": self.documents, "bytes": self.bytes, "dropped": rules}
