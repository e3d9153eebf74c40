"""Preferences: pairs as rows, their losses against trl's, log-probabilities by chunks, the
reference, the evaluation. No Trainer."""

import copy
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sparse_models import KINDS, make

import prepare_data
from lumen import preferences
from lumen import tokenizer as tokenizers
from lumen.config import Config, build_config
from lumen.data import Data, open_data
from lumen.detectors import LOST_OVER, MAX_LOST, Collapse
from lumen.errors import UserError
from lumen.feed import Feed, Pairs
from lumen.loader import Loader
from lumen.pairs import PairSource
from lumen.preferences import TokenLogProbs, pair_losses, preference
from lumen.reference import Reference, evaluate
from lumen.sums import FLAGS, StepNumbers, empty_sums, step_numbers

TRL = json.loads((Path(__file__).parents[1] / "fixtures" / "trl_losses.json").read_text())
T, V = 32, 97  # of sparse_models


def where(y) -> torch.Tensor:
    return (y.flatten() >= 0).nonzero()[:, 0]


def fails(code, f, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        f(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value.text


def dataset(path, pairs: dict, **changes) -> str:
    """pairs: {split: [(length of the prompt, of the chosen reply, of the rejected one)]}"""
    draw = np.random.default_rng(7)
    path.mkdir(exist_ok=True)
    splits = {}
    for split, lengths in pairs.items():
        ids, mask, docs = [], [], [0]
        for prompt, *replies in lengths:
            asked = draw.integers(0, V, prompt).tolist()
            for n in replies:
                ids += asked + draw.integers(0, V, n).tolist()
                mask += [0] * prompt + [1] * n
                docs.append(len(ids))
        name = f"{split}_00000"
        arrays = (np.array(ids, np.uint16), np.array(docs, np.uint64), np.array(mask, np.uint8))
        for kind, array in zip(("", ".docs", ".mask"), arrays):
            np.save(path / f"{name}{kind}.npy", array)
        entry = {"file": f"{name}.npy", "docs_file": f"{name}.docs.npy", "tokens": len(ids)}
        entry |= {"max_id": max(ids), "mask_file": f"{name}.mask.npy", "sha256": str(lengths)}
        splits[split] = {"shards": [entry]}
    manifest = {"fingerprint": "f", "dtype": "uint16", "kind": "pairs", "splits": splits}
    (path / "manifest.json").write_text(json.dumps(manifest | changes))
    return str(path)


def some_pairs(n: int, seed=0) -> list[tuple]:
    return [tuple(sizes) for sizes in np.random.default_rng(seed).integers(2, 7, (n, 3)).tolist()]


def how(**keys) -> Config:
    return Config(**keys)


def on_device(batch):
    return Feed(torch.device("cpu")).batch(*batch[1:])


def loaded(source, count: int):
    """The first rows of a run, as the loss takes them."""
    return on_device(Loader({"p": source}, 3, [[0, {"p": 1}]]).batch(0, count))


# ---------------------------------------------------------------- losses

AS_TRL = {
    "dpo": how(method="dpo"),
    "dpo beta 0.5": how(method="dpo", beta=0.5),
    "cdpo": how(method="cdpo"),
    "ipo": how(method="ipo"),
    "ipo beta 0.02": how(method="ipo", beta=0.02),
    "hinge": how(method="hinge"),
    "simpo": how(method="simpo"),
    "orpo": how(method="orpo"),
}


def stored() -> list[torch.Tensor]:
    return [torch.tensor([p[key] for p in TRL["pairs"]]) for key in ("logp", "reference", "n")]


@pytest.mark.parametrize("name", AS_TRL)
def test_losses_and_rewards_are_trls(name):
    """On stored pairs of many lengths, one as the reference has it, one far apart."""
    assert TRL["trl"] == "1.16.0"
    losses, rewards = pair_losses(preference(AS_TRL[name]), *stored())
    found = torch.cat([losses[:, None], rewards], 1)
    want = torch.tensor([pair["found"][name] for pair in TRL["pairs"]])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    with_sft = pair_losses(preference(AS_TRL[name])._replace(sft_coef=0.5), *stored())[0]
    sft = torch.tensor([pair["found"]["sft"][0] for pair in TRL["pairs"]])
    torch.testing.assert_close(with_sft, want[:, 0] + 0.5 * sft, rtol=1e-5, atol=1e-5)


def test_smoothing_makes_dpo_cdpo_and_others_have_none():
    smooth = pair_losses(preference(how(method="dpo", label_smoothing=0.1)), *stored())[0]
    assert torch.equal(smooth, pair_losses(preference(how(method="cdpo")), *stored())[0])
    check = preferences.check_method
    assert "dpo and cdpo" in fails("E002", check, how(method="ipo", label_smoothing=0.1))
    assert "simpo" in fails("E002", check, how(method="dpo", gamma=1.0))
    assert preference(how(method="simpo", beta=3.0)).gamma == 1.5


@pytest.mark.parametrize("method", preferences.METHODS)
def test_certain_and_hopeless_replies_have_finite_gradients(method):
    logp = torch.tensor([[0.0, -2e4], [-2e4, 0.0], [-0.7, -0.7]], requires_grad=True)
    losses, _ = pair_losses(
        preference(how(method=method)), logp, -torch.ones(3, 2), torch.ones(3, 2)
    )
    losses.sum().backward()
    assert losses.isfinite().all() and logp.grad.isfinite().all()


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("dtype, close", ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)))
def test_log_probabilities_by_chunks(monkeypatch, dtype, close):
    """Values and both gradients are those of full logits, which are never there; without a target
    no logits are made; a frozen head gets no gradient."""
    monkeypatch.setattr(preferences, "head_rows", lambda *_: 4)
    sizes, linear = [], F.linear
    seen = lambda x, W: sizes.append(len(x)) or linear(x, W)  # noqa: E731
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(33, 8, generator=gen).to(dtype).requires_grad_()
    W = torch.randn(50, 8, generator=gen).requires_grad_()
    y = torch.randint(0, 50, (33,), generator=gen)
    y[::3] = -1
    weight = torch.randn(2, 33, generator=gen)
    monkeypatch.setattr(preferences.F, "linear", seen)
    logp, lse = TokenLogProbs.apply(x, W, y, where(y))
    ((logp * weight[0]) + (lse * weight[1])).sum().backward()
    monkeypatch.undo()
    assert max(sizes) <= 4 and sum(sizes) == 2 * 22, "once in forward, once in backward"
    found = [logp.detach(), lse.detach(), x.grad.float(), W.grad]
    x.grad = W.grad = None
    logits = linear(x, W.to(dtype)).float()
    valid = y >= 0
    lse = torch.where(valid, logits.logsumexp(-1), 0)
    logp = torch.where(valid, logits.log_softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0], 0)
    ((logp * weight[0]) + (lse * weight[1])).sum().backward()
    for mine, want in zip(found, (logp, lse, x.grad.float(), W.grad)):
        assert (mine - want).norm() <= close * want.norm()
    frozen = W.detach()
    TokenLogProbs.apply(x, frozen, y, where(y))[0].sum().backward()
    assert frozen.grad is None


