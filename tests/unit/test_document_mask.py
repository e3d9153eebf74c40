"""Documents of a row do not see each other: packed, they train as they would apart. And what rows,
masks and documents are read from the shards."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_models import KINDS, ids, make

import kernels_attention
import lumen.windows
from kernels_attention import Documents, bias_of, documents
from lumen import plan
from lumen.config import Config
from lumen.errors import UserError
from lumen.evaluation import Loop
from lumen.feed import Feed
from lumen.loader import Loader
from lumen.windows import Source, Sums
from train import Parallel

B, T = 2, 32
few = settings(max_examples=3, deadline=None, derandomize=True)
many = settings(max_examples=60, deadline=None)
EXACT = sorted(set(KINDS) - {"mod random"})  # it draws what it keeps

# where documents begin behind the first: none, each place, the first place, the last
cuts = st.lists(
    st.one_of(st.just(set()), st.just({1, T - 1}), st.sets(st.integers(1, T - 1))),
    min_size=B,
    max_size=B,
)


def numbers(begins) -> torch.Tensor:
    """(B, T): the document of each position."""
    of = torch.zeros(len(begins), T, dtype=torch.long)
    for row, places in zip(of, begins):
        row[sorted(places)] = 1
    return of.cumsum(1)


def parts(begins):
    """(row, where a document begins, where it ends)"""
    for b, places in enumerate(begins):
        ends = [0, *sorted(places), T]
        yield from ((b, first, end) for first, end in zip(ends, ends[1:]))


def targets(seed=1):
    y = ids(B, T, seed)
    y[:, ::5] = -1
    return y


def passed(model, x, y, train: bool, docs=None):
    """(total, sums, gradients) of one pass."""
    model.train(train)
    model.zero_grad()
    with torch.set_grad_enabled(train):
        total, sums = model(x, targets=y, docs=docs)
    grads = {}
    if train:
        total.backward()
        for name, p in model.named_parameters():
            grads[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return total.detach(), sums, grads


def assert_packed_equals_separate(kind, begins, train=True, causal=True):
    model, x, y = make(**KINDS[kind]), ids(B, T), targets()
    model.causal = causal
    total, sums, grads = passed(model, x, y, train, numbers(begins))
    apart, alone, added = 0.0, {}, {}
    for b, first, end in parts(begins):
        row = slice(b, b + 1), slice(first, end)
        one, own, own_grads = passed(model, x[row], y[row], train)
        apart += one
        for name, value in own.items():
            if name == "mod.counts":  # by position: alone there are fewer
                value = F.pad(value, (0, T - value.shape[1]))
            alone[name] = alone.get(name, 0) + value
        for name, grad in own_grads.items():
            added[name] = added.get(name, 0) + grad
    assert torch.allclose(total, apart, rtol=1e-5)
    assert set(sums) == set(alone)
    for name, value in sums.items():
        assert torch.allclose(value.float(), alone[name].float(), rtol=1e-4, atol=1e-3), name
    # of documents of one token attention's is 0 but for rounding, which is of the size of all
    rounding = 1e-7 * sum(grad.norm() for grad in added.values())
    for name, grad in grads.items():
        assert (grad - added[name]).norm() <= 1e-5 * added[name].norm() + rounding, name


# ---------------------------------------------------------------- packed equals separate


@pytest.mark.parametrize("kind", EXACT)
@few
@given(cuts)
def test_packed_equals_separate(kind, begins):
    """Loss, every gradient, every statistic: documents of length 1, at the first and last place."""
    assert_packed_equals_separate(kind, begins)


@pytest.mark.nightly
@pytest.mark.parametrize("train", (True, False))
@pytest.mark.parametrize("kind", EXACT)
@many
@given(cuts)
def test_packed_equals_separate_on_many(kind, train, begins):
    assert_packed_equals_separate(kind, begins, train)


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "as trained"))
@pytest.mark.parametrize("kind", ("dense", "mixtral", "mod", "mod random", "hybrid ffn"))
def test_evaluation_too(kind, causal):
    begins = [{1, 9, T - 1}, {20}]
    if kind != "mod random" or causal:
        assert_packed_equals_separate(kind, begins, train=False, causal=causal)


@pytest.mark.parametrize("kind", ("dense", "fine", "mod", "mod static", "hybrid", "hybrid ffn"))
@pytest.mark.parametrize("train", (True, False))
@torch.no_grad()
def test_a_token_changes_nothing_in_another_document(kind, train):
    model, x = make(**KINDS[kind]).train(train), ids(B, T)
    begins = [{5, 17, T - 1}, {1}]
    of = numbers(begins)
    before = model(x, docs=of)
    for b, first, end in parts(begins):
        other = x.clone()
        other[b, first] = (x[b, first] + 1) % 97
        # not to the bit: how many tokens an expert has, and a layer keeps, changes how sums round
        changed = (model(other, docs=of) - before).abs().amax(-1) > 1e-5  # (B, T)
        assert changed[b, first], "or it would be no test"
        changed[b, first:end] = False
        assert not changed.any(), (b, first)


@pytest.mark.parametrize("kind", EXACT)
@torch.no_grad()
def test_one_document_a_row_is_plain_causal_attention(kind):
    model, x, y = make(**KINDS[kind]), ids(B, T), targets()
    plain, _ = model(x, targets=y)
    packed, _ = model(x, targets=y, docs=torch.zeros(B, T))
    assert torch.allclose(packed, plain, rtol=1e-6)
    if kind in ("dense", "mixtral"):
        assert torch.equal(model(x, docs=torch.zeros(B, T)), model(x))


@pytest.mark.parametrize("how", ("block", "selective"))
@pytest.mark.parametrize("kind", ("dense", "hybrid"))
def test_recomputation_gives_the_same_bits(kind, how):
    model, x, y, of = make(**KINDS[kind]), ids(B, T), targets(), numbers([{3, 4}, {30}])
    want = passed(model, x, y, True, of)[2]
    model.recompute = how
    calls, real = [], kernels_attention.parts

    def counted(*tensors):
        calls.append(len(tensors))
        return real(*tensors)

    kernels_attention.parts = counted
    try:
        got = passed(model, x, y, True, of)[2]
    finally:
        kernels_attention.parts = real
    assert all(torch.equal(got[name], want[name]) for name in want)
    forward = [n for n in calls if n == 6]
    layers = len(model.blocks)
    # selective keeps what attention gave
    assert len(forward) == (2 * layers if how == "block" else layers)


@pytest.mark.parametrize("kind", ("dense", pytest.param("hybrid", marks=pytest.mark.nightly)))
def test_blocks_compile_whole_and_another_number_of_documents_is_right_too(kind):
    # what other tests compiled of the same code counts to the limit of 8 graphs
    torch.compiler.reset()
    model, x, y, of = make(**KINDS[kind]), ids(B, T), targets(), numbers([{3, 4}, {30}])
    want = passed(model, x, y, True, of)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for most in (4, 8):
        total, _, grads = passed(model, x, y, True, Documents(of, most))
        assert torch.allclose(total, want[0], rtol=1e-6)
        assert all(torch.allclose(grads[n], g, atol=2e-4) for n, g in want[2].items())


@torch.no_grad()
def test_more_places_for_documents_than_there_are_change_nothing():
    for kind in ("dense", "mixtral", "mod", "hybrid"):
        model, x, y = make(**KINDS[kind]), ids(B, T), targets()
        of = numbers([{3, 4}, {30}])
        totals = [model(x, targets=y, docs=Documents(of, n))[0] for n in (3, 16, T)]
        assert torch.allclose(torch.stack(totals), totals[0], rtol=1e-6), kind


def test_mod_lets_no_more_through_than_documents_need():
    """Each rounds up, so at most one more a document than the row alone: its shapes follow."""
    model = make(mod_capacity=0.25)
    rows, of = [], numbers([set(), set()])
    model.blocks[0].attn.register_forward_hook(lambda m, i, o: rows.append(i[0].shape[1]))
    for most in (1, 2, 8, T):
        model(ids(B, T), docs=Documents(of, most))
    assert rows == [8, 9, 15, T]


def test_what_fills_a_row_up_visits_no_expert():
    """It costs no arithmetic there, and takes no place where capacity is limited."""
    model = make(**KINDS["hybrid"])
    seen = []
    experts = model.blocks[0].ffn.experts
    experts.register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    model(ids(B, T), docs=Documents(numbers([set(), {5}]), 8))
    (chosen,) = seen  # (B n, K)
    n = 16 + 8 - 1
    chosen = chosen.view(B, n, -1)
    slots = len(experts.w2)
    assert (chosen[0, :16] < slots).all() and (chosen[0, 16:] >= slots).all()
    assert (chosen[1, :17] < slots).all() and (chosen[1, 17:] >= slots).all()


# ---------------------------------------------------------------- attention


def qkv(dtype=torch.float64, H=4, G=2, D=8):
    made = [torch.randn(B, T, heads, D, dtype=dtype, requires_grad=True) for heads in (H, G, G)]
    return made, torch.randn(B, T, H, D, dtype=dtype)


def by_bias(q, k, v, of):
    """The formula, each key head repeated for its query heads."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias_of(of, q.dtype)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_attention_document_by_document_equals_the_formula(dtype):
    torch.manual_seed(0)
    (q, k, v), dout = qkv(dtype)
    of = numbers([{1, 2, 12, T - 1}, set()])
    docs = documents(of, "sdpa", dtype)
    got = kernels_attention.attention(q, k, v, "sdpa", docs)
    want = by_bias(q.double(), k.double(), v.double(), of)
    error = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    assert torch.allclose(got.double(), want, atol=error)
    grads = torch.autograd.grad(got, (q, k, v), dout)
    wanted = torch.autograd.grad(want, (q, k, v), dout.double())
    for grad, want in zip(grads, wanted):
        assert torch.allclose(grad.double(), want.double(), atol=5 * error)


