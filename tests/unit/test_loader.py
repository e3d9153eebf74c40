"""The loader: no token lost or padded, an order that depends on the cursor only, and every broken
file named."""

import collections
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import conftest
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen import loader, windows
from lumen.errors import UserError
from lumen.loader import BLOCK, Loader, feistel, val_rows
from lumen.windows import Shard, Source

ROOT = str(conftest.ROOT)
few = settings(max_examples=25, deadline=None)

ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def write(path, lengths, prefix="train", dtype=np.uint16, first=0):
    """Shards of the given lengths holding the ids first, first + 1, ...: each token says where it
    stands."""
    os.makedirs(path, exist_ok=True)
    for i, n in enumerate(lengths):
        np.save(
            os.path.join(path, f"{prefix}_{i:05d}.npy"), np.arange(first, first + n).astype(dtype)
        )
        first += n
    return str(path)


def add_manifest(path, fingerprint="f00d"):
    splits, dtype = {}, None
    for split in ("train", "val"):
        files = sorted(f for f in os.listdir(path) if f.startswith(split) and f.count(".") == 1)
        arrays = {f: np.load(os.path.join(path, f)) for f in files}
        shards = [{"file": f, "tokens": len(a), "max_id": int(a.max())} for f, a in arrays.items()]
        splits[split], dtype = (
            {"shards": shards},
            next(iter(arrays.values())).dtype.name if arrays else dtype,
        )
    with open(os.path.join(path, "manifest.json"), "w") as f:
        json.dump({"splits": splits, "dtype": dtype, "fingerprint": fingerprint}, f)
    return str(path)


class Fake:
    """A source of so many windows that no disk could hold them."""

    def __init__(self, windows):
        self.windows = windows


def fakes(**windows):
    return {name: Fake(n) for name, n in windows.items()}


def fails(code, f, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        f(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value.text


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(windows, "RETRY_WAITS_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(windows, "DISK_RETRY_WAITS_SECONDS", (0.03, 0.04))


# -------------------------------------------------------------------------------------------------
# the shuffle


def test_feistel_is_a_permutation():
    for n in [*range(1, 200), 255, 256, 257, 1023, 1024, 1025, 65537, 99_999]:
        assert np.array_equal(np.sort(feistel(np.arange(n), n, 7, "a", n)), np.arange(n)), n


@few
@given(st.integers(1, 2**40), st.integers(0, 2**64), st.data())
def test_feistel_of_any_size(n, seed, data):
    index = np.array(
        data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    )
    image = feistel(index, n, seed)
    assert len(set(image.tolist())) == len(index) and image.min() >= 0 and image.max() < n
    assert np.array_equal(
        image[:1], feistel(index[:1], n, seed)
    )  # whatever else is asked in the same call


def test_feistel_shuffles():
    n = 20_000
    a, b = (
        feistel(np.arange(n), n, 1, "epoch", "web", 0),
        feistel(np.arange(n), n, 1, "epoch", "web", 1),
    )
    for x, y in ((a[:-1], a[1:]), (a, b), (a, np.arange(n))):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.03
    assert len(np.unique(np.diff(a))) > n / 2  # i -> (a*i + b) mod n would have two
    orders = collections.Counter(tuple(feistel(np.arange(3), 3, seed)) for seed in range(600))
    assert len(orders) == 6 and min(orders.values()) > 60


def test_the_order_never_changes():
    """A resumed run must go on in the old order after an upgrade of Lumen, numpy or Python. Do not
    adapt this test."""
    assert feistel(np.arange(8), 1000, 1337, "epoch", "web", 2).tolist() == [
        917,
        222,
        615,
        502,
        118,
        626,
        32,
        329,
    ]
    load = Loader(fakes(a=1000, b=77), 1337, [[0, {"a": 3, "b": 1}], [1500, {"a": 1, "b": 9}]])
    assert [load.locate(r) for r in (0, 1, 1499, 1500, 5000)] == [
        ("a", 471, 0),
        ("b", 17, 0),
        ("b", 6, 4),
        ("b", 53, 4),
        ("b", 59, 45),
    ]


# -------------------------------------------------------------------------------------------------
# mixtures and the cursor

weights = st.fixed_dictionaries(
    {"a": st.integers(1, 9), "b": st.integers(0, 9), "c": st.integers(0, 3)}
)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), weights), max_size=3), weights, st.integers(0, 2**31)
)
def test_every_epoch_is_a_permutation_whatever_the_segments(later, first, seed):
    segments = [[0, first], *([row, w] for row, w in sorted(later, key=lambda x: x[0]))]
    load = Loader(fakes(a=701, b=97, c=1), seed, segments)
    rows = collections.defaultdict(list)
    for r in range(6000):
        name, window, epoch = load.locate(r)
        rows[name].append((epoch, window))
    for name, seen in rows.items():
        n = load.sources[name].windows
        assert [e for e, _ in seen] == [
            i // n for i in range(len(seen))
        ]  # epochs one after the other
        for e in range(0, len(seen), n):
            assert len(set(seen[e : e + n])) == len(seen[e : e + n])  # nothing twice in one
    assert load.epochs(6000) == {k: len(rows[k]) / load.sources[k].windows for k in "abc"}