# ---------------------------------------------------------------- pairs as rows


def test_rows_hold_every_pair_once_on_both_sides(tmp_path):
    # without a prompt the first token has a mask of 1
    pairs = [(3 * (n % 2), *replies) for n, (_, *replies) in enumerate(some_pairs(40))]
    path = dataset(tmp_path / "d", {"train": pairs, "val": some_pairs(3, 1)})
    source = PairSource(path, "train", T)
    assert (source.pairs, source.sides) == (40, 2)
    again = PairSource(path, "train", T)
    source.reference = np.arange(80, dtype=np.float32).reshape(40, 2) - 100
    seen = []
    for i in range(source.windows):
        x, y, docs, reference = source.row(i)
        numbers = source.numbers(i).tolist()
        seen += numbers
        assert numbers == again.numbers(i).tolist()
        assert x.shape == y.shape == docs.shape == (2, T) and len(reference) == source.most
        assert np.array_equal(reference[: len(numbers)], source.reference[numbers])
        assert np.isnan(reference[len(numbers) :]).all()
        for side in (0, 1):
            at = 0
            for place, p in enumerate(numbers):
                ids, mask = source.pair(p)[side]
                end = at + len(ids)
                assert x[side, at:end].tolist() == ids[: T - at].tolist()
                want = np.where(mask[1:] > 0, ids[1:], -1)
                assert y[side, at : end - 1].tolist() == want.tolist()
                assert (docs[side, at:end] == place).all()
                if at:
                    assert y[side, at - 1] == -1, "no document says how the next begins"
                at = end
            assert (docs[side, at:] == len(numbers)).all() and (y[side, at - 1 :] == -1).all()
    assert sorted(seen) == list(range(40))
    assert source.windows < 16, "packed"
    assert PairSource(path, "val", T).pairs == 3


