"""The dense model, property by property: what it computes is held against plain formulas, against
transformers and against itself by another way (cached and full, chunked and whole, recomputed and
kept)."""

import dataclasses
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lumen import tokenizer as tokenizers
from lumen.branches import tree_of
from lumen.model_keys import RANGES, check_range, model_from_keys
from lumen.sampling import Sampling
from lumen.scorer import Scorer
from model import (
    Attention,
    AttentionInputs,
    HeadLoss,
    KVCache,
    ModelConfig,
    RMSNorm,
    Transformer,
    choose,
    role,
    rope_tables,
    rotate,
)

SMALL = dict(vocab_size=97, d_model=32, n_layers=2, n_heads=4, multiple_of=16, max_seq_len=32)
KINDS = {
    "default": {},
    "gqa": dict(n_kv_heads=2),
    "mqa llama untied": dict(n_kv_heads=1, qk_norm=False, tie_embeddings=False),
    "lunaris": dict(norm_order="lunaris", n_kv_heads=2),
    "rope first, wide heads": dict(rope_first=True, head_dim=16),
    "yarn": dict(rope_scaling={"type": "yarn", "factor": 4.0}),
    "extras": dict(extras=["value_residual", "x0", "relu2", "softcap"], n_kv_heads=2),
    "extras lunaris": dict(extras=["value_residual", "softcap"], norm_order="lunaris"),
}


def make(seed=0, std=None, **changes) -> Transformer:
    model = Transformer(ModelConfig(**{**SMALL, **changes}))
    model.init_weights(seed)
    if std:  # weights large enough for attention to look somewhere in particular
        gen = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=gen)
                p.copy_(1 + 0.2 * noise if p.dim() == 1 else noise * std)
    return model


