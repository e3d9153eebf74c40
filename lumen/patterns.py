"""The regexes that cut a text into pieces, and what of them means the same to two engines."""

from __future__ import annotations

import regex

# The split patterns as they were published. tiktoken's newer spellings (`\s++$`, `{1,3}+`) mean
# the same to tiktoken's regex engine but not to that of `tokenizers` (Oniguruma, where $ matches
# at every line end), so they are not used.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# of Llama 3, OLMo 2 and, with single digits, Qwen
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
# of SmolLM and StarCoder: every digit for itself, and GPT-2's on what lies between two of them. The
# library knows 13 digits that the engines' \p{N} does not know yet (new in Unicode 17).
DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# with these every character of every text is in some match
COMPLETE_PATTERNS = (GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)
COMPLETE_PATTERNS += (DIGITS_PATTERN,)

# What of a foreign pattern means the same in both engines. Not among it: ^ $ \b \w \h {1,3}+
# [a&&b] (?<=...).
_SAFE_CLASS = r"\[\^?(?:\\[pP]\{\w+\}|\\[sSdrnt]|\\[^\w\s]|\w-\w|[^\\\[\]&~-])+\]"
_SAFE_PATTERN = regex.compile(
    rf"(?:{_SAFE_CLASS}|\\[pP]\{{\w+\}}|\\[sSdrnt]|\\[^\w\s]|\((?:\?(?:i:|:|!|=|>))?|\)"
    r"|\{\d+(?:,\d*)?\}(?!\+)|[?*+]\+?|[|.]|[^\\\[\](){}^$.|?*+])*+"
)


def means_the_same(pattern: str) -> bool:
    """Whether tiktoken's engine and that of `tokenizers` cut every text alike by this pattern."""
    if pattern in COMPLETE_PATTERNS:
        return True
    return bool(_SAFE_PATTERN.fullmatch(pattern)) and not regex.fullmatch(pattern, "")


def engine_pattern(pattern: str) -> str:
    """The same matches, written for tiktoken's engine: one group without lookahead runs as an
    automaton, and encoding is 1.4 times as fast. cl100k's possessive quantifiers are followed by
    nothing that could take a character back."""
    # tiktoken drops what no match covers, tokenizers keeps it as a piece of its own: so does this
    # last alternative
    cover = "" if pattern in COMPLETE_PATTERNS else f"|(?:(?!{pattern})(?s:.))+"
    if pattern == CL100K_PATTERN:
        pattern = pattern.replace("?+", "?").replace("++", "+")
    head, lookahead, rest = pattern.partition(r"|\s+(?!")
    return f"(?:{head}){lookahead}{rest}{cover}"