def test_what_is_no_data_for_preferences(tmp_path):
    long = dataset(tmp_path / "long", {"train": [(4, 40, 9), (2, 3, 3)]})
    assert "1 of 2 pairs" in (text := fails("E126", PairSource, long, "train", T))
    assert "set it to 43" in text
    assert PairSource(long, "train", 43).windows
    none = dataset(tmp_path / "none", {"val": some_pairs(3)})
    assert "no pair" in fails("E126", PairSource, none, "train", T)
    same = dataset(tmp_path / "same", {"train": [(3, 2, 2), (3, 4, 4)]})
    ids = np.load(tmp_path / "same" / "train_00000.npy")
    ids[17:24] = ids[10:17]
    np.save(tmp_path / "same" / "train_00000.npy", ids)
    assert "number 1 first: chosen and rejected" in fails("E126", PairSource, same, "train", T)
    empty = dataset(tmp_path / "empty", {"train": [(3, 2, 2), (0, 4, 1)]})
    assert "number 1 first: a side without" in fails("E126", PairSource, empty, "train", T)
    chat = dataset(tmp_path / "chat", {"train": some_pairs(3)}, kind="chat")
    assert "conversations" in fails("E124", PairSource, chat, "train", T)
    assert "document_mask" in fails("E002", PairSource, long, "train", T, 0.0, False)
    np.save(tmp_path / "train_0.npy", np.zeros(90, np.uint16))
    assert "bare shards" in fails("E124", PairSource, str(tmp_path), "train", T)


def test_data_of_a_run(tmp_path):
    """open_data, and batches of two sources whose rows hold unequally many pairs."""
    for name, n in (("a", 40), ("b", 2)):
        dataset(tmp_path / name, {"train": some_pairs(n)})
    sources = {name: {"dir": str(tmp_path / name)} for name in "ab"}
    model = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": T, "vocab_size": V}
    for source in sources.values():
        manifest = json.loads((Path(source["dir"]) / "manifest.json").read_text())
        manifest["tokenizer"] = {"sha256": "t", "n_vocab": V}
        (Path(source["dir"]) / "manifest.json").write_text(json.dumps(manifest))
    tree = {"data": {"sources": sources}, "method": "dpo", "model": model, "out_dir": "x"}
    data = open_data(build_config(copy.deepcopy(tree), lambda key: key, []))
    a, b = data.sources["a"], data.sources["b"]
    assert a.most > b.most and data.document_mask is True
    loader = Loader(data.sources, 1, [[0, {"a": 1, "b": 1}]], V)
    batch = loader.batch(5, 6)
    assert batch.x.shape == (12, T) and batch.reference.shape == (6, a.most, 2)
    for r in range(6):
        name, i, _ = loader.locate(5 + r)
        x, y, docs, reference = data.sources[name].row(i)
        for found, want in ((batch.x, x), (batch.y, y), (batch.docs, docs)):
            assert np.array_equal(found[2 * r : 2 * r + 2], want)
        assert np.array_equal(batch.reference[r, : len(reference)], reference, equal_nan=True)
        assert np.isnan(batch.reference[r, len(reference) :]).all()
    sources["a"]["buckets"] = 2
    assert "buckets" in fails("E002", open_data, build_config(tree, lambda key: key, []))


