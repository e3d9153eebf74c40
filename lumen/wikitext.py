"""WikiText-2 and WikiText-103 (Merity et al. 2016) as lm-eval 0.4.13's wikitext asks them: articles
whose word perplexity is the published kind."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from lumen import evaluation_files as files
from lumen.errors import UserError
from lumen.evaluation_files import TEST, VALIDATION, Place
from lumen.questions import Asked, Options, Task
from lumen.texts import TextTask

ENDINGS = (".raw", ".tokens", *files.TABLES, ".txt")


def read_wikitext(name: str, words: tuple[str, str], path: Path, options: Options) -> list[Task]:
    """The articles, without the marks of their tokens. Words and bytes are counted before these are
    taken away, as lm-eval does: its word perplexity is the published kind.

    words: what a path of this one has, and one of the other has."""
    place = Place(path, (words[0], "raw"), (words[1],), ENDINGS)
    paths = files.only(files.asked_files(place, (TEST, VALIDATION)))
    found = wikitext_pages(paths)
    counts = [(len(re.split(r"\s+", page)), len(page.encode())) for page in found]
    about = {"path": ", ".join(map(str, paths)), "sha256": files.sum_of(paths), "shots": 0}
    about["said"] = "articles as in lm-eval 0.4.13's wikitext"
    documents = [without_tokens(page) for page in found]
    return [Articles(name, options, about, documents, counts=counts)]


def wikitext_pages(paths: list[Path]) -> list[str]:
    """Of Salesforce's files, of Hugging Face's rows, a line each, or of rows that are articles."""
    if Place(Path(), endings=files.TABLES).ending(paths[0]):
        rows = files.records(paths)
        if "page" in rows[0].row:
            return [row.text("page") for row in rows]
        lines = [row.text("text") or " \n" for row in rows]  # empty ones have lost theirs
        return articles("".join(lines))
    try:
        text = paths[0].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("E127", f"{paths[0]}: {error}") from None
    found = articles(text)
    if not found:
        raise UserError("E127", f"{paths[0]}: there is no text in it")
    return found


def articles(text: str) -> list[str]:
    """An article begins at a line like " = Title = "; its sections have more of the signs."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            found.append([])
        found[-1].append(line)
    pages = ["\n".join(lines) for lines in found]
    return [page for page in pages if page.strip()]


def without_tokens(page: str) -> str:
    """lm-eval's detokenizer, but for one rule that matches no article: "/' 5/"."""
    page = page.replace("s '", "s'")
    for sign in "-,.":
        page = page.replace(f" @{sign}@ ", sign)
    for sign in ":;.!?,":  # they stand behind a word
        page = page.replace(f" {sign} ", f"{sign} ")
    for begin, end in ("()", "[]", "{}", '""', "''"):
        inside = rf"{re.escape(begin)}\s*([^{re.escape(end)}]*?)\s*{re.escape(end)}"
        page = re.sub(inside, rf"{begin}\1{end}", page)
    for signs in ("====", "===", "=="):
        page = page.replace(" ".join(signs), signs)
    page = page.replace(" \u00b0 ", "\u00b0").replace(" \n", "\n").replace("\n ", "\n")
    return page.replace(" N ", " 1 ").replace(" 's", "'s")


@dataclass
class Articles(TextTask):
    """Texts whose words and bytes are those of another form of theirs."""

    counts: list[tuple[int, int]] = field(default_factory=list)
    metric = "word_ppl"

    def line(self, i: int, asked: Asked) -> dict:
        line = super().line(i, asked)
        n_words, n_bytes = self.counts[line["i"]]
        return line | {"words": n_words, "bytes": n_bytes}