def test_the_operator_keeps_torchs_rules():
    (q, k, v), _ = qkv(torch.float32)
    docs = documents(numbers([{3}, {9, 10}]), "sdpa", q.dtype)
    flat = [t.detach().flatten(0, 1).requires_grad_() for t in (q, k, v)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.lumen.attend, (*flat, docs.bounds()), test_utils=checks)


def test_with_a_bias_it_is_the_formula_too():
    """What sdpa does where there is no kernel for documents, off the CPU."""
    (q, k, v), _ = qkv()
    of = numbers([{1, 2, 12, T - 1}, {16}])
    docs = documents(of, "sdpa", q.dtype)._replace(bias=bias_of(of, q.dtype))
    got = kernels_attention.attention(q, k, v, "sdpa", docs)
    assert torch.allclose(got, by_bias(q, k, v, of), atol=1e-12)


# ---------------------------------------------------------------- rows from shards


def dataset(path, shards, T=T, kind="text", split="train", **more) -> str:
    """shards: [(tokens, docs, mask or None)]"""
    os.makedirs(path, exist_ok=True)
    entries = []
    for i, (tokens, docs, mask) in enumerate(shards):
        name = f"{split}_{i:05d}"
        entry = {"file": f"{name}.npy", "docs_file": f"{name}.docs.npy", "tokens": len(tokens)}
        entry["max_id"] = int(max(tokens, default=0))
        np.save(path / f"{name}.npy", np.array(tokens, np.uint16))
        np.save(path / f"{name}.docs.npy", np.array([*docs, len(tokens)], np.uint64))
        if mask is not None:
            np.save(path / f"{name}.mask.npy", np.array(mask, np.uint8))
            entry["mask_file"] = f"{name}.mask.npy"
        entries.append(entry)
    manifest = {"fingerprint": "f", "dtype": "uint16", "kind": kind}
    manifest["splits"] = {split: {"shards": entries}}
    (path / "manifest.json").write_text(json.dumps(manifest | more))
    return str(path)


