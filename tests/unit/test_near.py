"""Near-duplicates: which pairs are found, and that nothing but the texts decides what is kept."""

import hashlib
import os
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen import near
from lumen.errors import UserError
from lumen.near import DEFAULTS, Keys, Near, bands_of, chance, explain, join, minhash_settings


def a_text(draw: random.Random, n: int = 300) -> list[str]:
    return [f"w{draw.randrange(20_000)}" for _ in range(n)]


def likeness(a: list[str], b: list[str]) -> float:
    """J of the word 5-grams, counted."""
    x, y = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(x & y) / len(x | y)


def pair_at(draw: random.Random, wanted: float) -> tuple[str, str]:
    """Two texts whose J is as wanted, to 0.02."""
    while True:
        a = a_text(draw)
        b = list(a)
        while likeness(a, b) > wanted + 0.02:
            b[draw.randrange(len(b))] = f"x{draw.randrange(20_000)}"
        if abs(likeness(a, b) - wanted) <= 0.02:
            return " ".join(a), " ".join(b)


def found(a: str, b: str, given=DEFAULTS) -> bool:
    return bool((bands_of(a, given) == bands_of(b, given)).any())


def test_like_pairs_are_found_and_others_not():
    draw = random.Random(1)
    for wanted, low, high in ((0.9, 39, 40), (0.7, 12, 32), (0.3, 0, 1)):
        n = sum(found(*pair_at(draw, wanted)) for _ in range(40))
        assert low <= n <= high, (wanted, n)
    # more bands find more, more rows fewer
    pairs = [pair_at(draw, 0.5) for _ in range(20)]
    many, few = DEFAULTS | {"bands": 60, "rows": 3}, DEFAULTS | {"bands": 3, "rows": 12}
    assert sum(found(*pair, many) for pair in pairs) == 20
    assert sum(found(*pair, few) for pair in pairs) == 0


def test_what_is_compared():
    text = " ".join(a_text(random.Random(2), 60))
    assert found(text, text.upper().replace(" ", ", ") + "!")  # case and punctuation are not
    assert not found(text, " ".join(reversed(text.split())))  # order is
    # fewer words than an n-gram has: only exact copies; their words alone would make 1 + 1 of 1 - 1
    assert not found("1 + 1 = 2", "1 - 1 = 2") and found("1 + 1", "1 + 1") and not found("", "!")
    assert not found("one two three four", "one two three four!")
    assert found("one two three four five", "One two three four five!")
    # without blanks a letter is a word
    first = "北京是中华人民共和国的首都也是全国的政治文化和国际交往中心这座城市有三千多年的建城史"
    assert found(first, first.replace("首都", "首都，") + "。") and not found(first, first[::-1])


def test_bands_are_the_same_everywhere():
    """Bytes that another version, machine or salt must not change: they are in datasets."""
    bands = bands_of("the quick brown fox jumps over the lazy dog", DEFAULTS)
    assert bands.dtype == np.uint64 and bands.shape == (14,)
    short = bands_of("fox", DEFAULTS)
    digest = hashlib.sha256(bands.astype("<u8").tobytes() + short.astype("<u8").tobytes())
    assert digest.hexdigest()[:16] == "0fd2749c7c544922"
    assert len(set(bands.tolist()) | set(short.tolist())) == 28  # a value tells its place


def test_settings():
    assert minhash_settings(None) is minhash_settings(False) is None
    assert minhash_settings(True) == DEFAULTS
    assert minhash_settings({"bands": 20}) == {"ngram": 5, "bands": 20, "rows": 8}
    for wrong in ("yes", 5, [], {"band": 3}, {"rows": 0}, {"rows": True}, {"ngram": 2.5}):
        with pytest.raises(UserError, match="E002: minhash"):
            minhash_settings(wrong)
    assert chance(0.8, DEFAULTS) == pytest.approx(0.924, abs=1e-3)  # of datatrove's table
    said = "\n".join(explain(DEFAULTS))
    assert "threshold 0.72" in said and "92.4% at 0.8" in said


def test_rensa_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match="E003: minhash needs rensa: pip install"):
        bands_of("a b c d e", DEFAULTS)
    monkeypatch.undo()
    monkeypatch.setattr(near, "ALGORITHM", 3)
    with pytest.raises(UserError, match="E003.*algorithm is 3, not 2"):
        bands_of("a b c d e", DEFAULTS)


# ---------------------------------------------------------------- clusters


