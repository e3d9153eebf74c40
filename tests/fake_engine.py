"""An engine with the interface of lumen/engine.py, one sequence at a time: what is asserted of a
server does not hang on how the real one works, and it breaks when it is told to."""

import torch

from lumen.engine import News
from lumen.sampling import Sampling
from model import draw  # noqa: F401


class Choose(Sampling):
    """Sampling of a whole Choice, that remembers log-probabilities."""

    def __init__(self, prompt, vocab, n_vocab, choice, n_logprobs):
        super().__init__([prompt], vocab)
        self.choice = choice
        self.written = torch.zeros(1, vocab)
        self.n_logprobs = n_logprobs

    def __call__(self, logits, generators):
        ids = self.choice.pick(self.choice.adjusted(logits, self.seen, self.written), generators)
        self.seen[0, ids] = True
        self.written[0, ids] += 1
        self.logprob, self.top = None, ()
        if self.n_logprobs >= 0:
            logprobs = logits[0].log_softmax(-1)
            self.logprob = logprobs[ids[0]].item()
            values, tokens = logprobs.topk(self.n_logprobs)
            self.top = tuple(zip(tokens.tolist(), values.tolist()))
        return ids


class FakeEngine:
    def __init__(self, model, slots=8, context=0, n_vocab=0):
        self.model, self.slots, self.n_vocab = model, slots, n_vocab
        self.queue, self.live = [], {}
        self.fault = None  # called before each step

    def add(self, row):
        self.queue.append(row)

    def cancel(self, row):
        if row in self.queue:
            self.queue.remove(row)
        self.live.pop(row, None)

    @property
    def waiting(self):
        return len(self.queue)

    @property
    def running(self):
        return len(self.live)

    def start(self, row):
        stream = row.stream
        vocab = self.model.cfg.vocab_size
        choose = Choose(stream.ids, vocab, self.n_vocab, row.choice, row.n_logprobs)
        ends = stream.ends
        steps = self.model.generate(
            [stream.ids], stream.limit, [row.seed], ends, self.n_vocab, choose=choose
        )
        self.live[row] = (steps, choose)

    def step(self):
        if self.fault:
            self.fault(self)
        while self.queue and len(self.live) < self.slots:
            self.start(self.queue.pop(0))
        news = []
        for row, (steps, choose) in list(self.live.items()):
            try:
                token = next(steps)[0]
            except FloatingPointError:
                del self.live[row]
                news.append(News(row, None, "", "error"))
                continue
            piece = row.stream.add(token)
            news.append(News(row, token, piece, row.stream.reason, choose.logprob, choose.top))
            if row.stream.reason:
                del self.live[row]
        return news
