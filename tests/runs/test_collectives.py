"""What ranks tell one another in a whole run: plain objects where they are objects."""

import dataclasses

import torch

from lumen.parallel import Parallel
from train import Trainer


def tensors_in(obj, seen=None) -> list:
    """All tensors that pickle would take along."""
    seen = set() if seen is None else seen
    if id(obj) in seen:
        return []
    seen.add(id(obj))
    if torch.is_tensor(obj):
        return [obj]
    inside = []
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        inside = list(vars(obj).values())
    elif isinstance(obj, dict):
        inside = [*obj, *obj.values()]
    elif isinstance(obj, (list, tuple, set, frozenset)):
        inside = list(obj)
    elif isinstance(obj, BaseException):
        inside = list(obj.args)
    return [found for x in inside for found in tensors_in(x, seen)]


class Listening(Parallel):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.told = []

    def gather(self, obj):
        self.told.append(obj)
        return super().gather(obj)

    def broadcast(self, obj):
        self.told.append(obj)
        return super().broadcast(obj)


def test_what_was_looked_for_is_found():
    x = torch.ones(2)
    assert len(tensors_in({"a": [1, (x, {"b": {x.sum()}})]})) == 2
    assert tensors_in({"a": [1, "b"]}) == []


def test_no_object_between_ranks_carries_a_tensor(tiny):
    """On a GPU it would come to life on the sender's, in every process. Evaluations, statistics, a
    split expert, a rollback, checkpoints, resume."""
    model = {
        "n_experts": 4,
        "d_expert": 32,
        "n_experts_max": 6,
        "mod_capacity": 0.5,
        "mod_every": 2,
    }
    keys = tiny(model=model, max_steps=16, eval_interval=2, log_interval=1)
    first = Trainer(keys | {"max_steps": 10}, Listening)
    rolled_back = None
    for step in first.iterations():
        if step == 4 and rolled_back is None:
            first.add_expert(0)
        if step == 8 and rolled_back is None:
            rolled_back = first.rollback_steps(2)
    assert first.end() == 0
    again = Trainer(keys, Listening)
    assert again.fit() == 0
    for trainer in (first, again):
        assert len(trainer.parallel.told) > 10
        assert [obj for obj in trainer.parallel.told if tensors_in(obj)] == []