def documents(n: int, seed: int) -> list[tuple[bytes, np.ndarray]]:
    """(key, bands), many of which share a band with an earlier one, some exact copies."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        key = draw.bytes(16)
        bands = draw.integers(0, 2**63, 14).astype(np.uint64)
        if made and draw.random() < 0.5:
            other = made[draw.integers(len(made))]
            if draw.random() < 0.1:
                made.append(other)
                continue
            band = draw.integers(14)
            bands[band] = other[1][band]
        made.append((key, bands))
    return made


def naive_drops(made) -> set[bytes]:
    """By flooding, one document at a time."""
    unseen = dict(enumerate(made))
    drops = set()
    while unseen:
        waiting = [unseen.popitem()[1]]
        cluster = []
        while waiting:
            here = waiting.pop()
            cluster.append(here[0])
            like = [i for i, other in unseen.items() if (other[1] == here[1]).any()]
            waiting += [unseen.pop(i) for i in like]
        drops |= set(cluster) - {min(cluster)}
    return drops


def added(folder, made) -> Near:
    mine = Near(str(folder), DEFAULTS)
    for key, bands in made:
        mine.add(key, bands)
    return mine


def test_the_same_is_dropped_whatever_the_order_chunks_and_kills(tmp_path, monkeypatch):
    monkeypatch.setattr(near, "BUFFER", 7)
    made = documents(300, 3)
    expected = naive_drops(made)
    assert 100 < len(expected) < 200
    first = added(tmp_path / "a", made).decide()
    assert (
        set(first) == expected and list(first) == sorted(expected) and len(first) == len(expected)
    )
    assert all(key in first for key in expected)
    assert not any(key in first for key, _ in made if key not in expected)
    # shuffled
    random.Random(0).shuffle(made)
    assert added(tmp_path / "b", made).decide().data == first.data
    # in two lives, the first killed after its journal: more documents, half a flush, half a record
    killed = added(tmp_path / "c", made[:100])
    killed.flush()
    journal = killed.count()
    for key, bands in made[150:190]:
        killed.add(key, bands)
    del killed
    with open(tmp_path / "c" / "band_03.bin", "ab") as file:
        file.write(b"12345")
    again = Near(str(tmp_path / "c"), DEFAULTS)
    assert journal == 100 <= again.count()
    again.truncate(journal)
    assert again.count() == 100
    for key, bands in made[100:]:
        again.add(key, bands)
    assert again.count() == 300 and again.decide().data == first.data
    # a kill before any file was written; journaled documents that are gone
    fresh = Near(str(tmp_path / "d"), DEFAULTS)
    fresh.truncate(0)
    assert fresh.count() == 0 and len(fresh.decide()) == 0
    with pytest.raises(UserError, match="E111.*0 documents, 5 were journaled"):
        fresh.truncate(5)
    # one band's file is shorter: the common part counts
    os.truncate(tmp_path / "b" / "band_13.bin", 8 * 250 + 3)
    assert Near(str(tmp_path / "b"), DEFAULTS).count() == 250
    again.remove()
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="E119"):
        Near(str(tmp_path / "file" / "x"), DEFAULTS)
    mine = Near(str(tmp_path / "x"), DEFAULTS)
    (tmp_path / "x" / "band_00.bin").mkdir()
    mine.add(bytes(16), np.zeros(14, np.uint64))
    with pytest.raises(UserError, match="E119.*band_00"):
        mine.flush()


def test_a_long_chain_is_one_cluster(tmp_path):
    """Each like the next only; the ends have nothing in common. The smallest key alone is kept."""
    draw = np.random.default_rng(4)
    bands = draw.integers(0, 2**63, (2000, 14)).astype(np.uint64)
    bands[1:, 5] = bands[:-1, 5]
    bands[1::2, 5] = draw.integers(0, 2**63, 1000)
    bands[1:, 6] = np.where(np.arange(1999) % 2 == 0, bands[:-1, 6], bands[1:, 6])
    bands[2::2, 5] = bands[1:-1:2, 5]
    keys = [draw.bytes(16) for _ in range(2000)]
    drops = added(tmp_path, list(zip(keys, bands))).decide()
    assert len(drops) == 1999 and min(keys) not in drops


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_join_makes_trees_of_what_is_connected(edges):
    parents = np.arange(30)
    left, right = np.array(edges, int).reshape(-1, 2).T
    join(parents, left, right)
    groups = [{i} for i in range(30)]
    for a, b in edges:
        if groups[a] is not groups[b]:
            groups[a] |= groups[b]
            for i in groups[b]:
                groups[i] = groups[a]
    assert parents.tolist() == [min(group) for group in groups]


@given(
    st.sets(st.binary(min_size=16, max_size=16), max_size=40), st.binary(min_size=16, max_size=16)
)
@settings(max_examples=50, deadline=None)
def test_keys_are_a_set(inside, other):
    """Zeros at the end of a key too."""
    inside |= {bytes(16), b"\x00" * 15 + b"\x01", b"\x01" + bytes(15)}
    keys = Keys(b"".join(sorted(inside)))
    assert list(keys) == sorted(inside) and all(key in keys for key in inside)
    assert (other in keys) == (other in inside)