def test_the_reference_travels_as_bits_and_the_host_says_where_targets_are():
    """In one copy of int64; NaN too."""
    values = np.array([[[-1.5, np.nan], [-1e-30, -3.1e3]]], np.float32)
    x = np.arange(6).reshape(2, 3)
    feed, y = Feed(torch.device("cpu")), np.where(x % 2, x, -1)
    copies, send = [], feed.send
    feed.send = lambda *arrays: copies.append(arrays) or send(*arrays)
    *_, pairs = feed.batch(x, y, 0 * x, values)
    assert len(copies) == 1 and {a.dtype for a in copies[0]} == {np.dtype(np.int64)}
    assert {a.shape for a in copies[0]} == {(2, 3)}, "Buffer.fill takes one shape"
    assert np.array_equal(pairs.reference.numpy(), values, equal_nan=True)
    assert pairs.places.tolist() == [1, 3, 5]


# ---------------------------------------------------------------- the loss of a batch


def gradients(model, cfg, batch, **more) -> tuple:
    """(sums, gradient of every parameter) of one pass."""
    model.train()
    model.zero_grad()
    total, sums = preferences.loss(model, cfg, *batch, **more)
    total.backward()
    grads = {}
    for name, p in model.named_parameters():
        grads[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return sums, grads


def rows_of(batch, first: int, last: int):
    x, y, docs, pairs = batch
    sides = slice(2 * first, 2 * last)
    docs = docs._replace(of=docs.of[sides])
    pairs = Pairs(pairs.reference[first:last], where(y[sides]))
    return x[sides], y[sides], docs, pairs


@pytest.mark.parametrize("kind", ("dense", "hybrid"))
@pytest.mark.parametrize("method", ("dpo", "orpo"))
def test_any_cut_of_a_batch_gives_the_same_gradient(tmp_path, kind, method):
    source = PairSource(dataset(tmp_path / "d", {"train": some_pairs(30)}), "train", T)
    source.reference = np.random.default_rng(0).normal(-20, 2, (30, 2)).astype(np.float32)
    model = make(**KINDS[kind])
    model.z_loss = 1e-3
    cfg, batch = how(method=method, sft_coef=0.1), loaded(source, 5)
    sums, grads = gradients(model, cfg, batch, pairs_per_row=2.5)
    added, counted = {}, {}
    for first, last in ((0, 1), (1, 3), (3, 5)):
        own, parts = gradients(model, cfg, rows_of(batch, first, last), pairs_per_row=2.5)
        for name, grad in parts.items():
            added[name] = added.get(name, 0) + grad
        for name, value in own.items():
            counted[name] = counted.get(name, 0) + value
    assert sums["count"] == sum(len(source.numbers(i)) for i in range(5)) or sums["count"] > 5
    for name, value in sums.items():
        torch.testing.assert_close(value.float(), counted[name].float(), rtol=1e-4, atol=1e-3)
    for name, grad in grads.items():
        assert (grad - added[name]).norm() <= 2e-5 * added[name].norm() + 1e-7, name


@pytest.mark.parametrize("kind", ("dense", "hybrid"))
def test_packed_equals_separate_and_the_formula(tmp_path, kind):
    """Each pair alone, without a row, its full logits put into the formula."""
    source = PairSource(dataset(tmp_path / "d", {"train": some_pairs(12)}), "train", T)
    source.reference = np.random.default_rng(0).normal(-20, 2, (12, 2)).astype(np.float32)
    model, cfg = make(**KINDS[kind]), how(method="dpo")
    sums, grads = gradients(model, cfg, loaded(source, source.windows), pairs_per_row=0.0)
    assert sums["count"] == 12
    model.zero_grad()
    ce, want = 0.0, dict.fromkeys(("logp_chosen", "logp_rejected", "tokens", "accuracy"), 0.0)
    for p in range(12):
        logp = []
        for ids, mask in source.pair(p):
            ids, mask = torch.from_numpy(ids), torch.from_numpy(mask[1:].astype(np.float32))
            # MoD chooses among all of a document's tokens, its last one too
            logits = model(ids[None])[0, :-1].log_softmax(-1)
            logp.append((logits.gather(1, ids[1:, None])[:, 0] * mask).sum())
            want["tokens"] += mask.sum()
        logp = torch.stack(logp)
        d = logp - torch.from_numpy(source.reference[p])
        ce = ce - F.logsigmoid(0.1 * (d[0] - d[1]))
        want["accuracy"] += d[0] > d[1]
        want["logp_chosen"] += logp[0].detach()
        want["logp_rejected"] += logp[1].detach()
    ce.backward()
    torch.testing.assert_close(sums["ce"], ce.detach(), rtol=1e-5, atol=1e-5)
    for name, value in want.items():
        torch.testing.assert_close(sums[name].float(), torch.as_tensor(value), rtol=1e-5, atol=1e-4)
    for name, p in model.named_parameters():
        if p.grad is not None:
            # routers and predictors have losses of their own, counted 0 times here
            assert (grads[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6, name


def test_router_losses_are_as_strong_as_beside_pre_training(tmp_path):
    """Relative to a mean over pairs as there to a mean over tokens, whatever lies in a row."""
    source = PairSource(dataset(tmp_path / "d", {"train": some_pairs(30)}), "train", T)
    model, cfg = make(**KINDS["mixtral"]).train(), how(method="dpo")
    batch = loaded(source, source.windows)
    x, y, docs, reference = batch
    every = source.pairs / source.windows
    found = {}
    for weight in (0.0, every):
        found[weight], sums = preferences.loss(model, cfg, *batch, pairs_per_row=weight)
    ours = (found[every] - found[0.0]) / sums["count"]
    total, sums = model(x, targets=x, docs=docs)
    torch.testing.assert_close(ours, (total - sums["ce"]) / sums["count"], rtol=1e-4, atol=1e-7)
    assert {name for name in sums if "." in name} <= set(preferences.loss(model, cfg, *batch)[1])


def test_the_models_own_loss_comes_back(tmp_path):
    source = PairSource(dataset(tmp_path / "d", {"train": some_pairs(3)}), "train", T)
    model, (x, y, docs, pairs) = make(), loaded(source, 1)
    with pytest.raises(IndexError):
        preferences.loss(model, how(method="dpo"), x + V, y, docs, pairs)
    assert (
        "loss" not in vars(model) and model(x, targets=y, docs=docs)[1]["count"] == (y >= 0).sum()
    )


# ---------------------------------------------------------------- ranks


class Ranks:
    """So many ranks in threads, each with a model of its own; what a reference and an evaluation
    ask of Parallel."""

    def __init__(self, world=1):
        self.world = world
        self.barrier = threading.Barrier(world)
        self.said = [None] * world

    def run(self, do, model, *args) -> list:
        """do(model, *args, parallel) on every rank -> what they return."""
        results = [None] * self.world

        def one(rank):
            try:
                results[rank] = do(copy.deepcopy(model), *args, Rank(self, rank))
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(
                result, threading.BrokenBarrierError
            ):
                raise result
        return results


class Rank:
    device, collective_free = torch.device("cpu"), True

    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.world = ranks, rank, ranks.world
        self.feed = Feed(self.device)

    def rows(self):
        return self.rank, self.world

    def gather(self, value):
        self.ranks.said[self.rank] = value
        self.ranks.barrier.wait()
        said = list(self.ranks.said)
        self.ranks.barrier.wait()
        return said

    def broadcast(self, value):
        return self.gather(value)[0]

    def all_reduce_max(self, flags):
        return [max(values) for values in zip(*self.gather(flags))]

    def run_or_raise_on_all(self, do, *args):
        error = None
        try:
            do(*args)
        except UserError as e:
            error = e
        for e in self.gather(error):
            if e is not None:
                raise e


ONE = Rank(Ranks(), 0)
BASE = {"base_sha256": "b", "quantize_base": None, "compute_dtype": "fp32", "template": {"n": 1}}


@pytest.fixture
def data(tmp_path):
    path = dataset(tmp_path / "d", {"train": some_pairs(21), "val": some_pairs(9, 1)})
    return opened(path)


def opened(path) -> Data:
    found = Data({"p": 1.0}, V, tokenizer_sum="t")
    found.sources["p"], found.val_sources["p"] = (PairSource(path, s, T) for s in ("train", "val"))
    return found


def reference_of(data, said=None, out="out", **changes) -> Reference:
    say = [].append if said is None else said.append
    return Reference(data, BASE | changes, Path(data.sources["p"].path).parent / out, say)


def refuse(*args, **kwargs):
    raise AssertionError("computed again")


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("kind", ("dense", "hybrid"))
def test_the_reference_is_the_model_as_it_began(data, kind):
    """Computed by one rank or by two, with dropout off, for both splits; read the second time, and
    then the first loss is ln 2 and no pair has a margin."""
    model = make(**KINDS[kind], dropout=0.1).train()
    found = []
    for world in (1, 2):
        fresh = opened(data.sources["p"].path)
        reference = reference_of(fresh)
        reference.write = lambda *_: None
        compute = reference.load_or_compute
        Ranks(world).run(lambda *args, compute=compute: compute(*args, 2), model)
        found.append((fresh.sources["p"].reference, fresh.val_sources["p"].reference))
    for one, two in zip(*found):
        np.testing.assert_allclose(one, two, rtol=1e-5)
    assert found[0][0].shape == (21, 2) and found[0][1].shape == (9, 2) and model.training
    kept = reference_of(data).load_or_compute(model, ONE, 4)
    again, said = opened(data.sources["p"].path), []
    reading = reference_of(again, said)
    reading.compute = refuse
    assert reading.load_or_compute(model, ONE, 4, known=kept) == kept and "read from" in said[0]
    for name in ("sources", "val_sources"):
        mine, theirs = (getattr(d, name)["p"].reference for d in (again, data))
        assert np.array_equal(mine, theirs)
    line = reading.check_start(model, how(method="dpo", sft_coef=0.3), ONE)
    assert "loss 0.693147, margin" in line
    assert abs(float(line.partition("margin ")[2].split()[0])) < 1e-5
    rows = [("p", i) for i in range(again.val_sources["p"].windows)]
    said = evaluate(model, how(method="dpo"), rows, again.val_sources, ONE, 2)
    assert said.loss == pytest.approx(np.log(2), abs=1e-6), "the val pairs have theirs, too"
    with torch.no_grad():
        model.norm.weight.mul_(1.01)
    assert "rounding explains" in fails("E312", reading.check_start, model, how(method="dpo"), ONE)


def test_when_the_reference_is_computed_anew(data, tmp_path):
    model, path, said = make(), Path(data.sources["p"].path), []
    kept = reference_of(data).load_or_compute(model, ONE, 4)
    (file,) = path.glob("reference-*.npy")
    own = path.parent / "out" / file.name
    whole = file.read_bytes()
    args = (model, ONE, 4)
    # a run of all weights that was moved has its own, and mends what is beside the data
    for harm in (file.unlink, lambda: file.write_bytes(whole[:-1])):
        harm()
        assert reference_of(data).load_or_compute(*args, known=kept) == kept
        assert file.read_bytes() == own.read_bytes() == whole
    # damaged: anew where the model is still the base, else refused
    own.unlink()
    file.write_bytes(whole[:-1] + b"x")
    text = fails("E312", reference_of(data).load_or_compute, *args, known=kept)
    assert str(file) in text and "restore" in text
    reference_of(data, said).load_or_compute(*args)
    assert "damaged" in said[0] and file.read_bytes() == whole
    # adapters off: the base is still there
    file.unlink()
    own.unlink()
    entered = []

    class Off:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *_):
            pass

    reference_of(data).load_or_compute(*args, known=kept, off=Off)
    assert entered and file.read_bytes() == whole
    # what comes out is not what the run began with
    file.unlink()
    own.unlink()
    other = {"p": kept["p"] | {"means": [mean - 0.1 for mean in kept["p"]["means"]]}}
    text = fails("E312", reference_of(data).load_or_compute, *args, known=other, off=Off)
    assert "began with" in text and not file.exists()
    reference_of(data).load_or_compute(*args)
    # of something else: another file, and a run that began with this one is refused
    changes = {"base_sha256": "c", "quantize_base": "int8", "compute_dtype": "bf16", "template": {}}
    for key, value in changes.items():
        other = reference_of(data, **{key: value})
        text = fails("E312", other.load_or_compute, *args, known=kept)
        assert text.endswith(f"changed since: {preferences_words(key)}")
        other.load_or_compute(*args)
    data.sources["p"].manifest["splits"]["train"]["shards"][0]["sha256"] = "other"
    assert "the shards" in fails("E312", reference_of(data).load_or_compute, *args, known=kept)
    assert len(list(path.glob("reference-*.npy"))) == 5
    assert not list(path.glob("*.tmp"))


def preferences_words(key: str) -> str:
    from lumen.reference import DIFFERENCES

    return DIFFERENCES[key]


def test_where_the_reference_goes(data, tmp_path, monkeypatch):
    """Beside the data and into out_dir; into that alone where the data's folder takes no file; and
    it is found there, where the data are somewhere else now."""
    from lumen import files

    model, path, replacing = make(), data.sources["p"].path, files.replacing

    def only_out(file):
        if str(file).startswith(path):
            raise PermissionError(13, "Permission denied")
        return replacing(file)

    monkeypatch.setattr(files, "replacing", only_out)
    said = []
    reference_of(data, said, out="run").load_or_compute(model, ONE, 4)
    assert len(said) == 2 and f"kept in {tmp_path}/run/" in said[1]
    assert not list(Path(path).glob("reference-*"))
    assert len(list((tmp_path / "run").glob("reference-*"))) == 2
    again = reference_of(opened(path), out="run")
    again.compute = refuse
    again.load_or_compute(model, ONE, 4)


def test_a_base_that_gives_no_numbers_is_refused(data):
    model = make()
    with torch.no_grad():
        model.embed.weight[5] = torch.nan
    assert "pair" in fails("E312", reference_of(data).load_or_compute, model, ONE, 4)
    assert not list(Path(data.sources["p"].path).glob("reference*"))


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("kind", ("dense", "hybrid"))
def test_an_evaluation_is_the_mean_over_pairs(data, kind):
    """However it is cut, and on two ranks."""
    model, cfg = make(**KINDS[kind]).train(), how(method="dpo")
    reference_of(data).load_or_compute(model, ONE, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    source = data.val_sources["p"]
    rows = [("p", i) for i in range(source.windows)]
    found = []
    for world, size in ((1, 1), (1, 3), (2, 2)):
        args = (model, cfg, rows, data.val_sources)
        found += Ranks(world).run(lambda *a, size=size: evaluate(*a, size), *args)
    for one in found[1:]:
        assert one.loss == pytest.approx(found[0].loss, rel=1e-5)
        assert one.more == pytest.approx(found[0].more, rel=1e-4)
    row = found[0].row()
    assert row["val_margin"] == pytest.approx(row["val_reward_chosen"] - row["val_reward_rejected"])
    assert 0 < row["val_accuracy"] < 1 and found[0].loss != pytest.approx(0.6931, abs=1e-3)
    assert len(found[0].batch_losses) == len(rows) and model.training and model.causal
    beside = found[0].beside(found[1])
    assert beside.loss == found[0].loss and found[0].beside(None) is None
    assert evaluate(model, cfg, rows, data.val_sources, ONE, 1, lambda: 1) is None


def test_a_row_that_cannot_be_read_is_everyones_error(data):
    source = data.val_sources["p"]
    rows = [("p", i) for i in range(source.windows)]
    read = source.row

    def row(i):
        if i == rows[-1][1]:
            raise UserError("E111", "gone")
        return read(i)

    source.row = row
    model, cfg = make(), how(method="simpo")
    failed = []

    def run(*args):
        failed.append(fails("E111", evaluate, *args, 1))

    Ranks(2).run(run, model, cfg, rows, data.val_sources)
    assert failed == ["gone", "gone"]


# ---------------------------------------------------------------- what is told, what is watched


def test_numbers_of_a_step_of_pairs():
    model = make()
    sums = empty_sums(model, torch.device("cpu"), preferences.SUM_NAMES)
    assert list(sums)[:4] == ["ce", "z", "count", "tokens"]
    sums |= {"norm": torch.tensor(1.0), "bad": torch.tensor(0), "exploded": torch.tensor(0)}
    for name, value in {"ce": 2.0, "count": 4, "tokens": 100, "margin": 1.0, "stop": 1}.items():
        sums[name] = torch.tensor(float(value))
    pending = SimpleNamespace(step=3, cursor=9, iteration=4, lr=0.1)
    numbers = step_numbers(pending, sums, 1)
    assert (numbers.loss, numbers.tokens, numbers.more["margin"]) == (0.5, 100, 0.25)
    assert set(numbers.more) == set(preferences.SUM_NAMES) - {"tokens"}
    for name in preferences.SUM_NAMES:
        del sums[name]
    numbers = step_numbers(pending, sums, 1)
    assert numbers.tokens == 4 and not numbers.more and "stop" in FLAGS


def steps_of(gains, margins):
    for step, (gain, margin) in enumerate(zip(gains, margins)):
        yield StepNumbers(step, step, step, more={"chosen_gain": gain, "margin": margin})


@pytest.mark.parametrize("by_reference", (True, False))
def test_chosen_replies_that_collapse_are_told_of_once(by_reference):
    start, n, ended = (0.0 if by_reference else -2.0), 10 * LOST_OVER, []
    falling = np.linspace(start, start - 3 * MAX_LOST, n)
    rising = np.linspace(0, 2, n)
    detector = Collapse(by_reference)
    alarms = [a for numbers in steps_of(falling, rising) for a in detector.look(numbers)]
    assert [(a.level, a.action) for a in alarms] == [(0, "warn")] and alarms[0].stat["lost"] > 0.5
    # neither a fall of both sides, nor a little one, nor a step that was dropped
    for gains, margins in ((falling, -rising), (falling / 10 + 0.9 * start, rising)):
        detector = Collapse(by_reference)
        assert not [a for numbers in steps_of(gains, margins) for a in detector.look(numbers)]
    dropped = Collapse(by_reference)
    for numbers in steps_of(falling, rising):
        numbers.bad = True
        assert not list(dropped.look(numbers))
    stopping = Collapse(by_reference, ended.append)
    stopping.load(json.loads(json.dumps(stopping.state())))
    for numbers in steps_of(falling, rising):
        numbers.bad = numbers.step % 2 == 0
        list(stopping.look(numbers))
    assert len(ended) == 1 and ended[0].startswith("stop: chosen replies lost 0.5")


# ---------------------------------------------------------------- preparation


@pytest.mark.parametrize("too_long", ("truncate", "turns", "drop"))
def test_a_cut_pair_keeps_a_difference_and_both_replies(tmp_path, too_long):
    """Too long: each side keeps some of its last reply, and they differ, or it is listed."""
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "reply"}]
    same = "the same beginning of both"
    rows = [
        {"prompt": f"{n}", "chosen": "yes " * (n + 1), "rejected": "no " * (n % 3 + 1)}
        for n in range(30)
    ]
    rows.append({"prompt": "q", "chosen": f"{same * 4} a", "rejected": f"{same * 4} b"})
    rows.append(
        {"prompt": [*turns, {"role": "user", "content": "x" * 99}], "chosen": "a", "rejected": "b"}
    )
    rows.append({"prompt": "q", "chosen": "same", "rejected": " same"})
    asked = [*turns, {"role": "user", "content": "q"}]
    rows.append({"prompt": asked, "chosen": "yes " * 30, "rejected": "no"})
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"seq_len": 70, "too_long": too_long, "loss_on": "assistant", "max_bad": 0.1}
    out = tmp_path / "out"
    prepare_data.prepare([str(file)], str(out), "bytes", val_fraction=0.0, quiet=True, **options)
    found = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    codes = {line["line"]: line["code"] for line in found}
    assert (codes[31], codes[32], codes[33]) == ("E106", "E106", "E126")
    source, tokenizer = PairSource(str(out), "train", 70), tokenizers.load(str(out))
    assert source.pairs == len(rows) - len(found)
    for p in range(source.pairs):
        chosen, rejected = ((ids, ids[mask > 0]) for ids, mask in source.pair(p))
        assert "yes" in tokenizer.decode(chosen[1].tolist())
        assert "no" in tokenizer.decode(rejected[1].tolist())
    if too_long == "truncate":
        assert set(codes) == {31, 32, 33}, "the others are cut, and learned from"
