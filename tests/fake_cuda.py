"""A GPU that is not there: tensors that say cuda:0 and compute on the CPU.

An operator given tensors of both devices raises, as on a GPU. What only costs time there is written
down in READS: each place where the host reads a tensor of the device, or waits for it. What a GPU
does later happens later: a copy to the host with non_blocking=True holds garbage until its event
was waited for. Numbers are true, so the trainer trains, evaluates, saves and makes text. But
kernels are the CPU's: nothing here says that one of a GPU exists, is right or is fast.

The process must have been started by with_fake_cuda.py.
"""

import contextlib
import functools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)

# On a GPU the shape of their result depends on numbers, so the host waits for these; or they are
# numbers of the host themselves
WAITS = {
    "_local_scalar_dense": "item",
    "equal": "equal",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "repeat_interleave": "repeat_interleave",
    "bincount": "bincount",
    "_unique2": "unique",
    "unique_consecutive": "unique",
}

# ---------------------------------------------------------------- what the host waits for


class Reads:
    """Where the host read a tensor of the device or waited for it: "file function what" -> times.
    Only what happens within `with READS:` is written down."""

    def __init__(self):
        self.on = False
        self.found = Counter()
        self.lines = []  # the same with line numbers, for whoever reads a failure

    def __enter__(self):
        self.on, self.found, self.lines = True, Counter(), []
        return self

    def __exit__(self, *_):
        self.on = False

    def add(self, what: str) -> None:
        if not self.on:
            return
        frame = sys._getframe(1)
        while frame and not ours(frame.f_code.co_filename):
            frame = frame.f_back
        place = ("?", "?", 0)
        if frame:
            name = str(Path(frame.f_code.co_filename).relative_to(ROOT))
            place = (name, frame.f_code.co_name, frame.f_lineno)
        self.found[f"{place[0]} {place[1]} {what}"] += 1
        self.lines.append(f"{place[0]}:{place[2]} in {place[1]}: {what}")

    def are(self, allowed: dict[str, int] | None = None) -> None:
        """Exactly these reads, so that one more fails."""
        assert dict(self.found) == (allowed or {}), "\n" + "\n".join(self.lines)


@functools.cache
def ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests")


READS = Reads()

# ---------------------------------------------------------------- tensors


class FakeCuda(torch.Tensor):
    """A tensor that says cuda:0; `inner`, on the CPU, has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        like = {"dtype": inner.dtype, "strides": inner.stride()}
        like["storage_offset"] = inner.storage_offset()
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=CUDA, **like)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        READS.add("print")
        return f"FakeCuda({self.inner})"

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)  # shape, dtype, device
        self.inner = other.inner

    def record_stream(self, stream):
        pass

    def tolist(self):
        READS.add("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """Within it, what is made with device="cuda" is a FakeCuda."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def is_cuda(x) -> bool:
    return isinstance(x, FakeCuda)


def run(func, args, kwargs):
    """One operator, as a GPU's torch would run it."""
    if func.namespace == "lumen":  # our own: what it does is to be seen too
        with Gpu():
            return OPDEFS[func.name()]._init_fn(*args, **kwargs)
    if composite(func):  # below autograd nobody has taken it apart: item, to, matmul
        with Gpu():
            return func.decompose(*args, **kwargs)
    name = func.overloadpacket.__name__
    ours = OURS.get(name) or OURS.get(f"{name}.{func._overloadname}")
    if ours:
        return ours(func, *args, **kwargs)
    tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
    there = any(map(is_cuda, tensors))
    QUEUED[0] += there
    if there:
        one_device(name, tensors)
        look(name, args)
    device = kwargs.get("device")
    on_gpu = there if device is None else torch.device(device).type == "cuda"
    kwargs_inside = {key: inner(value) for key, value in kwargs.items() if key != "pin_memory"}
    if device is not None:
        kwargs_inside["device"] = torch.device("cpu")
    out = func(*map(inner, args), **kwargs_inside)
    if kwargs.get("pin_memory"):
        return pinned(out)
    if there and writes(func):
        found = [args[at] if at < len(args) else kwargs[name] for at, name in writes(func)]
        return found[0] if len(found) == 1 else tuple(found)
    return wrap(out) if on_gpu else out


@functools.cache
def composite(func) -> bool:
    return func._can_decompose()


@functools.cache
def writes(func) -> list[tuple[int, str]]:
    """Which of its arguments it writes into and returns."""
    schema = func._schema
    if not any(r.alias_info and r.alias_info.is_write for r in schema.returns):
        return []
    known = enumerate(schema.arguments)
    return [(at, a.name) for at, a in known if a.alias_info and a.alias_info.is_write]


def tensors_of(args):
    for x in args:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_of(x)


def inner(x):
    if is_cuda(x):
        return x.inner
    return type(x)(map(inner, x)) if type(x) in (list, tuple) else x


def wrap(x):
    if isinstance(x, torch.Tensor):
        return FakeCuda(x)
    return type(x)(map(wrap, x)) if isinstance(x, (list, tuple)) else x


PINNED = {}  # storage -> a tensor of it, which is kept: no other may get the same memory


def pinned(x):
    PINNED[x.untyped_storage().data_ptr()] = x
    return x


def one_device(name: str, tensors: list) -> None:
    """Beside tensors of the GPU an operator takes only numbers from the CPU, and indices."""
    for x in tensors:
        if is_cuda(x):
            continue
        if name in ("index", "index_put_", "index_put", "_index_put_impl_") and x.dim():
            READS.add("index on the CPU")  # torch copies it, and waits
        elif x.dim():
            raise RuntimeError(f"aten::{name}: a tensor {tuple(x.shape)} is on the CPU, not cuda:0")


