"""Text out of nothing, the same on every machine: what `synthetic:N` is made of."""

from __future__ import annotations

import hashlib

NAMES = "Ada Ben Cleo Dan Eva Finn Gwen Hugo Iris Jon Kim Leo Mia Noah Olga Paul Rosa Sam Tess Uma"
THINGS = (
    "apple book candle drum egg feather glove hat jar key lamp map nut orange pen ring shell spoon "
    "stone"
)
PLACES = "garden kitchen forest market river school attic harbour station tower bakery library"
COLOURS = "red blue green yellow black white brown silver"


def synthetic_document(seed: int, n: int) -> str:
    """Document n: sums, sorted lists, things to recall and small stories. Integers only, so equal
    on every machine."""
    first = hashlib.blake2b(f"{seed}:{n}".encode(), digest_size=8).digest()
    state = int.from_bytes(first, "little")

    def pick(below: int) -> int:  # splitmix64 (Steele, Lea and Flood 2014)
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return (z ^ z >> 31) % below

    def one(words: str) -> str:
        choices = words.split()
        return choices[pick(len(choices))]

    paragraphs = []
    for _ in range(3 + pick(5)):  # the order of the draws is part of the promise
        a = pick(900)
        b = pick(30)
        kind = pick(4)
        who, other, thing, colour = one(NAMES), one(NAMES), one(THINGS), one(COLOURS)
        if kind == 0:
            text = f"{a} + {b} = {a + b}. {a + b} - {a} = {b}. {a} * {b} = {a * b}."
        elif kind == 1:
            numbers = [pick(100) for _ in range(4 + pick(6))]
            ordered = " ".join(map(str, sorted(numbers)))
            text = f"Sort: {' '.join(map(str, numbers))}\nSorted: {ordered}"
        elif kind == 2:
            owners = {}
            for _ in range(2 + pick(4)):
                name = one(NAMES)
                owners[name] = f"the {one(COLOURS)} {one(THINGS)}"
            owners[who] = f"a {thing}"
            facts = ". ".join(f"{owner} has {it}" for owner, it in sorted(owners.items()))
            text = f"{facts}.\nQuestion: What does {who} have?\nAnswer: {owners[who]}."
        else:
            text = (
                f"{who} went to the {one(PLACES)} to look for a {thing}. There {who} met {other}. "
            )
            text += f'"I have only a {colour} {thing}," said {other}. '
            text += f"{who} took the {colour} {thing} home."
        paragraphs.append(text)
    return "\n\n".join(paragraphs) + "\n"