def fails(code, f, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        f(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value.text


@few
@given(st.data())
def test_rows_of_text_know_their_documents(tmp_path_factory, data):
    """Against a walk over all tokens, however the shards are cut: a document may span two, and a
    window's end and begin are one token."""
    path = tmp_path_factory.mktemp("rows")
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=20, max_size=40))
    begins = np.concatenate([[0], np.cumsum(lengths)])
    total = int(begins[-1])
    borders = sorted({0, total, *data.draw(st.lists(st.integers(1, total - 1), max_size=3))})
    shards = []
    for first, end in zip(borders, borders[1:]):
        docs = [int(b) - first for b in begins if first <= b < end]
        shards.append((range(first, end), docs, None))
    source = Source(dataset(path, shards), "train", 10, document_mask=True)
    plain = Source(str(path), "train", 10)
    assert plain.windows == source.windows and not plain.docs and plain.row(0)[2] is None
    number = np.cumsum(np.isin(np.arange(total), begins))  # of the document of each token
    for i in range(source.windows):
        x, y, docs = source.row(i)
        own = number[x]
        assert np.array_equal(docs, own - own[0]) and docs.dtype == np.int32
        follows = number[np.minimum(x + 1, total - 1)] == own
        assert np.array_equal(y, np.where(follows, x + 1, -1))
        assert np.array_equal(plain.row(i)[1], x + 1)