def test_mixture_ratio_is_exact():
    load = Loader(fakes(a=10**6, b=10**6, c=10**6), 5, [[0, {"a": 0.7, "b": 0.2, "c": 0.1}]])
    share = {"a": 0.7, "b": 0.2, "c": 0.1}
    for block in range(3):
        names = collections.Counter(
            load.locate(r)[0] for r in range(block * BLOCK, (block + 1) * BLOCK)
        )
        assert all(abs(names[k] / BLOCK - share[k]) < 1 / BLOCK for k in share)
        assert names == {"a": 717, "b": 205, "c": 102}  # 716.8, 204.8, 102.4
    early = collections.Counter(load.locate(r)[0] for r in range(128))
    assert 60 < early["a"] < 115 and early["b"] > 8 and early["c"] > 2  # shuffled within the block


@few
@given(
    st.lists(st.tuples(st.integers(0, 3000), weights), max_size=3), weights, st.integers(0, 2**31)
)
def test_the_ratio_is_exact_in_every_block_of_every_segment(later, first, seed):
    """To one row in 1,024, counted from where a segment begins. A span that cuts a block at each
    end is off by no more than a block can be: q (1 - q / 1024) rows of q in it, at each end."""
    segments = [[0, first], *([row, w] for row, w in sorted(later, key=lambda x: x[0]))]
    load = Loader(fakes(a=10**6, b=10**6, c=10**6), seed, segments)
    ends = [start for start, _ in segments[1:]] + [segments[-1][0] + 3 * BLOCK]
    for (start, share), end in zip(segments, ends):
        rows = [load.locate(row)[0] for row in range(start, end)]
        wanted = {name: BLOCK * w / sum(share.values()) for name, w in share.items()}
        for at in range(0, len(rows) - BLOCK + 1, BLOCK):
            found = collections.Counter(rows[at : at + BLOCK])
            assert all(abs(found[name] - q) < 1 for name, q in wanted.items())
        middle = rows[len(rows) // 3 : 2 * len(rows) // 3 + 1]
        for name, q in wanted.items():
            off = abs(middle.count(name) - len(middle) * q / BLOCK)
            assert off <= 2 * q * (1 - q / BLOCK) + 1 + len(middle) / BLOCK


def test_a_segment_that_is_over_may_name_a_source_that_is_gone():
    """Its rows are counted as they were, so the others go on where they stood."""
    both = [[0, {"a": 1, "gone": 3}], [700, {"a": 1, "b": 1}]]
    then = Loader(fakes(a=501, b=9, gone=77), 3, both)
    now = Loader(fakes(a=501, b=9), 3, both)
    assert [then.locate(row) for row in range(700, 2500)] == [
        now.locate(row) for row in range(700, 2500)
    ]
    assert now.rows(700) == {"a": then.rows(700)["a"], "b": 0}
    assert set(now.epochs(800)) == {"a", "b"}
    text = fails("E002", Loader, fakes(a=5), 3, [[0, {"a": 1}], [7, {"a": 1, "gone": 1}]])
    assert "'gone'" in text


def test_orders_differ():
    """Between blocks, sources, epochs and seeds."""
    load = Loader(fakes(a=500, b=500), 1, [[0, {"a": 1, "b": 1}]])
    rows = [load.locate(r) for r in range(2 * BLOCK)]
    assert [name for name, _, _ in rows[:BLOCK]] != [name for name, _, _ in rows[BLOCK:]]
    one = {
        (k, e): [w for name, w, epoch in rows if (name, epoch) == (k, e)]
        for k in "ab"
        for e in (0, 1)
    }
    other = Loader(fakes(a=500), 2, [[0, {"a": 1}]])
    one["seed"] = [other.locate(r)[1] for r in range(500)]
    orders = list(one.values())
    assert (
        all(sorted(order) == list(range(500)) for order in orders)
        and len({tuple(order) for order in orders}) == 5
    )


def test_rows_and_windows_beyond_32_bits():
    load = Loader(
        fakes(big=2**33 + 7, small=3), 1, [[0, {"big": 1}], [2**32 + 5, {"big": 1, "small": 1}]]
    )
    for row in (2**31 - 1, 2**31, 2**32 + 4, 2**32 + 5, 2**45 + 123):
        name, window, epoch = load.locate(row)
        assert 0 <= window < load.sources[name].windows and epoch >= 0
    assert len({load.locate(2**31 + r)[1] for r in range(3000)}) == 3000
    assert max(load.locate(2**31 + r)[1] for r in range(100)) > 2**32
    assert load.locate(2**45)[2] > 1000
    assert load.epochs(2**32 + 5 + 2 * BLOCK) == {
        "big": (2**32 + 5 + BLOCK) / (2**33 + 7),
        "small": BLOCK / 3,
    }


def test_impossible_weights():
    for segments in (
        [[0, {"a": 1, "x": 1}]],
        [[0, {"a": -1, "b": 2}]],
        [[0, {"a": 0}]],
        [[0, {"a": float("nan")}]],
        [[5, {"a": 1}]],
        [],
        [[0, {"a": 1}], [9, {"a": 1}], [8, {"a": 1}]],
        [[0, {"a": 1, "b": 1e-9}]],  # no row in 1024: it would never be read
        [[0, {"a": 1, "empty": 1}]],
    ):
        fails("E002", Loader, fakes(a=10, b=10, empty=0), 1, segments)
    assert "'x'" in fails("E002", Loader, fakes(a=10, b=10), 1, [[0, {"a": 1, "x": 1}]])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two sources of 599 and 90 windows of 8 + 1 tokens in many shards; no token occurs twice."""
    base = tmp_path_factory.mktemp("two")
    write(base / "a", [1000, 3, 0, 1, 2796, 999], dtype=np.uint32)
    write(base / "b", [1] * 725, dtype=np.uint32, first=100_000)
    return {k: Source(str(base / k), "train", 8) for k in "ab"}


@few
@given(st.data())
def test_the_same_rows_for_any_readers_micro_batches_and_resumes(two, data):
    """The stream of all readers together, cut and resumed at random places with other sizes, is
    rows 0, 1, 2, ..."""
    segments = [[0, {"a": 2, "b": 1}], [50, {"a": 1, "b": 3}]]
    load, cursor, seen = Loader(two, 3, segments), 0, {}
    for _ in range(data.draw(st.integers(1, 3))):
        count, micro, accum, steps = (data.draw(st.integers(1, n)) for n in (4, 4, 3, 3))
        for index in range(count):
            load.start(cursor, index, count, micro, accum)
            for turn in range(steps * accum):
                row, x, y, *_ = load.next()
                step, a = divmod(turn, accum)
                assert row == cursor + step * count * micro * accum + (a * count + index) * micro
                for r in range(micro):
                    assert row + r not in seen
                    seen[row + r] = x[r].tolist(), y[r].tolist()
        cursor += count * micro * accum * steps
    load.close()
    _, x, y, *_ = Loader(two, 3, segments).batch(0, cursor)
    assert [seen[r] for r in range(cursor)] == list(zip(x.tolist(), y.tolist()))
    assert sorted(seen) == list(range(cursor))


def test_batches(two):
    load = Loader(two, 3, [[0, {"a": 1, "b": 1}]])
    _, x, y, *_ = load.batch(1000, 64)
    assert x.shape == y.shape == (64, 8) and x.dtype == y.dtype == np.int64
    assert x.flags.c_contiguous and y.flags.c_contiguous and x.flags.writeable
    assert np.array_equal(x[:, 1:], y[:, :-1]) and np.array_equal(x + 1, y)
    for r in range(64):
        name, window, _ = load.locate(1000 + r)
        assert np.array_equal(two[name].window(window), [*x[r], y[r, -1]])
    _, a, b, *_ = load.batch(1003, 2)
    assert np.array_equal(a, x[3:5]) and np.array_equal(b, y[3:5])
    assert not np.array_equal(
        x, Loader(two, 4, [[0, {"a": 1, "b": 1}]]).batch(1000, 64).x
    )  # the seed matters


# -------------------------------------------------------------------------------------------------
# shards


@few
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from(["<u2", "<u4"]),
)
def test_no_token_is_lost_or_padded(lengths, T, dtype):
    with tempfile.TemporaryDirectory() as path:
        total = sum(lengths)
        write(path, lengths, dtype=dtype, first=7)
        if total < T + 1:
            text = fails("E114", Source, path, "train", T)
            assert all(str(n) in text for n in (total, T, T + 1))
            return
        source = Source(path, "train", T)
        assert (source.tokens, source.dtype, source.bare) == (total, np.dtype(dtype), True)
        assert (
            source.windows == (total - 1) // T
            and source.unused == total - 1 - source.windows * T < T
        )
        for i in range(source.windows):
            assert source.window(i).dtype == np.int64
            assert source.window(i).tolist() == list(range(7 + i * T, 7 + i * T + T + 1))
        for i in (-1, source.windows):
            with pytest.raises(AssertionError):
                source.window(i)


def test_lunaris_defects(tmp_path):
    """Its last window was padded with -1, in uint16 the id 65535, when total % T == 0; a resume
    read the epoch's start again; val shards were trained on; a window over more than two shards
    failed."""
    path = write(tmp_path / "d", [3, 2, 5, 4, 2])
    write(path, [16], prefix="val", first=50)
    source = Source(path, "train", 4)  # 16 tokens
    load = Loader({"d": source}, 1, [[0, {"d": 1}]], vocab_size=16)
    _, x, y, *_ = load.batch(0, source.windows)
    assert (
        source.windows == 3 and y.max() <= 15 and sorted(y.ravel().tolist()) == list(range(1, 13))
    )
    load.start(0, 0, 1, 1, 1)
    before = [load.next().y.tolist() for _ in range(2)]
    again = Loader({"d": source}, 1, [[0, {"d": 1}]])
    again.start(2, 0, 1, 1, 1)
    assert again.next()[2].tolist() not in before
    load.close()
    again.close()


def test_ids_at_the_limits(tmp_path):
    for dtype, ids in (
        (np.uint16, [0, 65535, 1, 65534]),
        (np.uint32, [0, 65536, 200_018, 2**32 - 1]),
    ):
        path = str(tmp_path / np.dtype(dtype).name)
        os.makedirs(path)
        np.save(os.path.join(path, "x.npy"), np.array(ids, dtype))
        assert Source(path, "train", 3).window(0).tolist() == ids


def test_bare_folders(tmp_path):
    path = write(tmp_path / "d", [50, 51])
    for name in ("train_00000.docs.npy", "token_bytes.npy", "._train_00000.npy"):
        np.save(os.path.join(path, name), np.zeros(9, np.uint8))
    train, val = Source(path, "train", 10), Source(path, "val", 10)
    assert (train.tokens, train.windows, train.unused, val.windows) == (101, 10, 0, 0)
    assert train.bare and train.manifest is None and train.max_id is None
    write(path, [30], prefix="val", first=500)
    train, val = Source(path, "train", 10, 0.3), Source(path, "val", 10, 0.3)
    assert (train.windows, val.windows) == (10, 2) and val.window(0)[0] == 500
    shutil.copytree(path, tmp_path / "only_val", ignore=shutil.ignore_patterns("train*"))
    fails("E114", Source, str(tmp_path / "only_val"), "train", 10)


@few
@given(st.integers(2, 300), st.floats(0, 0.9), st.integers(1, 7))
def test_held_out_tail(total, fraction, T):
    with tempfile.TemporaryDirectory() as path:
        write(path, [total // 3, total - total // 3])
        if total < T + 1:
            return
        train, val = Source(path, "train", T, fraction), Source(path, "val", T, fraction)
        n = (total - 1) // T
        assert (
            train.windows + val.windows == n
            and train.windows >= 1
            and train.fingerprint == val.fingerprint
        )
        assert abs(val.windows - n * fraction) <= 1 and (val.windows > 0) == (
            fraction > 0 and n > 1
        )
        targets = [
            t for s in (train, val) for i in range(s.windows) for t in s.window(i)[1:].tolist()
        ]
        assert targets == list(range(1, n * T + 1))  # each once: no overlap, no gap


def test_fingerprints(tmp_path):
    a, b = write(tmp_path / "a", [50, 60]), write(tmp_path / "b", [50, 61])
    one = Source(a, "train", 4).fingerprint
    shutil.copytree(a, tmp_path / "copy")
    assert Source(str(tmp_path / "copy"), "train", 8).fingerprint == one
    assert Source(b, "train", 4).fingerprint != one
    assert Source(a, "train", 4, 0.1).fingerprint != one  # another end of train is another order
    os.rename(os.path.join(a, "train_00001.npy"), os.path.join(a, "train_00002.npy"))
    assert Source(a, "train", 4).fingerprint != one


def test_manifest(tmp_path):
    path = write(tmp_path / "d", [50, 60], dtype=np.uint32)
    write(path, [30], prefix="val", dtype=np.uint32, first=500)
    np.save(
        os.path.join(path, "stray.npy"), np.zeros(9, np.uint16)
    )  # not in the manifest: not ours
    train, val = (Source(add_manifest(path), split, 10, 0.5) for split in ("train", "val"))
    assert (train.windows, val.windows, train.max_id, val.max_id) == (10, 2, 109, 529)
    assert not train.bare and train.fingerprint == "f00d" and train.manifest["dtype"] == "uint32"
    train.check_vocab(110)
    text = fails("E113", train.check_vocab, 109)
    assert path in text and "id 109" in text and "vocab_size is 109" in text and "tokenizer" in text
    fails("E113", Loader, {"d": train}, 1, [[0, {"d": 1}]], 109)
    os.remove(os.path.join(path, "val_00000.npy"))
    assert Source(add_manifest(path), "val", 10).windows == 0


def test_damaged_shards_of_a_manifest(tmp_path):
    for damage in (
        "missing",
        "cut",
        "cut in its header",
        "empty",
        "longer",
        "other length",
        "other dtype",
        "manifest",
    ):
        path = add_manifest(write(tmp_path / damage, [50, 60]))
        file = os.path.join(path, "train_00001.npy")
        size = os.path.getsize(file)
        if damage == "missing":
            os.remove(file)
        elif damage.startswith(("cut", "empty")):
            os.truncate(file, {"cut": size - 1, "cut in its header": 70, "empty": 0}[damage])
        elif damage == "longer":
            os.truncate(file, size + 2)
        elif damage == "manifest":
            file = os.path.join(path, "manifest.json")
            os.truncate(file, 30)
        else:
            np.save(
                file,
                np.arange(
                    60 if damage == "other dtype" else 59,
                    dtype="<u4" if "dtype" in damage else "<u2",
                ),
            )
        text = fails("E112" if damage == "other dtype" else "E111", Source, path, "train", 4)
        assert file in text, damage
        if damage == "cut":
            assert f"{size} bytes" in text and f"{size - 1} bytes" in text
        if damage == "other length":
            assert "60 tokens" in text and "(59,)" in text


def test_what_is_no_shard(tmp_path):
    rows = {
        "float": (np.ones(9, np.float32), "float32"),
        "2-D": (np.ones((3, 3), np.uint16), "(3, 3)"),
        "signed": (np.ones(9, np.int64), "int64"),
        "big endian": (np.ones(9, ">u2"), ">u2"),
        "pickled": (np.array([{}, []], object), "pickle"),
    }
    for name, (array, word) in rows.items():
        os.makedirs(tmp_path / name)
        np.save(tmp_path / name / "x.npy", array, allow_pickle=True)
        text = fails("E112", Source, str(tmp_path / name), "train", 2)
        assert word in text and "x.npy" in text and "np.save" in text, text
    for name, file, data, word in (
        ("raw npy", "x.npy", np.arange(300, dtype=np.uint16).tobytes(), "raw tokens"),
        ("raw bin", "train.bin", np.arange(300, dtype=np.uint16).tobytes(), "np.fromfile"),
        ("pickle", "x.npy", pickle.dumps([1, 2]), "pickle"),
        ("zip", "x.npy", b"PK\3\4 and so on", ".npz"),
    ):
        os.makedirs(tmp_path / name)
        (tmp_path / name / file).write_bytes(data)
        text = fails("E112", Source, str(tmp_path / name), "train", 2)
        assert word in text and file in text, text
    assert "raw tokens" in fails(
        "E112", Source, str(tmp_path / "raw bin" / "train.bin"), "train", 2
    )
    path = write(tmp_path / "mixed", [50])
    write(path, [50], prefix="z", dtype=np.uint32)
    text = fails("E112", Source, path, "train", 2)
    assert "uint16" in text and "uint32" in text and "z_00000.npy" in text
    for version in ((1, 0), (2, 0)):  # other programs may write the second
        with open(tmp_path / "v.npy", "wb") as f:
            np.lib.format.write_array(f, np.arange(9, dtype=np.uint16), version=version)
        assert Shard(str(tmp_path / "v.npy")).read(2, 3).tolist() == [2, 3, 4]


def test_no_dataset(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        text = fails("E110", Source, str(path), "train", 2)
        assert f"python prepare_data.py SOURCE --out {path} --tokenizer bpe:8192" in text
    path = write(tmp_path / "half", [50])
    with open(os.path.join(path, "progress.json"), "w") as f:
        f.write("{}")
    assert "not finished" in fails("E110", Source, path, "train", 2)
    Source(add_manifest(path), "train", 2)  # the manifest is written last


def test_vocab_of_bare_shards(tmp_path):
    path = write(tmp_path / "d", [50])
    load = Loader({"d": Source(path, "train", 7)}, 1, [[0, {"d": 1}]], vocab_size=49)
    text = fails("E113", load.batch, 0, 7)  # the 50th token is target of the last window
    assert path in text and "id 49" in text and "vocab_size is 49" in text
    Loader({"d": Source(path, "train", 7)}, 1, [[0, {"d": 1}]], vocab_size=50).batch(0, 7)


# -------------------------------------------------------------------------------------------------
# shards that change under the run


def test_shard_changes_under_the_run(tmp_path, quick):
    path = write(tmp_path / "d", [50, 60])
    file = os.path.join(path, "train_00001.npy")
    source = Source(path, "train", 10)
    assert source.window(7)[0] == 70
    os.utime(file, (1, 1))  # touched, or copied again: same size, same header
    assert source.window(7)[0] == 70
    shutil.copy(file, str(tmp_path / "copy"))
    os.replace(tmp_path / "copy", file)
    assert source.window(7)[0] == 70
    np.save(
        file, np.arange(60, dtype="<u2") + 900
    )  # what is in the file counts, not what an old descriptor shows
    os.utime(file, (2, 2))
    assert source.window(7)[0] == 920
    size = os.path.getsize(file)
    for damage in (
        lambda: os.truncate(file, size - 2),
        lambda: np.save(
            file, np.arange(30, dtype="<u4")
        ),  # by chance as long as before: the header is not
        lambda: os.remove(file),
    ):
        damage()
        text = fails("E111", source.window, 7)
        assert file in text and f"{size} bytes" in text
        assert source.window(1)[0] == 10  # the other shard is as good as ever
    np.save(file, np.arange(60, dtype="<u2"))
    assert source.window(7)[0] == 20


def test_truncated_between_check_and_read(tmp_path, quick, monkeypatch):
    path = write(tmp_path / "d", [50])
    source, real = Source(path, "train", 10), os.pread

    def pread(fd, n, at):
        os.truncate(os.path.join(path, "train_00000.npy"), 200)
        return real(fd, n, at)

    monkeypatch.setattr(os, "pread", pread)
    fails("E111", source.window, 3)


def test_stale_handle(tmp_path, quick, monkeypatch):
    """A network disk that came back: the old descriptor stays dead, a new one works."""
    path = write(tmp_path / "d", [50])
    source, real = Source(path, "train", 10), os.pread
    source.window(0)
    dead = windows.opened(source.shards[0].path, *source.shards[0].stamp)

    def pread(fd, n, at):
        if fd == dead.fileno():
            raise OSError(116, "Stale file handle")
        return real(fd, n, at)

    monkeypatch.setattr(os, "pread", pread)
    assert source.window(3)[0] == 30


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_given_more_time_than_a_file_that_changed(
    tmp_path, quick, monkeypatch, number
):
    path = write(tmp_path / "d", [50])
    source, tries, waits = Source(path, "train", 10), [], []

    def failing(times, real):
        def call(*args):
            tries.append(args)
            if len(tries) <= times:
                raise OSError(number, os.strerror(number), *args[:1] if real is os.stat else ())
            return real(*args)

        return call

    monkeypatch.setattr(windows.time, "sleep", waits.append)
    for name in ("pread", "stat"):
        for times in (2, 4):  # of five tries
            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing(times, getattr(os, name)))
                assert source.window(3)[0] == 30
            assert (
                len(tries) > times
                and waits
                == [*windows.RETRY_WAITS_SECONDS, *windows.DISK_RETRY_WAITS_SECONDS][:times]
            )
            tries.clear()
            waits.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(99, getattr(os, name)))
            text = fails("E111", source.window, 3)
        assert (
            "cannot be read" in text and os.strerror(number) in text and "train_00000.npy" in text
        )
        assert waits == [*windows.RETRY_WAITS_SECONDS, *windows.DISK_RETRY_WAITS_SECONDS]
        tries.clear()
        waits.clear()
    os.truncate(
        os.path.join(path, "train_00000.npy"), 200
    )  # nothing comes back from this: it is named at once
    assert "changed" in fails("E111", source.window, 3) and waits == [*windows.RETRY_WAITS_SECONDS]


def test_shard_comes_back_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "RETRY_WAITS_SECONDS", (0.05, 0.8))
    path = write(tmp_path / "d", [50])
    file, source = os.path.join(path, "train_00000.npy"), Source(path, "train", 10)
    os.rename(file, file + ".away")
    timer = threading.Timer(0.3, os.rename, (file + ".away", file))
    timer.start()
    assert source.window(2)[0] == 20
    timer.join()


def test_truncation_is_no_crash(tmp_path):
    """Really truncated, in the midst of reading: a memory map dies here by SIGBUS, not every time
    but often enough."""
    path = str(tmp_path / "d")
    os.makedirs(path)
    np.save(os.path.join(path, "train_00000.npy"), np.zeros(4_000_000, np.uint16))
    for _ in range(3):
        run = [sys.executable, "tests/programs/reading.py", path]
        child = subprocess.Popen(
            run, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "reading\n"
        os.truncate(os.path.join(path, "train_00000.npy"), 1000)
        _, err = child.communicate(timeout=20)
        assert (
            child.returncode == 1
            and err.startswith("E111")
            and "8000128 bytes" in err
            and "1000" in err
        ), err
        np.save(os.path.join(path, "train_00000.npy"), np.zeros(4_000_000, np.uint16))


def test_thousands_of_shards_under_a_small_limit_of_open_files(tmp_path):
    path = write(tmp_path / "d", [5] * 800)
    subprocess.run(
        [sys.executable, "tests/programs/many_shards.py", path],
        cwd=ROOT,
        env=ENV,
        check=True,
        timeout=20,
    )


# -------------------------------------------------------------------------------------------------
# the thread


@pytest.fixture
def started(monkeypatch):
    """The threads that this test's loaders have started: others of this process are not its own."""
    pools = []

    def pool(*words):
        pools.append(ThreadPoolExecutor(*words))
        return pools[-1]

    monkeypatch.setattr(loader, "ThreadPoolExecutor", pool)
    return lambda: [t for p in pools for t in p._threads if t.is_alive()]


def test_stream_seek_and_close(two, started):
    load = Loader(two, 3, [[0, {"a": 1, "b": 1}]])
    load.close()
    load.start(0, 0, 1, 2, 1)
    assert [load.next()[0] for _ in range(6)] == [0, 2, 4, 6, 8, 10] and len(started()) == 1
    load.start(1000, 1, 2, 4, 2)  # a seek: nothing of the old stream comes through
    for row in (1004, 1012):
        first, x, y, *_ = load.next()
        assert (
            first == row
            and np.array_equal(x, load.batch(row, 4).x)
            and np.array_equal(y, load.batch(row, 4).y)
        )
    load.start(8, 0, 1, 2, 1)
    assert load.next()[0] == 8 and len(started()) == 1, "that of the old stream has ended"
    load.close()
    load.close()
    assert not started()


def test_it_reads_ahead_but_not_without_end(two, monkeypatch):
    load, rows = Loader(two, 3, [[0, {"a": 1}]]), []
    real = load.batch
    monkeypatch.setattr(load, "batch", lambda row, n: rows.append(row) or real(row, n))
    load.start(0, 0, 1, 1, 1)
    load.next()
    until = time.time() + 5
    while len(rows) < loader.MICRO_BATCHES_AHEAD and time.time() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert rows == list(range(loader.MICRO_BATCHES_AHEAD))
    load.close()


def test_errors_of_the_thread_are_raised_by_next(tmp_path, quick, monkeypatch):
    path = write(tmp_path / "d", [5000])
    load = Loader({"d": Source(path, "train", 10)}, 1, [[0, {"d": 1}]])
    load.start(0, 0, 1, 4, 1)
    assert (row := load.next()[0]) == 0
    os.rename(path, path + ".away")
    with pytest.raises(UserError) as caught:
        for _ in range(20):
            row = load.next()[0]
    assert caught.value.code == "E111" and row < 20
    fails("E111", load.next)
    os.rename(path + ".away", path)
    load.start(row + 4, 0, 1, 4, 1)
    assert load.next()[0] == row + 4
    real = load.batch
    monkeypatch.setattr(load, "batch", lambda row, n: 1 / 0 if row == 8 else real(row, n))
    load.start(0, 0, 1, 4, 1)
    assert [load.next()[0], load.next()[0]] == [0, 4]
    for _ in range(3):  # every time, instead of row 12
        with pytest.raises(ZeroDivisionError):
            load.next()
    load.close()


def test_an_abandoned_stream_does_not_keep_the_interpreter_alive(tmp_path):
    path = write(tmp_path / "d", [5000])
    run = [sys.executable, "tests/programs/abandoning.py", path]
    child = subprocess.run(run, cwd=ROOT, env=ENV, timeout=20, stderr=subprocess.PIPE, text=True)
    assert (
        child.returncode == 1
        and child.stderr.count("Traceback") == 1
        and "the trainer's" in child.stderr
    )


def test_evaluation_beside_the_thread(two, monkeypatch):
    """Two threads read many shards through a few descriptors: none may be closed under the
    other."""
    small = windows.functools.lru_cache(maxsize=2)(windows.opened.__wrapped__)
    monkeypatch.setattr(windows, "opened", small)
    load = Loader(two, 3, [[0, {"a": 1, "b": 8}]])
    _, x, y, *_ = load.batch(0, 1200)
    load.start(0, 0, 1, 4, 1)
    for _ in range(300):
        row, a, b, *_ = load.next()
        _, c, d, *_ = load.batch(1196 - row, 4)
        assert np.array_equal(a, x[row : row + 4]) and np.array_equal(b, y[row : row + 4])
        assert np.array_equal(c, x[1196 - row : 1200 - row]) and np.array_equal(
            d, y[1196 - row : 1200 - row]
        )
    load.close()


# -------------------------------------------------------------------------------------------------
# validation


@few
@given(
    st.dictionaries(
        st.sampled_from("abcde"), st.tuples(st.integers(0, 60), st.floats(0, 5)), min_size=1
    ),
    st.data(),
)
def test_val_rows(made, data):
    count = data.draw(st.integers(0, 200))
    sources, shares = (
        {k: Fake(n) for k, (n, _) in made.items()},
        {k: w for k, (_, w) in made.items()},
    )
    rows = val_rows(sources, shares, count)
    able = {k: n for k, (n, w) in made.items() if n and w}
    taken = collections.Counter(name for name, _ in rows)
    assert len(rows) == min(max(count, len(able)), sum(able.values())) and set(taken) == set(able)
    for name, n in taken.items():
        assert [i for k, i in rows if k == name] == list(range(n)) and n <= able[name]
    assert rows == val_rows(dict(reversed(sources.items())), shares, count)
    if all(n == 60 for n in able.values()) and able and count <= 60:
        for name, n in taken.items():
            assert abs(n - count * shares[name] / sum(shares[k] for k in able)) <= len(able)


def test_val_rows_by_weight():
    rows = val_rows(fakes(a=1000, b=1000, c=4, d=0), {"a": 6, "b": 3, "c": 1, "d": 5}, 100)
    taken = collections.Counter(name for name, _ in rows)
    assert taken["c"] == 4 and taken["a"] + taken["b"] == 96 and abs(taken["a"] - 64) <= 1
