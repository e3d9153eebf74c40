"""Learning from preferences: of two replies the better one is to become the likelier.

`loss` takes the place of the model's own. A pair's log-probabilities are sums over supervised
tokens (`TokenLogProbs`, `pair_sums`), what is made of them says `pair_losses`. Every method is a
sum over pairs: no mean over a micro-batch is in it, so any cut of a batch gives one gradient.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lumen.errors import UserError
from lumen.feed import Pairs
from lumen.sums import sum_dtype
from model import head_rows, layer_sums

METHODS = ("dpo", "cdpo", "ipo", "hinge", "simpo", "orpo")
BETA = dict.fromkeys(METHODS, 0.1) | {"simpo": 2.0}
SMOOTHING = {"cdpo": 0.1}

# what `loss` adds up over pairs beside ce, z and count: Trainer.sum_names. tokens: supervised ones;
# chosen_gain: nats a token that the chosen reply is likelier than by the reference (simpo and orpo:
# its mean log-probability)
SUM_NAMES = ("tokens", "reward_chosen", "reward_rejected", "margin", "accuracy")
SUM_NAMES += ("logp_chosen", "logp_rejected", "chosen_gain")


class Preference(NamedTuple):
    """A method with its numbers, all said."""

    method: str
    beta: float
    gamma: float
    smoothing: float
    sft_coef: float


def preference(cfg) -> Preference:
    """The method of a Config, defaults filled in.

    beta is 0.1, trl's default for all; for simpo 2.0, the least of its paper (on mean
    log-probabilities 0.1 is next to no preference). gamma: half of beta, also the paper's.
    """
    beta = BETA[cfg.method] if cfg.beta is None else cfg.beta
    gamma = beta / 2 if cfg.gamma is None else cfg.gamma
    smoothing = cfg.label_smoothing
    if smoothing is None:
        smoothing = SMOOTHING.get(cfg.method, 0.0)
    return Preference(cfg.method, beta, gamma, smoothing, cfg.sft_coef)


def check_method(cfg) -> None:
    """E002 for numbers that the method does not have."""
    if cfg.label_smoothing and cfg.method not in ("dpo", "cdpo"):
        text = f"label_smoothing: {cfg.label_smoothing} is of dpo and cdpo"
        raise UserError("E002", f"{text}; method is {cfg.method}: drop it")
    if cfg.gamma is not None and cfg.method != "simpo":
        text = f"gamma: {cfg.gamma} is simpo's; method is {cfg.method}"
        raise UserError("E002", f"{text}: drop it")


def needs_reference(method: str) -> bool:
    """Whether it compares with the model as it began."""
    return method in ("dpo", "cdpo", "ipo", "hinge")


# ---------------------------------------------------------------- log-probabilities


class TokenLogProbs(torch.autograd.Function):
    """(log-probability, logsumexp of the logits) of each target under x W^T: fp32 (N,) each, 0
    where there is none.

    x (N, C), weight (V, C), targets (N,), negative = none, places (n,): where there is one. No
    logits are made elsewhere; they are there for a chunk of tokens at a time, in backward made
    anew, so memory does not grow with V.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, places):
        W = weight.to(x.dtype)
        ids = targets.clamp(min=0)[:, None]  # (N, 1)
        logp = torch.zeros(len(x), device=x.device)
        lse = torch.zeros_like(logp)
        parts = chunks(places, weight, x)
        for at in parts:
            logits = F.linear(x[at], W).float()  # (n, V)
            lse[at] = logits.logsumexp(-1)
            logp[at] = logits.gather(1, ids[at])[:, 0] - lse[at]
        ctx.parts = parts
        ctx.save_for_backward(x, weight, ids, lse)
        return logp, lse

    @staticmethod
    def backward(ctx, of_logp, of_lse):
        """d(logp)/d(logits) = onehot - softmax; d(lse)/d(logits) = softmax."""
        x, weight, ids, lse = ctx.saved_tensors
        W = weight.to(x.dtype)
        dx = dW = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x)
        if ctx.needs_input_grad[1]:
            # fp32: many chunks add up in it
            dW = torch.zeros(weight.shape, device=x.device)
        of_softmax = (of_lse - of_logp)[:, None]
        for at in ctx.parts:
            p = F.linear(x[at], W).float().sub_(lse[at, None]).exp_()
            p.mul_(of_softmax[at]).scatter_add_(1, ids[at], of_logp[at, None])
            p = p.to(x.dtype)  # (n, V)
            if dx is not None:
                dx[at] = p @ W
            if dW is not None and x.dtype == dW.dtype:
                dW.addmm_(p.t(), x[at])
            elif dW is not None:
                dW += p.t() @ x[at]
        return dx, None if dW is None else dW.to(weight.dtype), None, None