def ids(*shape, high=97, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def grads(model, x, y, **kwargs):
    model.zero_grad()
    total, stats = model(x, y, **kwargs)
    total.backward()
    return total.detach(), stats, {n: p.grad.clone() for n, p in model.named_parameters()}


def close(a, b, tol):
    return (a.double() - b.double()).abs().max().item() <= tol * max(
        1.0, b.double().abs().max().item()
    )


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_decoding_equals_full_forward(kind):
    """Ragged rows, padded prefill in two chunks, then steps in which some rows have ended."""
    model = make(std=0.2, **KINDS[kind]).eval()
    rows = [ids(n, seed=n).tolist() for n in (9, 3, 14)]
    cache = KVCache(model.cfg, 3, 20)
    fed = [[], [], []]

    def feed(new):
        width = max(map(len, new))
        logits = model(torch.tensor([r + [-1] * (width - len(r)) for r in new]), cache=cache)
        for i, r in enumerate(new):
            fed[i] += r
            if r:
                full = model(torch.tensor([fed[i]]))[0, -1]
                assert close(logits[i], full, 1e-5), (kind, i, len(fed[i]))
        assert cache.filled.tolist() == list(map(len, fed))

    feed([r[:4] for r in rows])
    feed([r[4:] or [7] for r in rows])
    for step in range(
        6
    ):  # row 2 is full after 20 tokens, row 0 pauses: neither may disturb the others or itself
        feed([[] if step % 2 else [step], [50 + step], [step + 1]])
    assert cache.filled[2] == 20
    feed([[5, 6, 8], [4], []])
    feed([[1, 2, 3], [4], []])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scoring_by_branches_equals_full_forward(kind):
    """What evaluate.py does: several trees in one pass, behind a trunk that was computed before;
    each branch sees its own past alone. Other kinds of layers: test_scorer.py."""
    model = make(std=0.2, **KINDS[kind]).eval()
    head, one, other = (ids(n, seed=n).tolist() for n in (9, 8, 3))
    tails = [ids(n, seed=20 + n).tolist() for n in (7, 2, 4)]
    texts = [head + one + tails[0], head + one + tails[1], head + other + tails[2]]
    trees = [[(text, len(head)) for text in texts[:2]], [(texts[2], len(head))]]
    scorer = Scorer(model, tokenizers.load("bytes"), 97)
    found = scorer.run([tree_of(tree, len(head) - 1) for tree in trees])
    assert scorer.header[1].length == len(head) - 1
    for scored, text in zip([*found[0], *found[1]], texts, strict=True):
        logits = model(torch.tensor([text[:-1]]))[0, len(head) - 1 :]
        targets = torch.tensor(text[len(head) :])
        want = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
        assert scored.logprob == pytest.approx(want, abs=1e-4), f"{kind}: see lumen/branches.py"


@torch.no_grad()
def test_chunk_reaching_the_last_slot_is_not_overwritten_by_padding():
    model = make(std=0.2).eval()
    cache = KVCache(model.cfg, 2, 5)
    x = ids(2, 5)
    model(torch.cat((x[:, :3], torch.tensor([[-1], [5]])), 1), cache=cache)
    logits = model(torch.tensor([[x[0, 3], x[0, 4], -1], [9, -1, -1]]), cache=cache)
    assert close(logits[0], model(x[:1])[0, -1], 1e-5)


@torch.no_grad()
def test_cache_works_on_its_bytes_only():
    model = make(n_kv_heads=2)
    cache = KVCache(model.cfg, 3, 31, dtype=torch.bfloat16)
    real = sum(t.numel() * t.element_size() for t in cache.k + cache.v)
    # keys and values of 3 rows, 31 tokens and the slot for padding, 2 heads of 8, 2 bytes each
    assert real == 2 * model.cfg.n_layers * 3 * 32 * 2 * 8 * 2


def test_generate_pushes_each_token_through_once():
    model, pushed = make(), []
    model.blocks[0].register_forward_pre_hook(
        lambda _, args: pushed.append(tuple(args[0].shape[:2]))
    )
    out = list(model.generate([[1, 2, 3], [4]], 10, [0, 0]))
    assert len(out) == 10 and pushed == [(2, 3)] + [(2, 1)] * 9


def test_generate_ends_rows_and_restores_the_mode():
    model = make(std=0.2).train()
    free = list(zip(*model.generate([[1], [2, 3]], 8, [0, 0], temperature=0)))
    assert model.training
    stop = free[0][2]
    rows = list(zip(*model.generate([[1], [2, 3]], 8, [0, 0], stop_ids=(stop,), temperature=0)))
    at = free[0].index(stop) + 1
    assert rows[0][:at] == free[0][:at] and all(i is None for i in rows[0][at:])
    steps = model.generate([[1]], 8, [0])
    next(steps)
    assert not model.training
    steps.close()
    assert model.training
    with pytest.raises(FloatingPointError):
        model.norm.weight.data.fill_(math.nan)
        next(model.generate([[1]], 1, [0]))


def test_generate_masks_a_padded_vocabulary():
    model = make(vocab_size=97)
    with torch.no_grad():
        model.embed.weight[50:] *= 50
    drawn = {
        i
        for row in model.generate([[1, 2]] * 4, 28, [1, 2, 3, 4], n_vocab=50, temperature=2.0)
        for i in row
    }
    assert max(drawn) < 50 and len(drawn) > 10
    assert max(i for row in model.generate([[60]] * 4, 20, [1, 2, 3, 4]) for i in row) >= 50


def test_repetition_penalty_knows_the_prompt_and_what_was_said():
    model, prompt = make(std=0.2), ids(30).tolist()
    penal = Sampling([prompt], model.cfg.vocab_size, temperature=0, repetition_penalty=100.0)
    out = [row[0] for row in model.generate([prompt], 20, [0], choose=penal)]
    assert len({*out} - {*prompt}) == 20
    out = [row[0] for row in model.generate([prompt], 20, [0], temperature=0)]
    assert len({*out} - {*prompt}) < 20


def test_learns_that_labels_are_the_next_token():
    model = make(n_layers=2, d_model=48, vocab_size=12)
    period = [3, 7, 1, 9, 4, 11, 2]
    data = torch.tensor((period * 10)[:66])
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for step in range(60):
        rows = torch.stack([data[(step + i) % 7 :][:33] for i in range(8)])
        total, stats = model(rows[:, :-1], rows[:, 1:])
        opt.zero_grad()
        (total / rows[:, 1:].numel()).backward()
        opt.step()
    assert stats["ce"] / stats["count"] < 0.05
    out = [row[0] for row in model.generate([period[2:6]], 20, [0], temperature=0)]
    assert out == (period * 4)[6:26]


# ---------------------------------------------------------------- choose

OPTIONS = [
    {},
    dict(temperature=0.5),
    dict(top_k=5),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(repetition_penalty=1.7),
    dict(temperature=1.4, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_choose_draws_from_transformers_distribution(options):
    transformers = pytest.importorskip("transformers")
    n, V = 20000, 30
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(3)) * 2
    logits[:, -3:] = -math.inf
    before = torch.tensor([[1, 4, 4, 9]])
    classes = dict(
        repetition_penalty=transformers.RepetitionPenaltyLogitsProcessor,
        temperature=transformers.TemperatureLogitsWarper,
        top_k=transformers.TopKLogitsWarper,
        top_p=transformers.TopPLogitsWarper,
        min_p=transformers.MinPLogitsWarper,
    )
    want = logits.clone()
    for name, cls in classes.items():
        if name in options:
            want = cls(options[name])(before, want)
    p = want.softmax(-1)[0].double()
    gens = [torch.Generator().manual_seed(i) for i in range(n)]
    choose = Sampling(before.expand(n, 4).tolist(), V, **options)
    drawn = choose(logits.expand(n, V), gens)
    counts = torch.bincount(drawn, minlength=V).double()
    assert (counts[p == 0] == 0).all()
    sigma = (p * (1 - p) * n).sqrt().clamp(min=1)
    assert ((counts - p * n).abs() < 4.5 * sigma).all()


def test_choose_limits():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1)
    gens = [torch.Generator().manual_seed(i) for i in range(3)]
    for greedy in (
        dict(temperature=0),
        dict(temperature=1e-30),
        dict(top_k=1),
        dict(top_p=1e-6),
        dict(min_p=1.0),
    ):
        assert torch.equal(Sampling([[]] * 3, 20, **greedy)(logits, gens), best), greedy
    # one draw per row whatever the options: a row's stream of random numbers depends on nothing
    # else
    a, b = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    Sampling([[]], 20)(logits[:1], [a])
    Sampling([[]], 20, top_k=3, top_p=0.5)(logits[:1], [b])
    assert torch.equal(a.get_state(), b.get_state())


def test_the_models_own_choose_is_the_full_one_without_its_filters():
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) * 2
    for options in ({}, dict(temperature=0), dict(temperature=1.4), dict(top_k=5, temperature=0.7)):
        gens = [[torch.Generator().manual_seed(i) for i in range(500)] for _ in range(2)]
        full = Sampling([[]] * 500, 40, **options)(logits, gens[0])
        assert torch.equal(choose(logits, gens[1], **options), full), options


