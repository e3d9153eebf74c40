"""The fused loss against the plain one, by Triton's interpreter; how it is chosen; its memory."""

import pytest
import torch

import kernels
import model
from lumen import tryout
from model import HeadLoss, ModelConfig, Transformer, cross_entropy, head_rows

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="no triton")


@pytest.fixture
def fused():
    return pytest.importorskip("kernels_triton").cross_entropy


def logits_and_targets(V, dtype=torch.float32, n=5):
    g = torch.Generator().manual_seed(V)
    logits = (4 * torch.randn(n, V, generator=g)).to(dtype)
    targets = torch.randint(V, (n,), generator=g)
    targets[2] = -1
    targets[1] = logits[1].argmax()
    return logits, targets


@needs_triton
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [97, 4096, 4097, 20000])  # below, at and beyond the kernel's block
def test_the_kernel_is_the_formula(fused, V, dtype, z_loss):
    logits, targets = logits_and_targets(V, dtype)
    want, p = cross_entropy(logits.clone(), targets, z_loss, True)
    got, q = fused(logits.clone(), targets, z_loss, True)
    torch.testing.assert_close(got[:2], want[:2])
    assert q.dtype == dtype
    # as near as a number of that dtype can be: gradients are from -1 to 1
    assert (q.float() - p).abs().max() <= max(1e-6, torch.finfo(dtype).eps)
    assert (q[2] == 0).all(), "an ignored token has no gradient"
    want, _ = cross_entropy(logits.clone(), targets, z_loss, False)
    got, same = fused(logits.clone(), targets, z_loss, False)
    torch.testing.assert_close(got, want)
    assert torch.equal(same, logits), "without gradients nothing is written"


@needs_triton
def test_of_equal_logits_the_first_is_the_guess(fused):
    logits = torch.zeros(3, 5000)
    logits[0, [5, 4500]] = 1.0  # in two blocks
    logits[1, [5, 6]] = 1.0  # in one
    targets = torch.tensor([5, 5, 0])
    assert fused(logits.clone(), targets, 0.0, False)[0][2] == 3
    assert cross_entropy(logits.clone(), targets, 0.0, False)[0][2] == 3


@needs_triton
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_stays_so(fused, value):
    """Or the guard would take a broken step for a good one."""
    logits, targets = logits_and_targets(97)
    logits[3, 7] = value
    assert not fused(logits.clone(), targets, 0.0, True)[0][0].isfinite()


@needs_triton
@pytest.mark.parametrize("grad", [True, False])
def test_head_loss_is_the_same_fused(grad, monkeypatch):
    """Over several chunks, the last of them short."""
    monkeypatch.setattr(model, "head_rows", lambda *shape: 16)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(45, 8, generator=g), torch.randn(97, 8, generator=g)
    targets = torch.randint(-1, 97, (45,), generator=g)
    results = []
    for fused in (False, True):
        a, b = x.clone().requires_grad_(grad), w.clone().requires_grad_(grad)
        total, *sums = HeadLoss.apply(a, b, targets, 1e-3, grad, fused)
        if grad:
            (total / 7).backward()
            sums = [*sums[:2], a.grad, b.grad]
        results.append([total.detach(), *sums])
    for plain, fast in zip(*results):
        torch.testing.assert_close(fast, plain)


def test_a_second_backward_is_refused():
    """Gradients are scaled in place, so a second one would be of the wrong scale."""
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
    total = HeadLoss.apply(x, w, torch.arange(5), 0.0, True)[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("C", [64, 768, 4096, 16384])
@pytest.mark.parametrize("V", [256, 50304, 262144])
def test_logits_on_a_gpu_take_no_more_than_the_heads_gradient(V, C, itemsize):
    taken = head_rows(V, C, itemsize, True) * V * itemsize
    least = max(1 << 26, 64 * V * itemsize)  # small heads, and enough rows for a matmul
    assert taken <= max(least, 4 * V * C)
    assert taken > 0.9 * (1 << 26), "a small head in few chunks"


def make_it_work(monkeypatch, cross_entropy):
    """As on a machine where Triton can work, with this kernel."""
    import kernels_triton

    monkeypatch.setattr(kernels, "INTERPRET", False)
    monkeypatch.setattr(kernels, "no_triton", lambda device, dtype: None)
    monkeypatch.setattr(kernels_triton, "cross_entropy", cross_entropy)


def wrong(logits, targets, z_loss, need_grad):
    sums, p = cross_entropy(logits, targets, z_loss, need_grad)
    p[targets < 0] = 0.5  # it forgets that a token is ignored
    return sums, p


def broken(logits, targets, z_loss, need_grad):
    sums, p = cross_entropy(logits, targets, z_loss, need_grad)
    return sums * float("nan"), p


def no_compiler(*args):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "name", "why"),
    [
        (cross_entropy, "fused", "error 0e+00"),
        (wrong, "plain", "differs from the plain formula by 5.0e-01"),
        (broken, "plain", "differs from the plain formula by nan"),
        (no_compiler, "plain", "(RuntimeError: Failed to find C compiler.)"),
    ],
)
def test_the_kernel_is_taken_where_it_works(kernel, name, why, monkeypatch):
    make_it_work(monkeypatch, kernel)
    found, reason = tryout.pick_loss("cpu", torch.float32, 97)
    assert found == name
    assert why in reason


def test_on_a_cpu_the_loss_is_plain():
    assert tryout.pick_loss("cpu", torch.float32, 97)[0] == "plain"


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_masked_places_need_no_logits(share):
    """Sums and gradients are those of all places, also where none has a target."""
    torch.manual_seed(0)
    net = Transformer(ModelConfig(vocab_size=50, d_model=32, n_layers=1, n_heads=2))
    net.init_weights(0)
    x = torch.randint(50, (2, 40))
    y = torch.where(torch.rand(2, 40) < share, x.roll(-1, 1), -1)
    found = []
    for skips in (False, True):
        net.skip_masked = skips
        net.zero_grad()
        total, sums = net(x, targets=y)
        total.backward()
        grads = [p.grad.clone() for p in net.parameters()]
        found.append([total.detach(), sums["ce"], sums["count"], *grads])
    for all_places, asked in zip(*found):
        assert torch.allclose(all_places, asked, rtol=1e-5, atol=1e-6)