def test_conversations_are_rows_with_masks(tmp_path):
    rows = {"rows": {"length": 6}}
    mask = [0, 1, 0, 1, 1, 0] + [1, 0, 0, 0, 0, 1]
    shards = [(range(12), [0, 3, 6], mask), (range(12, 18), [0], [1] * 6)]
    path = dataset(tmp_path / "d", shards, kind="chat", **rows)
    source = Source(path, "train", 5, document_mask=None)
    assert source.document_mask and (source.windows, source.unused) == (3, 0)
    x, y, docs = source.row(0)
    assert (x.tolist(), docs.tolist()) == ([0, 1, 2, 3, 4], [0, 0, 0, 1, 1])
    assert y.tolist() == [1, -1, -1, 4, -1], "3 begins another document, though its mask is 1"
    assert Source(path, "train", 5).row(0)[1].tolist() == [1, -1, 3, 4, -1]
    assert source.row(1)[1].tolist() == [-1, -1, -1, -1, 11]
    assert source.row(2)[0].tolist() == [12, 13, 14, 15, 16] and not source.row(2)[2].any()
    text = fails("E123", Source, path, "train", 8)
    assert "rows of 5 positions" in text and "max_seq_len is 8" in text and "--seq_len 8" in text
    pairs = dataset(tmp_path / "p", shards, kind="pairs", **rows)
    assert "preference pairs" in fails("E124", Source, pairs, "train", 5)
    odd = dataset(tmp_path / "odd", [(range(7), [0], [1] * 7)], kind="chat", **rows)
    assert "no whole rows of 6" in fails("E111", Source, odd, "train", 5)


def test_a_batch_of_both_kinds(tmp_path):
    """A source without a document mask gives rows of one document."""
    text = dataset(tmp_path / "t", [(range(60), [0, 20], None)])
    shards = [(range(12), [0, 3, 6], [1] * 12)]
    chat = dataset(tmp_path / "c", shards, kind="chat", rows={"length": 6})
    sources = {
        name: Source(path, "train", 5, document_mask=None)
        for name, path in (("t", text), ("c", chat))
    }
    load = Loader(sources, 1, [[0, {"t": 1, "c": 1}]])
    row, x, y, docs, _ = load.batch(3, 20)
    assert row == 3 and x.shape == y.shape == docs.shape == (20, 5)
    names = [load.locate(3 + r)[0] for r in range(20)]
    assert {"t", "c"} == set(names)
    for r, name in enumerate(names):
        assert docs[r].any() == (name == "c" and 2 in x[r])
    _, _, y, docs, _ = Loader({"t": sources["t"]}, 1, [[0, {"t": 1}]]).batch(0, 4)
    assert docs is None and (y >= 0).all()