def chunks(places: torch.Tensor, weight, x) -> tuple[torch.Tensor, ...]:
    """Cut into parts of equal size, as many as model.head_rows asks for. Equal, for MKL loses two
    digits of a product with one row."""
    rows = head_rows(*weight.shape, x.dtype.itemsize, x.is_cuda)
    return places.tensor_split(max(1, math.ceil(len(places) / rows)))


def pair_sums(values: torch.Tensor, of: torch.Tensor, most: int) -> torch.Tensor:
    """Sums over each document: values (2 R, T), of (2 R, T), the documents' numbers, 0 to `most`
    -> (R, most, 2), [..., 0] of the chosen, fp32. Document `most` is what fills a row up."""
    sums = torch.zeros(len(of), most + 1, dtype=sum_dtype(of.device), device=of.device)
    sums = sums.scatter_add(1, of.clamp(max=most), values.to(sums.dtype))
    return sums[:, :most].view(-1, 2, most).transpose(1, 2).float()


# ---------------------------------------------------------------- methods


def pair_losses(
    how: Preference, logp: torch.Tensor, reference: torch.Tensor, n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each pair (...), rewards (..., 2) without gradient), in nats.

    logp: log-probabilities of the replies, reference: by the reference model, n: their supervised
    tokens; (..., 2) each, [..., 0] of the chosen. With r = logp - reference, d = r_w - r_l:

    dpo    -log sigmoid(beta d)                       (Rafailov et al. 2023, eq. 7)
    cdpo   (1 - s) dpo(d) + s dpo(-d), s smoothing    (Mitchell 2023, conservative DPO)
    ipo    (r_w / n_w - r_l / n_l - 1 / (2 beta))^2   (Azar et al. 2023, eq. 17; the mean over
                                                      tokens is trl's, confirmed by the authors)
    hinge  max(0, 1 - beta d)                         (Zhao et al. 2023, SLiC; Liu et al. 2023, RSO)
    simpo  -log sigmoid(beta (m_w - m_l) - gamma), m = logp / n        (Meng et al. 2024, eq. 6)
    orpo   -m_w - beta log sigmoid(log odds(m_w) - log odds(m_l))      (Hong et al. 2024, eq. 6, 7)

    odds(m) = e^m / (1 - e^m). sft_coef adds -m_w to any (Pang et al. 2024, iterative RPO). Rewards
    are beta r; of simpo and orpo beta m. trl 1.16 gives the same numbers (tests/fixtures); but its
    means over tokens are over a batch, ours are over a pair, as in the papers.
    """
    r, m = logp - reference, logp / n
    d = r[..., 0] - r[..., 1]
    if how.method in ("dpo", "cdpo"):
        right, wrong = F.logsigmoid(how.beta * d), F.logsigmoid(-how.beta * d)
        losses = -(1 - how.smoothing) * right - how.smoothing * wrong
    elif how.method == "ipo":
        mean = r / n
        losses = (mean[..., 0] - mean[..., 1] - 1 / (2 * how.beta)).square()
    elif how.method == "hinge":
        losses = F.relu(1 - how.beta * d)
    elif how.method == "simpo":
        losses = -F.logsigmoid(how.beta * (m[..., 0] - m[..., 1]) - how.gamma)
    else:
        log_odds = m - log1mexp(m)
        losses = -m[..., 0] - how.beta * F.logsigmoid(log_odds[..., 0] - log_odds[..., 1])
    if how.sft_coef:
        losses = losses - how.sft_coef * m[..., 0]
    rewards = r if needs_reference(how.method) else m
    return losses, how.beta * rewards.detach()


def log1mexp(a: torch.Tensor) -> torch.Tensor:
    """log(1 - e^a) for a < 0, exact at both ends (Maechler 2012)."""
    a = a.clamp(max=-1e-7)  # a certain reply has no finite odds
    near = a > -math.log(2)
    # each only sees what it can bear, or the gradient of the other would be NaN
    by_expm1 = torch.log(-torch.expm1(a.masked_fill(~near, -0.5)))
    by_exp = torch.log1p(-torch.exp(a.masked_fill(near, -1.0)))
    return torch.where(near, by_expm1, by_exp)


# ---------------------------------------------------------------- the loss of a batch


def loss(model, cfg, x, y, docs, pairs: Pairs, pairs_per_row: float = 1.0) -> tuple:
    """(total, sums) of pairs, as model(x, targets=y, docs=docs) of tokens.

    x, y, docs: (2 R, T) as lumen.pairs.PairSource has them. total, which is differentiated, is a
    sum over pairs: divide it by their number. sums: ce (the pairs' losses), z, count (pairs),
    those of SUM_NAMES, and in training the sparse layers'. z-loss is a mean over the tokens of a
    pair. Balance and router losses and MoD's are sums over all positions, so they count
    pairs_per_row / (2 T) times, where pairs_per_row is a mean over all the data: beside a mean over
    pairs that is a mean over tokens, as strong as beside pre-training's loss, and no matter how the
    batch is cut.
    """
    of = docs.of if hasattr(docs, "of") else docs
    aux_weight = pairs_per_row / (2 * y.shape[1])
    batch = PairBatch(of, pairs, aux_weight)
    measure = functools.partial(loss_of_stream, model, preference(cfg), batch)
    with measured_by(model, measure):
        return model(x, targets=y, docs=docs)


@contextlib.contextmanager
def measured_by(model, measure):
    """Within, model(x, targets=y) is measure(stream behind the last norm (B, T, C), y, statistics
    of the blocks). Inside forward, where a sharded model's weights are whole."""
    model.loss = measure
    try:
        yield
    finally:
        del model.loss  # the class has its own


class PairBatch(NamedTuple):
    """What `loss` is told beside the stream and its targets."""

    of: torch.Tensor  # (2 R, T), documents
    pairs: Pairs
    aux_weight: float


def loss_of_stream(model, how: Preference, batch: PairBatch, x, y, found) -> tuple:
    """See `loss`; x (2 R, T, C), y (2 R, T), found: the blocks' statistics."""
    reference = batch.pairs.reference
    logp, n, z = log_probabilities(model, x, y, batch.of, batch.pairs)
    there = ~reference.isnan().any(-1)  # (R, most)
    here = there[..., None]
    # what stands where there is no pair must be finite, and its gradient too
    logp, n = torch.where(here, logp, -1.0), torch.where(here, n, 1.0)
    reference = reference.nan_to_num()
    losses, rewards = pair_losses(how, logp, reference, n)
    z = torch.where(there, z.sum(-1) / n.sum(-1), 0.0).sum() * model.z_loss
    ce = torch.where(there, losses, 0.0).sum()
    margin = rewards[..., 0] - rewards[..., 1]
    with torch.no_grad():
        gain = (logp - reference)[..., 0] / n[..., 0]
        numbers = (n.sum(-1), *rewards.unbind(-1), margin, margin > 0, *logp.unbind(-1), gain)
        sums = {name: (value * there).sum() for name, value in zip(SUM_NAMES, numbers)}
    sums |= {"ce": ce.detach(), "z": z.detach(), "count": there.sum().float()}
    total = ce + z
    if model.training:
        aux, of_layers = layer_sums(found)
        if aux is not None:
            total = total + aux * batch.aux_weight
        sums |= of_layers
    return total, sums


def log_probabilities(model, x, y, of, pairs: Pairs) -> tuple[torch.Tensor, ...]:
    """Of the stream x (2 R, T, C): (R, most, 2) each of log-probabilities, supervised tokens, and
    squares of the logits' logsumexp added up over these."""
    rows = (x.flatten(0, 1), model.head_weight(), y.flatten(), pairs.places)
    logp, lse = (values.view(y.shape) for values in TokenLogProbs.apply(*rows))
    most = pairs.reference.shape[1]
    sums = [pair_sums(values, of, most) for values in (logp, y >= 0, lse.square())]
    return tuple(sums)
