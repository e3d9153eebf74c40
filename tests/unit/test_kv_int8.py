"""lumen/kv_int8.py: a cache in int8 is a full cache of rounded numbers, for every model, batch and
order of reading; and the rounding is within half a step."""

import pytest
import torch
from sparse_models import KINDS, ids, make
from test_sample import code, command, save
from test_sample import make as make_dense

from lumen import kv_int8
from lumen.engine import Engine, Row, run
from lumen.kv_int8 import Int8Cache, Int8Rows, load, store
from lumen.sampling import Choice
from lumen.stream import Stream
from model import KVCache

G = torch.Generator().manual_seed(0)
SHAPES = ("dense", "fine", "mod", "mod static", "mod ffn", "hybrid", "beside")


class Rounded(KVCache):
    """A full cache that is given numbers as int8 would hold them."""

    def write(self, layer, pos, k, v):
        return super().write(layer, pos, load(*store(k), k.dtype), load(*store(v), v.dtype))


def numbers(*shape):
    """Vectors of very different sizes, one of them zero."""
    x = torch.randn(shape, generator=G) * 10 ** torch.empty(*shape[:-1], 1).uniform_(
        -20, 20, generator=G
    )
    x.view(-1, shape[-1])[0] = 0.0
    return x


def test_a_number_is_off_by_half_a_step_at_most():
    x = numbers(2000, 16)
    q, scale = store(x)
    assert q.abs().max() == 127
    error = (load(q, scale, torch.float32) - x).abs()
    # of a vector's own scale; it is rounded to bf16, by 2^-8 of itself at most
    step = x.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)
    assert (error <= step * (0.5 + 1e-5)).all()
    assert (error.amax(-1)[1:] > 0).all(), "it is no copy"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_get_the_exact_product_rounded_once(dtype):
    x = torch.randn(500, 16, generator=G) * 10 ** torch.empty(500, 1).uniform_(-6, 3, generator=G)
    q, scale = store(x)
    assert torch.equal(load(q, scale, dtype), load(q, scale, torch.float32).to(dtype))


def test_what_is_not_finite_stays_so():
    x = torch.ones(3, 16)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    back = load(*store(x), torch.float32)
    assert not back[0].isfinite().any() and not back[1].isfinite().any()
    assert torch.allclose(back[2], x[2], rtol=0.01)


def test_a_number_takes_a_byte_and_a_vector_two_more():
    cfg = make().cfg
    cache = Int8Cache(cfg, 3, 20)
    total = sum(rows.n_bytes() for rows in (*cache.k, *cache.v))
    assert total == 2 * cfg.n_layers * 3 * cfg.n_kv_heads * 21 * (cfg.head_dim + 2)


def test_parts_are_views_and_copies_keep_every_bit():
    rows = Int8Rows(*store(numbers(3, 2, 5, 8)))
    before = rows.q.clone(), rows.scale.clone()
    part = rows[1:]
    part[0, :, :3] = rows[0, :, :3]  # row 1 of the whole
    assert torch.equal(rows.q[1, :, :3], before[0][0, :, :3])
    assert torch.equal(rows.scale[1, :, :3], before[1][0, :, :3])
    assert torch.equal(rows.q[1, :, 3:], before[0][1, :, 3:])
    rows[2] = 0.0
    assert not rows.to(torch.float32)[2].any()
    assert torch.equal(rows.q[0], before[0][0])


def decode(model, cache_type, prompts, n=6):
    """(logits (B, V) of each pass): prompts of ragged rows, then tokens one by one; the last row
    pauses in between."""
    cache = cache_type(model.cfg, len(prompts), max(map(len, prompts)) + n)
    most = max(map(len, prompts))
    idx = torch.tensor([p + [-1] * (most - len(p)) for p in prompts])
    found = []
    with torch.no_grad():
        for step in range(n):
            found.append(model(idx, cache=cache))
            idx = found[-1].argmax(-1, keepdim=True)
            if step == 2:
                idx[-1] = -1
    return found


@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_a_full_cache_of_rounded_numbers(kind):
    """Ragged rows, pauses and the tokens that MoD keeps included: bit for bit."""
    model = make(**KINDS[kind]).eval()
    prompts = [row[:n] for row, n in zip(ids(3, 12).tolist(), (12, 5, 1))]
    int8 = decode(model, Int8Cache, prompts)
    for a, b in zip(int8, decode(model, Rounded, prompts)):
        assert torch.equal(a, b)
    full = decode(model, KVCache, prompts)
    differs = max((a - b).abs().max() for a, b in zip(int8, full))
    assert 0 < differs < 0.1 * full[0].std(), "rounding shows, and is small"


def test_a_model_makes_the_cache_that_it_is_told_to():
    model = make_dense(2)
    model.cache_type = seen = type("Seen", (Int8Cache,), {"made": 0, "__init__": count})
    list(model.generate([[1, 2, 3]], 3, [0], temperature=0))
    Engine(model, slots=2)
    assert seen.made == 2
    kv_int8.use(model, "int8")
    assert model.cache_type is Int8Cache
    kv_int8.use(model, "full")
    assert model.cache_type is KVCache


def count(self, *args, **kwargs):
    type(self).made += 1
    Int8Cache.__init__(self, *args, **kwargs)


def engine_ids(model, prompts, slots, reuse=True):
    """What rows write that come one behind the other, and how many tokens they took over."""
    rows = []
    for number, prompt in enumerate(prompts):
        stream = Stream(None, prompt, (), (), 12, model.cfg.max_seq_len - len(prompt))
        rows.append(Row(stream, Choice(temperature=1.0), seed=number))
    written = {id(row): [] for row in rows}
    for news in run(Engine(model, slots, chunk=8, reuse=reuse), rows):
        written[id(news.row)].append(news.token)
    return list(written.values()), sum(row.reused for row in rows)


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_under_the_engine_a_text_is_its_own(kind):
    """Chunks, neighbours, and keys taken over from another slot change nothing."""
    model = make(**KINDS[kind]).eval()
    model.cache_type = Int8Cache
    begin = ids(1, 10, seed=5).tolist()[0]
    prompts = [begin + row[: n + 1] for n, row in enumerate(ids(5, 6).tolist())]
    alone = [engine_ids(model, [p], 1)[0][0] for p in prompts[:1]]
    together, reused = engine_ids(model, prompts, 3)
    apart, none = engine_ids(model, prompts, 2, reuse=False)
    assert together[0] == alone[0]
    assert together == apart
    assert reused > 0 and none == 0


def test_the_command_takes_it(tmp_path, capsys, monkeypatch):
    save(tmp_path / "run", 1, seed=1)
    argv = [str(tmp_path / "run"), "--ids", "1 2 3", "--max_new_tokens", "8", "--temperature", "0"]
    made = []
    monkeypatch.setattr(Int8Cache, "before", lambda *a: made.append(1) or KVCache.before(*a))
    assert len(command(capsys, *argv)[0].split()) == 11
    assert not made
    assert len(command(capsys, *argv, "--kv", "int8")[0].split()) == 11
    assert made
    assert "E002" in code(command, capsys, *argv, "--kv", "int4")