def test_bare_shards_have_masks_and_documents_beside_them(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(30, dtype=np.uint16))
    before = Source(str(tmp_path), "train", 5).fingerprint
    assert "has no a.docs.npy" in fails("E002", Source, str(tmp_path), "train", 5, 0, True)
    assert not Source(str(tmp_path), "train", 5, document_mask=None).document_mask
    np.save(tmp_path / "a.mask.npy", np.arange(30, dtype=np.uint8) % 2)
    np.save(tmp_path / "a.docs.npy", np.array([0, 3, 30], np.uint64))
    source = Source(str(tmp_path), "train", 5, document_mask=True)
    assert source.fingerprint != before
    x, y, docs = source.row(0)
    assert y.tolist() == [1, -1, -1, -1, 5] and docs.tolist() == [0, 0, 0, 1, 1]
    np.save(tmp_path / "b.npy", np.arange(30, dtype=np.uint16))
    assert "b.mask.npy" in fails("E111", Source, str(tmp_path), "train", 5)


DAMAGE = {
    "gone": lambda file: file.unlink(),
    "short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "no header": lambda file: file.write_bytes(b"0" * 200),
    "longer": lambda file: np.save(file, np.append(np.load(file), np.load(file)[-1:])),
    "other": lambda file: np.save(file, np.load(file).astype(np.float64)),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ("mask", "docs"))
def test_files_that_do_not_fit_are_named(tmp_path, name, how):
    path = dataset(tmp_path / "d", [(range(12), [0, 3, 6], [1] * 12)])
    DAMAGE[how](tmp_path / "d" / f"train_00000.{name}.npy")
    if (name, how) == ("docs", "longer"):  # 12 twice is no document: nothing is lost by it
        return
    text = fails("E111", Source, path, "train", 5, document_mask=True)
    assert f"train_00000.{name}.npy" in text and "train_00000.npy" in text


@pytest.mark.parametrize("docs", ([3, 0, 12], [0, 3, 11], []), ids=str)
def test_documents_that_do_not_ascend_to_the_shards_length(tmp_path, docs):
    path = dataset(tmp_path / "d", [(range(12), [0], None)])
    np.save(tmp_path / "d" / "train_00000.docs.npy", np.array(docs, np.uint64))
    source = Source(path, "train", 5, document_mask=True)
    assert "ascend to 12" in fails("E111", source.row, 0)


def test_a_mask_that_changes_under_the_run_and_its_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(lumen.windows, "RETRY_WAITS_SECONDS", (0.01,))
    path = dataset(tmp_path / "d", [(range(12), [0, 6], [1] * 12)])
    manifest = tmp_path / "d" / "manifest.json"
    told = json.loads(manifest.read_text())
    entry = told["splits"]["train"]["shards"][0]
    for name in ("mask", "docs"):
        entry[f"{name}_sha256"] = lumen.windows.sha256(str(tmp_path / "d" / entry[f"{name}_file"]))
    manifest.write_text(json.dumps(told))
    for name in ("mask", "docs"):
        file = tmp_path / "d" / entry[f"{name}_file"]
        good = file.read_bytes()
        source = Source(path, "train", 5, document_mask=True)
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        sums = Sums([Source(path, "train", 5, document_mask=True)], str(tmp_path / "log"))
        sums.thread.join(10)
        assert sums.error.code == "E111" and f"{name}.npy" in sums.error.text
        if name == "mask":
            np.save(file, np.ones(11, np.uint8))
            assert "changed under the run" in fails("E111", source.row, 0)
        file.write_bytes(good)


# ---------------------------------------------------------------- to the device, and evaluation


def test_the_host_says_how_many_documents_there_are():
    feed = Feed(torch.device("cpu"))
    x = np.zeros((2, 9), np.int64)
    for largest, most in ((0, 1), (1, 2), (2, 4), (3, 4), (4, 8)):
        docs = np.full((2, 9), largest, np.int32)
        sent = feed.batch(x, x, docs)[2]
        assert sent.most == most > largest and sent.of.dtype == torch.long
    assert feed.batch(x, x)[2] is None


