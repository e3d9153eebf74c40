"""lumen/onednn.py: the same model from reordered matrices, for any number of rows."""

import pytest
import torch
from sparse_models import KINDS, make

from lumen import onednn
from lumen.machine import detect
from lumen.models import make_ready
from model import Linear

X = torch.randint(97, (3, 11), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not onednn.works(CPU, torch.float32), reason="this torch has no such operators"
)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (3,), (4,), (2, 5), (1, 1)])
def test_a_product_is_linears_for_any_number_of_rows(rows):
    plain = Linear(24, 40)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(*rows, 24, generator=torch.Generator().manual_seed(2))
    made = onednn.DnnLinear(plain.weight)
    with torch.no_grad():
        torch.testing.assert_close(made(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_ready_answers_as_before(kind):
    model = make(**KINDS[kind]).eval()
    with torch.no_grad():
        logits, loss = model(X), model(X, targets=X)[0]
    count = model.n_params()
    steps = list(model.generate([[1, 2, 3], [4]], 6, [0, 0], temperature=0))
    make_ready(model, detect("cpu", "fp32", False))
    assert any(isinstance(layer, onednn.DnnLinear) for layer in model.modules())
    assert not any(type(layer) is Linear for layer in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(X), logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(X, targets=X)[0], loss)
    assert model.n_params() == count
    assert list(model.generate([[1, 2, 3], [4]], 6, [0, 0], temperature=0)) == steps


def test_elsewhere_layers_stay_as_they_are(monkeypatch):
    model = make()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    onednn.reorder(model)
    assert not any(isinstance(layer, onednn.DnnLinear) for layer in model.modules())
    assert not onednn.works(torch.device("cuda"), torch.float32)
    assert not onednn.works(CPU, torch.float16)
