"""The part `evaluate` of tools/gpu.py: does a card find texts as likely as a CPU does, is an answer
the same whatever else is asked, and how many questions a second."""

from __future__ import annotations

import copy
import functools
import random
import time

import torch

from lumen.feed import synchronize
from lumen.scorer import Packed, Scorer
from tools.gpu_parts import GPT2, MOE, SMALL, Here, model_to_decode

DEPTHS = {"mod_capacity": 0.5, "mod_every": 2}
KINDS = {"dense": {}, "experts": {"n_experts": 4, "d_expert": 64}, "depths": DEPTHS}


class NoText:
    """In the place of a tokenizer where questions are ids."""

    def __init__(self, n_vocab: int):
        self.n_vocab = n_vocab


def evaluate_part(here: Here) -> None:
    for kind, keys in KINDS.items():
        model = model_to_decode(here, SMALL | {"max_seq_len": 256} | keys, torch.float32)
        tried = (far_from_cpu, model)
        here.rows.attempt(f"{kind}: log-probabilities", *tried, unit="nats off a CPU's", most=0.05)
        here.rows.attempt(f"{kind}: the same bits in any order", same_bits, model)
    for name, keys in {"gpt2_124m": GPT2, "moe_124m": MOE}.items():
        for pack in (0, 8192):
            how = f"packs of {pack} tokens" if pack else "one a pass"
            tried = (speed, here, keys, pack)
            here.rows.attempt(f"{name}, 4 choices, {how}", *tried, unit="questions/s")


def questions(model, n: int, context: int, choice: int) -> list[list[tuple[list[int], int]]]:
    """n questions of four choices: ids, drawn; and how many of them are context."""
    rng, V = random.Random(0), model.cfg.vocab_size
    found = []
    for _ in range(n):
        asked = [rng.randrange(V) for _ in range(rng.randint(context // 2, context))]
        lengths = [rng.randint(1, choice) for _ in range(4)]
        choices = [[rng.randrange(V) for _ in range(k)] for k in lengths]
        found.append([(asked + ids, len(asked)) for ids in choices])
    return found


def answers(model, asked, shared: int = 0) -> list:
    scorer = Scorer(model, NoText(model.cfg.vocab_size))
    return [scorer.ids(sequences, shared) for sequences in asked]


def far_from_cpu(model) -> float:
    """The largest difference of a choice's log-probability."""
    asked = questions(model, 8, 60, 20)
    here, there = answers(model, asked), answers(copy.deepcopy(model).cpu(), asked)
    pairs = zip((one for q in here for one in q), (one for q in there for one in q))
    return max(abs(a.logprob - b.logprob) for a, b in pairs)


def same_bits(model) -> bool:
    asked = questions(model, 8, 60, 20)
    return answers(model, asked) == answers(model, asked[::-1])[::-1]


def packed(model, asked, tokens: int) -> list:
    scorer = Packed(model, NoText(model.cfg.vocab_size), tokens)
    for sequences in asked:
        scorer.ids(sequences)
    return scorer.run_packs()


def speed(here: Here, keys: dict, pack: int) -> dict:
    """Of a context of 50 to 100 tokens and four choices of up to 30, in the compute dtype; pack:
    tokens of a pass, 0: of one question."""
    model = model_to_decode(here, keys, here.machine.compute_dtype)
    asked = questions(model, here.pick(64, 2), *here.pick((100, 30), (20, 8)))
    run = functools.partial(packed, tokens=pack) if pack else answers
    run(model, asked)  # warms up
    synchronize(here.device)
    began = time.perf_counter()
    run(model, asked)
    seconds = time.perf_counter() - began
    tokens = sum(q[0][1] + sum(len(ids) - n for ids, n in q) for q in asked)
    return {"value": len(asked) / seconds, "tokens/s": tokens / seconds}