@pytest.mark.parametrize("kind", ("dense", "hybrid"))
def test_an_evaluation_counts_what_the_masks_leave(tmp_path, kind):
    """Against the documents one by one; of MoD by both rules."""
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 97, 33 * 3), rng.integers(0, 2, 33 * 3)
    mask[66:] = 0  # a row without a target
    shards = [(tokens, [0, 10, 33, 66, 70], mask)]
    path = dataset(tmp_path / "d", shards, kind="chat", rows={"length": 33})
    source = Source(path, "train", 32, document_mask=None)
    model = make(**KINDS[kind]).eval()
    loop = Loop(model, {"d": source}, Parallel(Config(data_dir="x")), 2, np.ones(97, np.int64))
    want = {True: 0.0, False: 0.0}
    with torch.no_grad():
        loop.add([("d", 0), ("d", 1)])
        loop.add([("d", 2)])
        for first, end in ((0, 10), (10, 32), (33, 65)):
            x = torch.tensor(tokens[None, first:end])
            y = torch.tensor(np.where(mask, tokens, -1)[None, first + 1 : end + 1])
            if end == 10:
                y[0, -1] = -1  # its last token is an input, and would foretell another document
            for model.causal in want:
                want[model.causal] += model(x, targets=y)[1]["ce"].item()
    model.causal = True
    count = int(mask[1:10].sum() + mask[11:33].sum() + mask[34:66].sum())
    found = loop.result()
    assert found.loss == pytest.approx(want[True] / count, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(found.loss / np.log(2), rel=1e-5)
    if kind == "hybrid":
        assert found.mod["val_loss_as_trained"] == pytest.approx(want[False] / count, rel=1e-5)
    assert len(found.batch_losses) == 1, "a batch without a target has no mean"
    empty = Loop(model, {"d": source}, Parallel(Config(data_dir="x")), 2, None)
    with torch.no_grad():
        empty.add([("d", 2)])
    assert "masks leave no target" in fails("E114", empty.result)


def test_the_plan_counts_a_mask_where_there_is_one():
    """On CUDA in fp32: varlen and flash take 16 bits. A CPU goes document by document."""
    model = plan.on_meta(make().cfg)

    def need(precision, **layout):
        return plan.rank_memory(model, plan.Layout(**layout), 2, 1, precision)["total"]

    for layout in ({}, {"world": 2, "zero_stage": 3}):
        mask = need("fp32", documents=True, **layout) - need("fp32", **layout)
        assert mask == 4 * 2 * T * T
        assert need("mixed_bf16", documents=True, **layout) == need("mixed_bf16", **layout)
        assert need("fp32", documents=True, cuda=False, **layout) == need(
            "fp32", cuda=False, **layout
        )


def test_half_precision_short_and_long():
    """A short document attends in fp32 on a CPU, a long one in bf16: both are right, and the
    gradients have the dtype of what they are of."""
    generator = torch.Generator().manual_seed(0)
    T = kernels_attention.SHORT + 100
    of = numbers_of(100, T)
    wide = [torch.randn(1, T, 2, 8, generator=generator).bfloat16().float() for _ in range(3)]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        qkv = [t.clone().to(dtype).requires_grad_() for t in wide]
        docs = kernels_attention.documents(of, "sdpa", dtype)
        y = kernels_attention.attention(*qkv, "sdpa", docs)
        y.float().square().sum().backward()
        found[dtype] = [y, *(t.grad for t in qkv)]
    for want, got in zip(*found.values()):
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.float(), want, atol=0.03, rtol=0.03)
    # of the short one only the output is rounded
    short, rounded = found[torch.bfloat16][0][:, :100], found[torch.float32][0][:, :100].bfloat16()
    assert (short == rounded).float().mean() > 0.99


def numbers_of(first: int, T: int) -> torch.Tensor:
    """Two documents, the first of so many tokens: (1, T)."""
    return (torch.arange(T)[None] >= first).long()
