"""Conversations: what a trainer asks of its model, and one in the terminal."""

import pytest
import torch
from test_sample import T, make

import sample as S
from lumen import chat
from lumen.chat import Message
from lumen.replies import replies

# ---------------------------------------------------------------- replies, for an evaluation


KINDS = {"dense": {}, "moe": dict(n_experts=4), "mod": dict(mod_capacity=0.5)}


def questions(*texts):
    return [[Message("user", text)] for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_replies_are_samples_greedy_ones_and_leave_the_model_as_it_was(kind):
    """Alone or in a batch, from a model in training; two that say nothing more than their stop id,
    and one without room."""
    model = make(max_seq_len=96, **KINDS[kind]).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    talks = questions("hi", "What does os.path.join do?", "x" * 200)
    got = replies(model, T, "chat", talks, 20, T.n_vocab)
    assert got[2] == ("", False) and len({text for text, _ in got}) == 3
    for talk, reply in zip(talks[:2], got):
        stats = {}
        text = S.sample(model, T, [talk], 20, temperature=0, template="chat", stats=stats)[0]
        assert reply == (text, stats["reasons"] == ["eot"])
        assert replies(model, T, "chat", [talk], 20) == [reply]
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    loss, _ = model(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))
    loss.backward()  # nothing of it was made where no gradient can come from


class Says:
    """A model that says these ids, a row each; None: its logits are not finite."""

    def __init__(self, *scripts, context=1000):
        self.scripts = scripts
        self.cfg = make().cfg
        self.cfg.max_seq_len = context
        self.blocks = []

    def generate(self, prompts, max_new_tokens, seeds, stop_ids, n_vocab, temperature):
        assert temperature == 0 and n_vocab == T.n_vocab
        for step in range(max_new_tokens):
            ids = [script[step] if step < len(script) else 32 for script in self.scripts]
            if None in ids:
                raise FloatingPointError
            yield ids


def test_a_reply_has_ended_only_where_its_stop_id_came():
    talks = questions("a", "b", "c")
    scripts = ([*b" yes", T.eot_id], list(b" no\n\nHuman: and"), list(b" and so on and on"))
    want = [("yes", True), ("no", False), ("and so on", False)]
    assert replies(Says(*scripts), T, "chat", talks, 11, T.n_vocab) == want
    ends = [T.im_end_id, T.eot_id, ord("x")]
    scripts = [[*b"ok", end] for end in ends]
    want = [("ok", True), ("ok", True), ("okx", False)]
    assert replies(Says(*scripts), T, "chatml", talks, 3, T.n_vocab) == want
    ids, _ = chat.render(talks[0], "chat", T, open_reply=True)
    full = Says(list(b" four"), context=len(ids) + 3)
    assert replies(full, T, "chat", talks[:1], 10) == [("fo", False)]
    broken = Says([*b"ab", T.eot_id], [*b"abc", None])
    assert replies(broken, T, "raw", talks[:2], 9) == [("ab", True), ("abc", False)]


def test_replies_of_a_compiled_model_compile_nothing():
    def backend(graph, inputs):
        pytest.fail("something was compiled")

    model = make(max_seq_len=64)
    want = replies(model, T, "chat", questions("hi"), 5)
    for block in model.blocks:
        block.compile(backend=backend)
    assert replies(model, T, "chat", questions("hi"), 5) == want