# ---------------------------------------------------------------- head and loss


def reference_loss(x, w, t, z_loss):
    logits = x @ w.T
    lse, valid = logits.logsumexp(-1), t >= 0
    ce = F.cross_entropy(logits, t.clamp(min=0), reduction="none")[valid].sum()
    z = z_loss * lse[valid].square().sum()
    return ce, z, (logits.argmax(-1) == t)[valid].sum()


@pytest.mark.parametrize("z_loss", (0.0, 0.01))
@pytest.mark.parametrize(
    ("N", "V"), [(1, 7), (50, 97), (63, 70000), (64, 70000), (65, 70000), (130, 70000)]
)
def test_head_loss_equals_cross_entropy(N, V, z_loss):
    """With 70,000 ids a chunk on the CPU is 64 rows: below, at, above and at twice the boundary."""
    gen = torch.Generator().manual_seed(N)
    x = torch.randn(N, 4, generator=gen).requires_grad_()
    w = torch.randn(V, 4, generator=gen).requires_grad_()
    t = torch.randint(0, V, (N,), generator=gen)
    t[::3] = -1 - (torch.arange(N)[::3] % 3)
    if N == 1:
        t[0] = 3
    total, ce, z, _ = HeadLoss.apply(x, w, t, z_loss, True)
    (3 * total).backward()

    def reference(dtype):
        a, b = (p.detach().to(dtype).requires_grad_() for p in (x, w))
        ce, z, correct = reference_loss(a, b, t, z_loss)
        (3 * (ce + z)).backward()
        return (ce + z, ce, z, a.grad, b.grad), correct

    (exact, correct), (plain, _) = reference(torch.float64), reference(torch.float32)
    for got, want, rounded in zip(
        (total, ce, z, x.grad, w.grad), exact, plain
    ):  # as exact as plain fp32 autograd
        assert (got - want).abs().max() <= 2 * (
            rounded - want
        ).abs().max() + 2e-6 * want.abs().max()
    assert (x.grad[t < 0] == 0).all()
    with torch.no_grad():
        total2, ce2, z2, n = HeadLoss.apply(x, w, t, z_loss, False)
    assert (
        n == correct and torch.equal(total2, total) and torch.equal(ce2, ce) and torch.equal(z2, z)
    )


def test_head_loss_counts_correct_tokens_and_ignores_all():
    w = torch.eye(8)
    x, t = w[[0, 1, 2, 3, 4]], torch.tensor([0, 1, 5, -1, 4])
    with torch.no_grad():
        assert HeadLoss.apply(x, w, t, 0.0, False)[3] == 3
    model = make()
    total, stats, g = grads(model, ids(2, 5), torch.full((2, 5), -100))
    assert total == 0 and stats["count"] == 0 and all((v == 0).all() for v in g.values())


@pytest.mark.parametrize("tie", (True, False))
def test_model_loss_and_gradients_equal_plain_autograd(tie):
    model, x, y = make(tie_embeddings=tie, std=0.1), ids(2, 9), ids(2, 9, seed=1)
    y[0, 3:6] = -1
    model.z_loss = 0.003
    total, stats, g = grads(model, x, y)
    model.zero_grad()
    logits = model(x)
    valid = y >= 0
    ce = F.cross_entropy(logits[valid], y[valid], reduction="sum")
    z = 0.003 * logits.logsumexp(-1)[valid].square().sum()
    (ce + z).backward()
    assert (
        close(total, ce + z, 1e-6) and close(stats["ce"], ce, 1e-6) and close(stats["z"], z, 1e-6)
    )
    assert stats["count"] == 15 and "correct" not in stats
    for n, p in model.named_parameters():
        assert close(g[n], p.grad, 2e-6), n
    with torch.no_grad():
        assert model(x, y)[1]["correct"] == (logits.argmax(-1) == y)[valid].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_into_micro_batches_gives_the_same_gradient(kind):
    model, x, y = make(std=0.1, **KINDS[kind]), ids(6, 16), ids(6, 16, seed=1)
    y[1, 4:] = -1
    model.z_loss = 1e-3
    whole = grads(model, x, y)[2]
    for sizes in ((3, 3), (1, 5), (1, 1, 1, 1, 1, 1), (4, 2)):
        model.zero_grad()
        for a, b in zip(x.split(sizes), y.split(sizes)):
            model(a, b)[0].backward()
        for n, p in model.named_parameters():
            assert (p.grad - whole[n]).norm() <= 1e-6 * whole[n].norm(), (n, sizes)


