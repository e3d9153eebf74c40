"""lumen/engine.py: what a sequence writes is its own, whoever comes and goes beside it."""

import random
import types

import pytest
import torch

from lumen import graphs
from lumen.branches import common
from lumen.engine import Engine, Row, generating, run
from lumen.errors import UserError
from lumen.sampling import Choice, Sampling
from lumen.stream import Stream
from model import KVCache, ModelConfig, Transformer, choose

V, CONTEXT, END = 97, 100, 3
SHAPE = dict(vocab_size=V, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=CONTEXT)
KINDS = {
    "dense": {},
    "moe": dict(n_experts=4, d_expert=32),
    "mod": dict(mod_capacity=0.5, mod_every=2),
    "ffn_only": dict(mod_capacity=0.5, mod_ffn_only=True),
    "static": dict(mod_capacity=0.5, mod_routing="static"),
    "hybrid": dict(n_experts=4, d_expert=32, mod_capacity=0.5, mod_every=2),
    "lunaris": dict(norm_order="lunaris"),
}
CHOICES = [
    {"temperature": 0},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.7, "repetition_penalty": 1.3, "min_p": 0.01},
    {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
]


def make(**changes) -> Transformer:
    model = Transformer(ModelConfig(**SHAPE | changes))
    model.init_weights(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # so that the next token depends on all before it
    return model.eval()


def row(ids, n=10, seed=0, ends=(END,), room=None, n_logprobs=-1, **choice) -> Row:
    room = CONTEXT - len(ids) if room is None else room
    return Row(Stream(None, ids, (), ends, n, room), Choice(**choice), seed, n_logprobs)


def tokens(engine: Engine, rows: list[Row]) -> list[list[int]]:
    got = {one: [] for one in rows}
    for news in run(engine, rows):
        got[news.row].append(news.token)
    return list(got.values())


def alone(model, ids, n, seed, choice) -> list[int]:
    """As Transformer.generate writes it, which knows nothing of slots, chunks and beginnings."""
    choose = Sampling([ids], V, **choice)
    with torch.inference_mode():
        return [t for (t,) in model.generate([ids], n, [seed], (END,), choose=choose)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_company_any_order_the_same_text(kind):
    """Random arrivals, lengths, options and cancellations; prompts that begin alike."""
    model, R = make(**KINDS[kind]), random.Random(kind)
    reused = 0
    for _ in range(2):
        engine = Engine(model, R.choice([1, 3, 5]), CONTEXT, chunk=R.choice([4, 16, 64]))
        system = [R.randrange(4, V) for _ in range(20)]
        jobs = []  # when, its row, what it was made of, whether it is cancelled
        for seed in range(9):
            beginning = system if R.random() < 0.5 else []
            ids = beginning + [R.randrange(4, V) for _ in range(R.randrange(1, 40))]
            n, choice = R.randrange(1, 20), R.choice(CHOICES)
            job = (R.randrange(40), row(ids, n, seed, **choice), (ids, n, seed, choice))
            jobs.append((*job, R.random() < 0.2))
        jobs.sort(key=lambda job: job[0])
        got = {job[1]: [] for job in jobs}
        for now in range(10**4):
            for job in jobs:
                if job[0] == now:
                    engine.add(job[1])
            for news in engine.step():
                got[news.row].append(news.token)
            for job in jobs:
                if job[3] and len(got[job[1]]) >= 3:
                    engine.cancel(job[1])
            if now > 40 and not engine.waiting + engine.running:
                break
        for _, one, asked, cancelled in jobs:
            want = alone(model, *asked)
            assert got[one] == (want[:3] if cancelled else want)
            reused += one.reused > 0
    assert reused  # or the test has missed half of what it is for


def test_a_beginning_is_read_once():
    model = make()
    R = random.Random(0)
    system = [R.randrange(4, V) for _ in range(40)]
    engine = Engine(model, 3, chunk=64)
    # three samples of one prompt: it is read once, but for its last token
    rows = [row(system, 5, seed, temperature=1.0) for seed in range(3)]
    tokens(engine, rows)
    assert engine.tokens["prefill"] == 40 + 1 + 1 and [r.reused for r in rows] == [0, 39, 39]
    # a conversation: its next prompt holds all that was said, and only what is new is read
    talk = row(system + [5, 6], 6, ends=(), temperature=0)
    said = tokens(engine, [talk])[0]
    engine.reset_counts()
    engine.slots.copy = None  # it goes on where it lies
    tokens(engine, [follow := row([*talk.stream.ids, *said, 7, 8], 2, temperature=0)])
    # the last token that was said had not been read: nobody had asked what follows it
    assert follow.reused == 42 + 5 and engine.tokens["prefill"] == 3
    cold = Engine(model, 3, reuse=False)
    tokens(cold, [again := row(system, 5), row(system, 5)])
    assert again.reused == 0 and cold.tokens["prefill"] == 80


def test_marks_of_computed_tokens_go_with_their_keys():
    """MoD marks the tokens that a layer has computed. A new row must not see the marks of whoever
    had its slot, and one that takes over a beginning has those of the beginning."""
    model = make(mod_capacity=0.5, mod_every=2)
    with torch.no_grad():
        for mod in model.sparse_layers("mod").values():  # choices that differ from token to token
            for part in (mod.router, mod.predictor):
                part.weight.normal_(generator=torch.Generator().manual_seed(3))
    engine = Engine(model, 2)
    long, short = list(range(4, 90)), [9, 8, 7]
    hot = {"temperature": 20.0, "ends": (), "n_logprobs": 0}  # so that it is of many words
    before = [row(short, 3, **hot), row(long[:60], 5, **hot)]
    tokens(engine, before)
    asked = row(short, 60, seed=1, **hot), row(long[:30], 30, seed=2, **hot)
    news = {one: [] for one in asked}
    for item in run(engine, list(asked)):
        news[item.row].append(item)
    assert asked[1].reused == 29 and 5 < engine.slots.cache.kept[1][0, :60].sum() < 55
    # two that begin alike: one of them is in another slot than what it takes over
    for item in run(engine, [row(long[:30], 30, seed=seed, **hot) for seed in (3, 4)]):
        news.setdefault(item.row, []).append(item)
    for one, items in news.items():
        whole = one.stream.ids + [item.token for item in items]
        with torch.inference_mode():
            logp = model(torch.tensor([whole]))[0, len(one.stream.ids) - 1 : -1].log_softmax(-1)
        want = [place[item.token].item() for item, place in zip(items, logp)]
        assert [item.logprob for item in items] == pytest.approx(want, abs=1e-3)


def nan_model(token: int) -> Transformer:
    """Its logits are NaN for whoever has read this token, and for nobody else."""
    model = make()
    with torch.no_grad():
        model.embed.weight[token] = float("nan")
    tied = model.head_weight
    # tied: the NaN would be in everybody's logits
    model.head_weight = lambda: torch.nan_to_num(tied())
    return model


def test_nan_ends_its_own_row_and_leaves_nothing_behind():
    engine = Engine(nan_model(50), 2)
    long = [5 + i for i in range(40)]
    good, bad = row(long, 20, ends=(), temperature=0), row([*long[:30], 50], 5)
    ends = {news.row: (news.token, news.reason) for news in run(engine, [good, bad])}
    assert ends[bad] == (None, "error") and ends[good][1] == "length"
    assert engine.running == 0
    # masked, a NaN of before would still be zero times NaN
    later = tokens(engine, [row(ids, 9, temperature=0, ends=()) for ids in ([7, 6], long[1:])])
    assert None not in later[0] + later[1]


def test_nan_that_nobody_has_seen_is_not_left_behind():
    """Of a prompt that is cancelled before its first logits were looked at."""
    engine = Engine(nan_model(50), 2, chunk=8)
    engine.add(bad := row([50] * 60, 5))
    for _ in range(4):
        engine.step()
    engine.cancel(bad)
    long = row([51 + i % 40 for i in range(50)], 20, ends=(), temperature=0)
    short = row([7, 6], 20, ends=(), temperature=0)
    # the second gets the slot; masked, a NaN of before would still be zero times NaN
    assert None not in sum(tokens(engine, [long, short]), [])


def test_the_prompt_that_came_first_is_read_first():
    """And not that in the first slot, which may be new there each time."""
    engine = Engine(make(), 2, chunk=16, reuse=False)
    rows = [row([5 + i] * 16, 1, ends=(), temperature=0) for i in range(12)]
    assert [news.row for news in run(engine, rows)] == rows


def test_more_alternatives_than_there_are_ids():
    engine = Engine(make(), 2, n_vocab=10)
    asked = row([5], 2, ends=(), n_logprobs=20)
    news = [one for one in run(engine, [asked, row([6], 2)]) if one.row is asked]
    assert [sorted(i for i, _ in one.top) for one in news] == [list(range(10))] * 2


def test_the_smallest_temperatures_take_the_likeliest():
    logits = torch.tensor([[1.0, 0.5, 3.0, 2.0]])
    for small in (0, 1e-300, 1e-45, 1e-31, 1e-29, 1e-6):
        assert Choice(small).pick(logits, [torch.Generator()]).tolist() == [2]
        assert choose(logits, [torch.Generator()], small).tolist() == [2]


def test_what_waits_or_has_ended_keeps_no_table_of_the_vocabulary():
    engine = Engine(make(), 2)
    rows = [row([5, i], 3, ends=(), repetition_penalty=1.2) for i in range(10, 16)]
    for one in rows:
        engine.add(one)
    while engine.waiting or engine.running:
        engine.step()
        assert sum(one.history is not None for one in rows) <= 2
        if rows[4].slot >= 0:
            engine.cancel(rows[4])
    assert not any(one.history for one in rows)


def test_the_range_of_slots_has_no_gaps_and_waiters_come_in_order():
    model = make()
    engine = Engine(model, 4)
    widths = []
    forward = engine.forward

    def watched(first, parts, width):
        widths.append((first, len(parts), width))
        return forward(first, parts, width)

    engine.forward = watched
    short = [row([5 + i] * 3, 2, ends=(), temperature=0) for i in range(3)]
    long = row([9, 9], 12, ends=(), temperature=0)
    late = [row([7], 3, ends=(), temperature=0) for _ in range(2)]
    order = []
    for news in run(engine, [*short, long, *late]):
        if news.reason:
            order.append(news.row)
    assert order[:3] == short and set(order[3:5]) == set(late) and order[5] is long
    assert widths[-1][1:] == (1, 1)  # the last one alone is a pass of one row
    assert max(n for _, n, _ in widths) == 4


def test_rows_move_into_gaps_with_their_keys():
    """Slots 0 to 3, of which 1 and 2 end early: what is in 3 goes on in one of those."""
    model = make()
    engine = Engine(model, 4)
    asked = [([5, 6], 20, 1), ([7], 1, 2), ([8], 1, 3), ([9, 4, 5], 20, 4)]
    rows = [row(ids, n, seed, ends=(), temperature=1.0) for ids, n, seed in asked]
    for one in rows:
        engine.add(one)
    got = {one: [] for one in rows}
    while engine.running or engine.waiting:
        for news in engine.step():
            got[news.row].append(news.token)
        if len(got[rows[3]]) == 3:
            assert {rows[0].slot, rows[3].slot} == {0, 1}
    for one, (ids, n, seed) in zip(rows, asked):
        with torch.inference_mode():
            want = [t for (t,) in model.generate([ids], n, [seed], temperature=1.0)]
        assert got[one] == want


def test_log_probabilities_are_those_of_the_whole_forward_pass():
    model = make()
    ids = [5, 6, 7, 8]
    engine = Engine(model, 2, n_vocab=90)
    hot = {"temperature": 20.0, "presence_penalty": 1.0}
    asked = row(ids, 30, 1, ends=(), n_logprobs=3, **hot)
    news = list(run(engine, [asked, row([9] * 5, 8)]))
    news = [one for one in news if one.row is asked]
    whole = ids + [one.token for one in news]
    with torch.inference_mode():
        logp = model(torch.tensor([whole]))[0, len(ids) - 1 : -1, :90].log_softmax(-1)
    for one, place in zip(news, logp):
        assert one.logprob == pytest.approx(place[one.token].item(), abs=1e-4)
        assert [i for i, _ in one.top] == place.topk(3).indices.tolist()
        assert one.token < 90


def test_a_bias_forbids_and_forces():
    model = make()
    forced = tokens(Engine(model, 1), [row([5], 4, bias=((42, 100.0),), ends=())])[0]
    assert forced == [42] * 4
    free = tokens(Engine(model, 1), [row([5], 4, temperature=0, ends=())])[0]
    other = tokens(Engine(model, 1), [row([5], 1, temperature=0, bias=((free[0], -100.0),))])[0]
    assert other[0] != free[0]


def test_what_does_not_fit_is_refused_and_cancelled_rows_are_gone():
    model = make()
    engine = Engine(model, 1)
    with pytest.raises(UserError, match="E502"):
        engine.add(row([5] * CONTEXT, 5))
    with pytest.raises(UserError, match="E502"):
        engine.add(row([5] * 95, 20, room=20))
    running, waiting = row([5] * 20, 50), row([6], 5)
    engine.add(running)
    engine.add(waiting)
    engine.step()
    engine.cancel(running)
    engine.cancel(running)  # twice does nothing
    assert engine.running == 0 and engine.waiting == 1
    assert {news.row for news in engine.step()} == {waiting}
    assert engine.clear() == [waiting] and engine.step() == []


def test_a_model_in_training_is_as_it_was():
    model = make(n_experts=4, d_expert=32).train()
    layer = model.blocks[0].ffn
    before = layer.backend
    with generating(model):
        assert not model.training
    assert model.training and layer.backend == before


def test_common():
    found = [common([1, 2, 3], b) for b in ([], [1], [1, 2, 4], [1, 2, 3, 4], [2])]
    assert found == [0, 1, 2, 3, 0]
    long = list(range(300))
    for at in (0, 63, 64, 65, 128, 299):
        assert common(long, [*long[:at], -1, *long[at + 1 :]]) == at
    assert common(long, [*long]) == 300 and common(long, long[:64]) == 64


def test_graphs_record_a_shape_once_and_replay_the_same_numbers(monkeypatch):
    """torch.cuda's part is played by calls: what is recorded reads and writes in place."""

    class Graph:
        def replay(self):
            self.out.copy_(self.again())

        def pool(self):
            return "pool"

    class Recording:
        def __init__(self, graph, pool):
            pass

        __enter__ = __exit__ = lambda *a: None

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: Recording(None, None))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    model = make()
    made = graphs.Graphs(model)
    record = made.record

    def recorded(n, view, reach):
        graph, given, logits = record(n, view, reach)

        def again():
            view.used = reach - 1
            return model(given, cache=view)

        graph.again, graph.out = again, logits
        return graph, given, logits

    made.record = recorded
    engine = Engine(model, 4)
    engine.graphs = made
    asked = [([5, 6, 7], 30, 1, CHOICES[1]), ([8] * 9, 12, 2, CHOICES[0]), ([4], 40, 3, CHOICES[4])]
    got = tokens(engine, [row(ids, n, seed, **choice) for ids, n, seed, choice in asked])
    assert got == [alone(model, *one) for one in asked]
    widths = {n for _, n, _ in made.recorded}
    assert widths <= {1, 2, 4} and len(made.recorded) <= 3


def test_views_are_the_cache_itself():
    cfg = ModelConfig(**SHAPE)
    engine = Engine(make(), 3)
    view = engine.slots.rows(1, 2, 0)
    assert isinstance(view, KVCache) and view.k[0].shape == (2, 2, CONTEXT + 1, cfg.head_dim)
    view.filled[0] = 7
    assert engine.slots.cache.filled.tolist() == [0, 7, 0]
