"""evaluate.py: the loss is that of the formula in any batch; a signal and a bad row end it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumen.errors import UserError
from lumen.evaluation import evaluate_loss
from lumen.feed import Feed
from model import ModelConfig, Transformer

T, V = 8, 32


class OneRank:
    """What an evaluation asks of train.Parallel."""

    device, collective_free = torch.device("cpu"), True
    feed = Feed(device)

    def rows(self):
        return 0, 1

    def all_reduce_max(self, flags):
        return flags

    def gather(self, x):
        return [x]

    def run_or_raise_on_all(self, do, *args):
        return do(*args)


class Windows:
    """A source whose window i is i's own random tokens; window 99 cannot be read."""

    def __init__(self, seed):
        self.seed = seed

    def window(self, i):
        if i == 99:
            raise UserError("E111", "damaged")
        return np.random.default_rng([self.seed, i]).integers(0, V, T + 1)

    sides = 1
    document_mask = False

    def row(self, i):
        window = self.window(i)
        return window[:-1], window[1:], None


SOURCES = {"a": Windows(1), "b": Windows(2)}
ROWS = [("a", i) for i in range(5)] + [("b", i) for i in range(2)]


@pytest.fixture
def model():
    cfg = ModelConfig(vocab_size=V, d_model=16, n_layers=2, n_heads=2, max_seq_len=T)
    model = Transformer(cfg)
    model.init_weights(0)
    return model


def by_hand(model, rows):
    """(losses (rows, T), how many are right), by the formula."""
    windows = torch.tensor(np.stack([SOURCES[name].window(i) for name, i in rows]))
    with torch.no_grad():
        logits = model(windows[:, :-1])
    targets = windows[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses, int((logits.argmax(-1) == targets).sum())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_loss_is_the_mean_over_all_targets(model, batch_size):
    losses, right = by_hand(model, ROWS)
    token_bytes = np.arange(V) % 4 + 1
    found = evaluate_loss(model, ROWS, SOURCES, OneRank(), batch_size, token_bytes)
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.accuracy == right / losses.numel()
    assert found.by_source["b"] == pytest.approx(losses[5:].mean().item(), rel=1e-5)
    n_bytes = sum(token_bytes[SOURCES[n].window(i)[1:]].sum() for n, i in ROWS)
    bits = losses.sum().item() / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / n_bytes, rel=1e-5)
    assert found.row()["val_loss"] == found.loss and "val_loss/a" in found.row()
    assert model.training, "as it was"


def test_one_source_of_bare_shards(model):
    found = evaluate_loss(model, ROWS[:5], {"a": SOURCES["a"]}, OneRank(), 2)
    assert found.bits_per_byte is None and len(found.batch_losses) == 3
    assert list(found.row()) == ["val_loss", "val_ppl", "val_accuracy", "val_bpb"]


def test_a_signal_leaves_it(model):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) // 2

    assert evaluate_loss(model, ROWS, SOURCES, OneRank(), 2, stop=stop) is None
    assert len(asked) == 2 and model.training


def test_a_row_that_cannot_be_read_is_its_error(model):
    model.eval()
    for collective_free in (True, False):
        rank = OneRank()
        rank.collective_free = collective_free
        with pytest.raises(UserError, match="E111"):
            evaluate_loss(model, [*ROWS, ("a", 99)], SOURCES, rank, 4)
        assert not model.training, "as it was"


def test_a_rank_without_rows_takes_part_where_forward_holds_collectives(model):
    """As the last rank of several it has no rows of source b: its passes must be as many."""

    class Last(OneRank):
        collective_free = False

        def rows(self):
            return 1, 2

    calls, forward = [], model.forward
    model.forward = lambda *args, **more: calls.append(1) or forward(*args, **more)
    found = evaluate_loss(model, ROWS, SOURCES, Last(), 4)
    assert len(calls) == 2, "one batch of both sources"
    losses, _ = by_hand(model, ROWS[4:])
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