# ---------------------------------------------------------------- RoPE


@pytest.mark.parametrize("cast", (False, True), ids=("fp32", "after .to(bfloat16)"))
@pytest.mark.parametrize("scaling", (None, {"type": "yarn", "factor": 4.0}), ids=("plain", "yarn"))
def test_rope_scores_depend_on_the_difference_of_positions_only(cast, scaling):
    """A table kept in the model would lose its precision, or its imaginary part, in .to(); ours is
    made anew."""
    model = make(rope_scaling=scaling)
    dtype = torch.bfloat16 if cast else torch.float32
    if cast:
        model.to(torch.bfloat16)
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, model.cfg.head_dim, generator=gen).to(dtype) for _ in range(2))

    def score(i, j):
        a, b = (rotate(t, rope_tables(model.cfg, torch.tensor([[n]]))) for t, n in ((q, i), (k, j)))
        return (a.float() * b.float()).sum().item()

    tol = 0.05 if cast else 2e-4
    for difference in (0, 1, 5, 30):
        scores = [score(base + difference, base) for base in (0, 10, 110, 1000)]
        assert max(scores) - min(scores) < tol, (difference, scores)
    assert (
        abs(score(5, 0) - score(0, 5)) > 0.1 and abs(score(9, 0) - score(2, 0)) > 0.1
    )  # and they do depend on it


def test_rope_is_the_rotation_of_the_paper():
    """Pairs (i, i + D/2) as complex numbers times exp(i pos theta^(-2i/D)), in float64."""
    cfg = ModelConfig(**SMALL | dict(head_dim=16, rope_theta=500.0))
    x = torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(0))
    freq = 500.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(7, 8, dtype=torch.float64), torch.arange(7)[:, None] * freq)[
        :, None
    ]
    y = torch.complex(x[..., :8].double(), x[..., 8:].double()) * turn
    assert close(
        rotate(x, rope_tables(cfg, torch.arange(7))), torch.cat((y.real, y.imag), -1), 1e-6
    )


SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 256},
]


@pytest.mark.parametrize("head_dim", (16, 64, 128))
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rope_scaling_equals_transformers(scaling, head_dim):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    theirs = {("rope_type" if k == "type" else k): v for k, v in scaling.items()} | {
        "rope_theta": 500000.0
    }
    size = dict(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim)
    hf = LlamaConfig(**size, max_position_embeddings=16384, rope_parameters=theirs)
    inv_freq, gain = rope.ROPE_INIT_FUNCTIONS[theirs["rope_type"]](hf, "cpu")
    cfg = ModelConfig(
        1,
        4 * head_dim,
        1,
        4,
        head_dim=head_dim,
        max_seq_len=16384,
        rope_theta=500000.0,
        rope_scaling=scaling,
    )
    for pos in (
        0,
        1,
        2,
        100,
        16000,
    ):  # angles of position 1 are the frequencies themselves; fp32 angles lose digits
        cos, sin = rope_tables(cfg, torch.tensor([pos]))
        c, s = (pos * inv_freq).cos() * gain, (pos * inv_freq).sin() * gain
        assert close(cos[0, 0], torch.cat((c, c)), 1e-6 if pos < 3 else 2.5e-7 * pos)
        assert close(sin[0, 0], torch.cat((-s, s)), 1e-6 if pos < 3 else 2.5e-7 * pos)


# ---------------------------------------------------------------- shapes and layers


def test_gqa_equals_repeated_heads():
    """Copying each key/value head to every query head of its group must change nothing."""
    small, big = make(n_kv_heads=2, std=0.2), make(std=0.2)
    state = small.state_dict()
    D, C = small.cfg.head_dim, small.cfg.d_model
    for name, w in state.items():
        if name.endswith("wqkv.weight"):
            q, k, v = w.split([4 * D, 2 * D, 2 * D])
            k, v = (t.view(2, D, C).repeat_interleave(2, 0).reshape(4 * D, C) for t in (k, v))
            state[name] = torch.cat((q, k, v))
    big.load_state_dict(state)
    x = ids(2, 12)
    assert close(small(x), big(x), 1e-5)


def test_attention_equals_the_written_out_formula():
    cfg = ModelConfig(**SMALL | dict(n_kv_heads=2))
    attn = Attention(cfg)
    for p in attn.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    rope = rope_tables(cfg, torch.arange(6))
    q, k, v = (x @ attn.wqkv.weight.T).split([32, 16, 16], -1)
    q, k, v = (t.view(2, 6, -1, 8) for t in (q, k, v))

    def norm(t, w):
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w

    q, k = rotate(norm(q, attn.q_norm.weight), rope), rotate(norm(k, attn.k_norm.weight), rope)
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(2, 6, 32) @ attn.wo.weight.T
    assert close(attn(x, AttentionInputs(rope)), y, 1e-5)