def look(name: str, args) -> None:
    """Write down where the host waits."""
    if name in WAITS:
        READS.add(WAITS[name])
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        masks = [x for x in args[1] if is_cuda(x) and x.dtype in (torch.bool, torch.uint8)]
        filled = name != "index" and args[2].numel() == 1  # torch makes a masked_fill of it
        if masks and not filled:
            READS.add("mask as index")


# ---------------------------------------------------------------- copies between host and device

ON_THE_WAY = []  # copies to the host: (host's tensor, numbers)


def send(host, source) -> None:
    """What the host sees before it has waited is not what it asked for."""
    ON_THE_WAY.append((host, source.inner.to(host.dtype).clone()))
    host.fill_(torch.nan if host.is_floating_point() else 1)


def arrive(upto: int) -> None:
    """The first so many copies arrive."""
    for host, numbers in ON_THE_WAY[:upto]:
        host.copy_(numbers)
    del ON_THE_WAY[:upto]
    Event.arrived += upto


def arrive_in(host) -> None:
    """What is on its way to this tensor comes before what is now read out of it."""
    for to, numbers in ON_THE_WAY:
        if to.untyped_storage().data_ptr() == host.untyped_storage().data_ptr():
            to.copy_(numbers)


def copy(func, to, source, non_blocking=False):
    if is_cuda(to) and is_cuda(source):
        to.inner.copy_(source.inner)
    elif is_cuda(to):
        crossing(source, source, non_blocking)
        arrive_in(source)
        to.inner.copy_(source)
    elif is_cuda(source) and crossing(source, to, non_blocking):
        send(to, source)
    else:
        to.copy_(inner(source))
    return to


def to_copy(func, x, device=None, non_blocking=False, pin_memory=None, **kwargs):
    to_gpu = is_cuda(x) if device is None else torch.device(device).type == "cuda"
    if not to_gpu and is_cuda(x):
        READS.add("copy to the host")
    elif to_gpu and not is_cuda(x):
        crossing(x, x, non_blocking)
        arrive_in(x)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    out = func(inner(x), **kwargs)
    if to_gpu and out is inner(x):
        out = out.clone()
    return FakeCuda(out) if to_gpu else out


def crossing(source, of_host, non_blocking) -> bool:
    """Whether a copy between host and device is one that nobody waits for; written down if not."""
    free = non_blocking and of_host.untyped_storage().data_ptr() in PINNED
    if not free:
        READS.add("copy to the host" if is_cuda(source) else "copy to the device")
    return free


def pin(func, x, *_):
    return pinned(x.clone())


def is_pinned(func, x, *_):
    return x.untyped_storage().data_ptr() in PINNED


def addmm(func, x, a, b, dtype, out):
    """A CPU has no sum in another dtype than that of its products' factors."""
    one_device("addmm", [x, a, b, out])
    out.inner.copy_(x.inner + a.inner.to(dtype) @ b.inner.to(dtype))
    return out


OURS = {"copy_": copy, "_to_copy": to_copy, "_pin_memory": pin, "is_pinned": is_pinned}
OURS["addmm.dtype_out"] = addmm

# ---------------------------------------------------------------- torch.cuda


class Event:
    """Whoever has waited for it has all copies that were queued before."""

    arrived = 0  # copies to the host, in all
    waits = []  # how many operators were queued between an event and the wait for it

    def __init__(self, enable_timing=False):
        self.copies = self.operators = 0

    def record(self, stream=None):
        self.operators = QUEUED[0]
        if stream is None or stream is COMPUTING:
            self.copies = Event.arrived + len(ON_THE_WAY)

    def synchronize(self):
        if self.operators:
            Event.waits.append(QUEUED[0] - self.operators)
        arrive(max(0, self.copies - Event.arrived))

    def elapsed_time(self, other):
        return 1.0


class Stream:
    """Copies to the device; those to the host are all on the stream that computes."""

    def __init__(self, device=None):
        self.awaited = []

    def wait_event(self, event):
        self.awaited.append(event)


COMPUTING = Stream()
QUEUED = [0]  # operators, in all


def synchronize(device=None):
    READS.add("synchronize")
    arrive(len(ON_THE_WAY))


class Properties:
    name, total_memory, multi_processor_count = "NVIDIA H100 80GB HBM3", 80 << 30, 132
    major, minor = 9, 0


ANSWERS = {
    "_lazy_init": None,
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "get_device_capability": (9, 0),
    "get_device_name": Properties.name,
    "get_device_properties": Properties,
    "is_bf16_supported": True,
    "empty_cache": None,
    "memory_allocated": 1 << 20,
    "memory_reserved": 1 << 20,
    "max_memory_allocated": 1 << 20,
    "max_memory_reserved": 1 << 20,
    "reset_peak_memory_stats": None,
    "memory_stats": {},
    "mem_get_info": (80 << 30, 80 << 30),
}


def plug_in(monkeypatch) -> None:
    """torch.cuda says that there is one."""
    # torch.tensor(1.0, device="cuda") is made on the CPU and then copied, where it is seen
    torch._C._set_only_lift_cpu_tensors(True)
    for name, answer in ANSWERS.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    on_cpu = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": on_cpu())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: COMPUTING)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


class Launch:
    """A Triton kernel that looks at where its tensors are; the interpreter computes it."""

    def __init__(self, kernel):
        self.kernel, self.grid = kernel, None

    def __getitem__(self, grid):
        launch = Launch(self.kernel)
        launch.grid = grid
        return launch

    def __call__(self, *args, **kwargs):
        assert all(map(is_cuda, tensors_of(args))), "a kernel got a tensor of the CPU"
        with _disable_current_modes():
            self.kernel[self.grid](*map(inner, args), **kwargs)
