"""A run with each optimizer there is, on one process."""

import pytest
import torch
from rig import finish, stop

from lumen.optim import OPTIMIZERS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_is_exact(tiny, optimizer):
    """Weights and state, bit for bit: the first promise of lumen/optim.py."""
    keys = {"optimizer": optimizer, "max_steps": 6, "save_interval": 0, "learning_rate": "auto"}
    whole = finish(tiny("whole", **keys))
    assert finish(tiny("parts", **keys), steps={3: stop}).step < 6
    parts = finish(tiny("parts", **keys))
    a, b = whole.tensors(), parts.tensors()
    assert a.keys() == b.keys() and parts.step == 6
    assert any(name.startswith("optim.") for name in a)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