def test_swiglu_and_block_equal_the_written_out_formulas():
    model = make(std=0.3)
    block, x = model.blocks[0], torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    gate, up = x @ block.ffn.w13.weight[:96].T, x @ block.ffn.w13.weight[96:].T
    assert close(block.ffn(x), (gate * gate.sigmoid() * up) @ block.ffn.w2.weight.T, 1e-6)
    inputs = AttentionInputs(rope_tables(model.cfg, torch.arange(5)))
    y = x + block.attn(block.attn_norm(x), inputs)
    assert close(x + block(x, inputs)[0], y + block.ffn(block.ffn_norm(y)), 1e-6)
    lunaris = make(std=0.3, norm_order="lunaris").blocks[0]
    y = x + lunaris.attn(x, inputs)
    assert close(x + lunaris(x, inputs)[0], y + lunaris.ffn(lunaris.ffn_norm(y)), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_causality(kind):
    model, x = make(std=0.2, **KINDS[kind]).eval(), ids(1, 16)
    before = model(x)
    for t in (1, 7, 15):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % 97
        after = model(y)
        assert torch.equal(after[0, :t], before[0, :t]) and not close(
            after[0, t], before[0, t], 1e-3
        )


@pytest.mark.parametrize(
    ("d_model", "multiplier", "multiple_of", "d_ff"),
    [
        (768, 4.0, 256, 2048),
        (1024, 4.0, 256, 2816),
        (256, 4.0, 256, 768),
        (512, 4.0, 64, 1408),
        (96, 2.5, 16, 160),
    ],
)
def test_d_ff_by_lunaris_rule(d_model, multiplier, multiple_of, d_ff):
    sizes = dict(
        d_model=d_model, n_heads=4, ffn_hidden_multiplier=multiplier, multiple_of=multiple_of
    )
    assert ModelConfig(**sizes).d_ff == d_ff
    assert ModelConfig(**sizes, d_ff=100).d_ff == 100


def test_init_is_seeded_per_name_with_the_stds_of_the_table():
    big = dict(vocab_size=512, d_model=128, n_layers=4, tie_embeddings=False, init_std=0.05)
    model = make(seed=3, **big)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
        else:
            std = 0.05 / 8**0.5 if name.endswith(("wo.weight", "w2.weight")) else 0.05
            assert abs(p.std().item() / std - 1) < 0.02 and abs(p.mean().item()) < 0.05 * std, name
    backwards = Transformer(model.cfg)
    params = list(backwards.named_parameters())
    backwards.named_parameters = lambda: reversed(params)
    backwards.init_weights(3)
    deeper, other = (
        make(seed=3, **big | dict(n_layers=6)).state_dict(),
        make(seed=4, **big).state_dict(),
    )
    weights = [p for p in model.parameters() if p.dim() == 2]
    assert len({p.flatten()[:4].sum().item() for p in weights}) == len(
        weights
    )  # no two start alike
    for name, p in model.state_dict().items():
        assert torch.equal(p, backwards.state_dict()[name])
        if not name.endswith(("wo.weight", "w2.weight")):
            assert torch.equal(p, deeper[name])
        assert p.dim() == 1 or not torch.equal(p, other[name])


@pytest.mark.parametrize("outputs", ("scaled", "same", "zero"))
def test_initial_scale_by_role(outputs):
    """Experts' outputs too; what is not named keeps init_std, and the draws are the same."""
    own = dict(init_std=0.05, init_embedding=0.5, init_head=0.0, init_outputs=outputs)
    keys = dict(vocab_size=512, d_model=128, n_layers=4, tie_embeddings=False)
    keys |= dict(n_experts=4, moe_every=2, d_expert=64, n_shared_experts=1)
    plain, model = make(init_std=0.05, **keys), make(**keys | own)
    share = {"scaled": 8**-0.5, "same": 1.0, "zero": 0.0}[outputs]
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        if role(name) == "norm":
            continue
        of = {"embedding": 0.5, "head": 0.0}.get(role(name), 0.05)
        out = re.search(r"wo\.weight|w2\.weight|experts\.w2", name)
        want = 0.05 * share if out else of
        assert p.std().item() == pytest.approx(want, rel=0.03), name
        unscaled = q * (8**0.5 if out else 1.0) / 0.05  # the draw itself
        torch.testing.assert_close(p, unscaled * want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("d_model", (64, 128, 512, 768))
def test_initial_weights_follow_the_width(d_model):
    """A matrix of fan-in d_model passes on the same share of its input at any width."""
    cfg = ModelConfig(vocab_size=97, d_model=d_model, n_layers=1, n_heads=2)
    assert cfg.init_std * d_model**0.5 == pytest.approx(0.02 * 512**0.5)
    assert (
        ModelConfig(vocab_size=97, d_model=d_model, n_layers=1, n_heads=2, init_std=0.02).init_std
        == 0.02
    )


def test_dropout_is_off_in_eval_and_on_in_training():
    model, plain, x = make(dropout=0.3), make(), ids(2, 8)
    assert torch.equal(model.eval()(x), plain(x))
    model.train()
    torch.manual_seed(0)
    a = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), a) and not torch.equal(model(x), a)


@pytest.mark.parametrize("dropout", (0.0, 0.2))
@pytest.mark.parametrize("how", ("block", "selective"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_recompute_gives_equal_loss_and_gradients(dropout, dtype, how):
    model, x, y = make(dropout=dropout, std=0.1), ids(2, 12), ids(2, 12, seed=1)
    model.compute_dtype = dtype
    calls = []
    model.blocks[1].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    kept = grads(model, x, y)
    model.recompute = how
    torch.manual_seed(5)
    again = grads(model, x, y)
    assert len(calls) == 3  # once, then forward and again in backward
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(g, again[2][n]) for n, g in kept[2].items())


# ---------------------------------------------------------------- precision


def test_bf16_compute_keeps_fp32_parameters_and_gradients():
    model, x, y = make(std=0.1, n_kv_heads=2), ids(2, 12), ids(2, 12, seed=1)
    exact = grads(model, x, y)
    model.compute_dtype, stream = torch.bfloat16, []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, args, out: stream.extend((args[0].dtype, out[0].dtype))
        )
    total, stats, g = grads(model, x, y)
    assert set(stream) == {torch.bfloat16} and model(x).dtype == torch.bfloat16
    assert total.dtype == stats["ce"].dtype == torch.float32 and abs(total / exact[0] - 1) < 0.01
    for n, p in model.named_parameters():
        assert p.dtype == g[n].dtype == torch.float32
        assert (g[n] - exact[2][n]).norm() < 0.1 * exact[2][n].norm(), n


def test_norms_compute_in_fp32():
    """With a mean square that bf16 cannot sum exactly, the result is the fp32 one rounded once,
    times the weight."""
    x = (1 + 0.01 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    norm = RMSNorm(512, 1e-6)
    norm.weight.data.uniform_(0.5, 2)
    exact = (x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(
        torch.bfloat16
    )
    got = norm(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact * norm.weight.bfloat16())
    huge = torch.full((1, 512), 3e4, dtype=torch.float16)  # its square is beyond fp16
    assert torch.equal(RMSNorm(512, 1e-6)(huge), torch.ones(1, 512).half())


@torch.no_grad()
def test_casting_the_model_once_equals_casting_in_each_layer():
    """What sample.py does to decode in bf16."""
    model, x = make(std=0.1, tie_embeddings=False), ids(2, 12)
    model.compute_dtype = torch.bfloat16
    before = model(x)
    assert torch.equal(model.to(torch.bfloat16)(x), before)


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("kind", KINDS)
def test_counts(kind, device):
    cfg = ModelConfig(**SMALL | KINDS[kind])
    with torch.device(device):
        model = Transformer(cfg)
    C, H, G, D, L, V = (
        cfg.d_model,
        cfg.n_heads,
        cfg.n_kv_heads,
        cfg.head_dim,
        cfg.n_layers,
        cfg.vocab_size,
    )
    extras = cfg.extras or []
    layer = C * (H + 2 * G) * D + H * D * C + (2 if "relu2" in extras else 3) * C * cfg.d_ff
    if cfg.norm_order == "lunaris":
        layer += C + (H + G) * D
    else:
        layer += 2 * C + (2 * D if cfg.qk_norm else 0)
    tables = V * C * (1 if cfg.tie_embeddings else 2)
    mixes = 2 * (L - 1) * len({"value_residual", "x0"} & {*extras})
    total = L * layer + mixes + C + tables
    assert model.n_params() == {"total": total, "active": total, "non_embedding": total - tables}
    assert total == sum(p.numel() for p in model.parameters())
    assert all(p.device.type == device for p in model.parameters())


@pytest.mark.parametrize("recompute", ("none", "block", "selective"))
@pytest.mark.parametrize("kind", KINDS)
def test_flops_per_token_equals_the_measured_ones(kind, recompute):
    """FlopCounterMode counts 2 per multiplication and addition of every product that runs,
    HeadLoss's own included.

    With the math kernel attention is written out, so the count is that of PaLM's convention: T x T
    scores, causality not discounted. (A flash kernel counts 2.5 forwards for its backward, which
    makes the scores once more.) What recomputation adds is not in the convention: one more forward
    of the blocks, up to what their last product needs. The counter does not know addmm_, which
    HeadLoss uses."""
    model = make(**KINDS[kind])
    model.recompute = recompute
    x, extra = ids(2, 16), {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * math.prod(a) * b[1]}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=extra) as counter,
    ):
        model(x, x)[0].backward()
    want = 32 * model.flops_per_token(16)
    if recompute == "block":
        want += 32 * ((want // 32 - 6 * 97 * 32) // 3 - 2 * 2 * 32 * model.cfg.d_ff)
    assert counter.get_total_flops() == want


# ---------------------------------------------------------------- refusals

REFUSALS = [
    (dict(n_layers=0), ("model.n_layers", "0", "[1, ")),
    (dict(init_outputs="small"), ("model.init_outputs", "'small'", "scaled, same, zero")),
    (dict(init_head=0.01), ("model.init_head", "0.01", "tie_embeddings: false")),
    (dict(max_seq_len=0), ("model.max_seq_len", "0", ">= 1")),
    (dict(n_heads=0), ("model.n_heads", "0", "[1, ")),
    (dict(multiple_of=0), ("model.multiple_of", "0", ">= 1")),
    (dict(d_model=-8), ("model.d_model", "-8", "[1, ")),
    (dict(n_heads=5), ("model.n_heads", "5", "32", "[2, 4, 8]")),
    (dict(head_dim=7), ("model.head_dim", "7", "even")),
    (dict(n_heads=32), ("model.head_dim", "1 is odd")),
    (dict(n_kv_heads=3), ("model.n_kv_heads", "3", "[1, 2, 4]")),
    (dict(n_kv_heads=8), ("model.n_kv_heads", "8", "[1, 2, 4]")),
    pytest.param(dict(n_kv_heads=-2), ("model.n_kv_heads", "-2")),
    pytest.param(dict(head_dim=-2), ("model.head_dim", "-2")),
    (dict(d_ff=-1), ("model.d_ff", "-1", ">= 0")),
    (dict(dropout=1.0), ("model.dropout", "1.0", "[0, 1)")),
    (dict(dropout=-0.1), ("model.dropout", "-0.1", "[0, 1)")),
    (dict(norm_order="post"), ("model.norm_order", "'post'", "pre", "lunaris")),
    (dict(norm_order="lunaris", qk_norm=False), ("model.qk_norm", "lunaris")),
    (
        dict(rope_scaling={"type": "ntk"}),
        ("model.rope_scaling", "'ntk'", "linear", "yarn", "llama3"),
    ),
    (dict(rope_scaling={"type": "linear"}), ("model.rope_scaling", "linear", "factor")),
    (dict(rope_scaling={"type": "llama3", "factor": 8}), ("model.rope_scaling", "low_freq_factor")),
]


@pytest.mark.parametrize(("change", "words"), REFUSALS, ids=str)
def test_refusals_name_key_value_and_remedy(change, words):
    with pytest.raises(ValueError) as error:
        model_from_keys(SMALL | change)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("> 0", (1e-9, 5), (0, -1, math.nan)),
        (">= 1", (1, 2.5), (0.999, -math.inf)),
        ("[0, 1)", (0, 0.5), (1, -1e-9, math.nan)),
        ("(0, 1]", (1, 0.5), (0, 1.1)),
        ("[1, 3]", (1, 2, 3), (0, 4)),
    ],
)
def test_ranges(interval, inside, outside):
    for value in inside:
        check_range("key", value, interval)
    for value in outside:
        with pytest.raises(ValueError) as error:
            check_range("key", value, interval)
        assert f"key: {value} " in str(error.value) and interval in str(error.value)


def test_every_number_of_the_configuration_is_finite_and_in_its_range():
    for key, interval in RANGES.items():
        value = getattr(ModelConfig(**SMALL), key)
        assert value is None or check_range(key, value, interval) is None
        with pytest.raises(ValueError, match=f"model.{key}"):
            model_from_keys(SMALL | {key: -1 if interval != "(0, 1]" else 0})
    for value in (math.nan, math.inf, 10**12):
        with pytest.raises(ValueError, match="model.norm_eps"):
            model_from_keys(SMALL | dict(norm_eps=float(value) * 1e20))


ROLES = {
    "embed.weight": "embedding",
    "head.weight": "head",
    "norm.weight": "norm",
    "blocks.3.attn_norm.weight": "norm",
    "blocks.3.attn.q_norm.weight": "norm",
    "blocks.3.attn.wqkv.weight": "matrix",
    "blocks.3.ffn.w2.weight": "matrix",
    "blocks.3.ffn.shared.w13.weight": "matrix",
    "blocks.3.ffn.experts.w13": "expert",
    "blocks.3.ffn.router.weight": "router",
    "blocks.3.mod.router.weight": "router",
    "blocks.3.mod.predictor.bias": "router",
}


SPARSE = dict(n_experts=4, n_shared_experts=1, mod_capacity=0.5, tie_embeddings=False)


@pytest.mark.parametrize("kind", [*KINDS, "sparse"])
def test_roles(kind):
    assert {name: role(name) for name in ROLES} == ROLES
    remedy = "by the name of its module: model.py, role; ...norm and ...mix begin at 1"
    for name, p in make(**KINDS.get(kind, SPARSE)).named_parameters():
        found = role(name)
        assert found == ROLES.get(re.sub(r"\d+", "3", name), found)
        vector = p.dim() == 1 and "predictor" not in name
        assert (found == "norm") == vector, f"{name} {tuple(p.shape)} is a {found}, {remedy}"
        assert (found == "expert") == (p.dim() == 3), f"{name} {tuple(p.shape)}: {found}, {remedy}"


# ---------------------------------------------------------------- copied out of the house

ALONE = """
import importlib.util, sys, torch
sys.path.insert(0, sys.argv[1])
from model import ModelConfig, Transformer
sizes = dict(vocab_size=97, d_model=32, n_layers=2, n_heads=4, multiple_of=16, max_seq_len=32)
cfg = ModelConfig(**sizes, n_experts=4, d_expert=16, n_shared_experts=1, mod_capacity=0.5)
model = Transformer(cfg)
model.init_weights(0)
if importlib.util.find_spec("kernels_attention"):
    model.backend = "blocks"
x = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(0))
optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
for step in range(4):
    total, sums = model(x[:, :-1], targets=x[:, 1:])
    (total / sums["count"]).backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(sums["ce"].item())
text = [row[0] for row in model.generate([[1, 2, 3]], 4, [0], temperature=0)]
drawn = list(model.generate([[1, 2, 3], [4]], 4, [0, 1], temperature=0.8, top_k=5))
assert len(drawn) == 4 and all(0 <= i < 97 for row in drawn for i in row)
print(model.blocks[0].ffn.backend, *losses, *text)
print(*sorted(m for m in sys.modules if m in ("kernels", "kernels_attention", "lumen", "yaml")))
"""


def test_the_model_trains_outside_of_the_house(tmp_path):
    """model.py and model_moe.py in a folder by themselves, with the plain formula of the experts;
    with kernels.py and kernels_attention.py beside them by their operators, and the losses are the
    same."""
    said = {}
    alone = ("model.py", "model_moe.py")
    for files in (alone, (*alone, "kernels.py", "kernels_attention.py")):
        folder = tmp_path / str(len(files))
        folder.mkdir()
        for name in files:
            shutil.copy(ROOT / name, folder)
        command = [sys.executable, "-I", "-c", ALONE, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        said[len(files)], modules = done.stdout.splitlines()
        assert modules == ("kernels kernels_attention" if len(files) == 4 else "")
    backends, numbers = zip(*(text.split(maxsplit=1) for text in said.values()))
    assert backends == ("plain", "slices")
    plain, slices = ([float(x) for x in text.split()] for text in numbers)
    assert plain == pytest.approx(slices, rel=1e-5) and plain[3] < plain[0]


def test_a_model_without_vocabulary_is_refused():
    with pytest.raises(ValueError, match="model.vocab_size"):
        Transformer(ModelConfig())


def test_the_resolved_configuration_is_a_fixed_point():
    cfg = ModelConfig(**SMALL | dict(n_kv_heads=2))
    assert ModelConfig(**dataclasses.asdict(cfg)) == cfg and cfg.d_ff == 96 and cfg.head_dim == 8


@pytest.mark.nightly
def test_compiled_model_equals_eager():
    model, x, y = make(n_kv_heads=2, std=0.1), ids(2, 12), ids(2, 12, seed=1)
    eager = grads(model, x, y)
    compiled = torch.compile(model)
    total, stats = compiled(x, y)
    model.zero_grad()
    total.backward()
    assert close(total, eager[0], 1e-5)
    for n, p in model.named_parameters():
        assert close(p.grad, eager[2][n], 1e-5), n


@pytest.mark.parametrize(
    "keys, why",
    [
        ({"n_heads": 0}, "n_heads: 0 must be at least 1"),
        ({"n_heads": 0, "head_dim": 8}, "n_heads: 0 must be at least 1"),
        ({"d_model": 0}, "d_model: 0 must be at least 1"),
        ({"multiple_of": 0}, "multiple_of: 0 must be at least 1"),
        ({"moe_every": 0, "n_experts": 4}, "moe_every: 0 must be at least 1"),
        ({"n_experts": 4, "d_expert": 20}, "d_expert: 20 must be a multiple of 8 .* near it: 16"),
        ({"n_experts": 4, "d_model": 100, "n_heads": 2}, "d_model: 100 must be a multiple of 8"),
        ({"n_experts": 4, "d_expert": -8}, "d_expert: -8 must be a multiple of 8 .* near it: 8"),
        ({"n_experts": -1}, "n_experts: -1 must be at least 0"),
        ({"head_dim": -2}, "head_dim: -2 must be at least 1"),
        ({"n_kv_heads": -2}, "n_kv_heads: -2 must be at least 1"),
        ({"norm_order": "post"}, "norm_order: 'post' is not one of pre, lunaris"),
        ({"router": "sigmoyd"}, "router: 'sigmoyd' is not one of softmax, sigmoid"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_scaling: .* has type 'ntk', not one of default"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling: .* has type None, not one of default"),
        ({"mod_capacity": [0.5]}, "mod_capacity: .* needs 12 numbers, one per layer, not 1"),
    ],
)
def test_a_model_copied_out_refuses_what_its_arithmetic_cannot_do(keys, why):
    """Without lumen/model_keys.py, which a copied model.py does not have: zeros divided by zero,
    and what has a wrong name was another model without a word. dataclasses.replace refuses it
    too."""
    with pytest.raises(ValueError, match=f"model.{why}"):
        ModelConfig(**keys)
    with pytest.raises(ValueError, match=f"model.{why}"):
        unset = dict.fromkeys(("head_dim", "n_kv_heads", "d_expert"), 0)
        dataclasses.replace(ModelConfig(), **unset | keys)
