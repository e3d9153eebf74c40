"""What Triton's compiler makes of our kernels, and which tiles the autotuner may try; no GPU.

Under pytest the kernels run in Triton's interpreter (conftest.py), where nothing is compiled: so
what compiles is a process of its own."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import run_python

import kernels
from lumen import tryout

triton = pytest.importorskip("triton", reason="needs the package triton")
kernels_triton = pytest.importorskip("kernels_triton")

# shared memory that a block can opt in to, by compute capability, as NVIDIA's guide has it
LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 120: "mma.sync"}
TENSOR_CORES |= {90: "wgmma", 100: "tcgen05"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is there for Linux")


@pytest.fixture(autouse=True)
def as_in_a_fresh_process():
    """A Trainer's test before this one may have left deterministic algorithms on."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(False)


def compile_all(*words, timeout=600) -> list[dict]:
    """A row for each compiled variant, from `python -m tools.ptx`."""
    done = run_python("-m", "tools.ptx", "--json", *words, timeout=timeout, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(row: dict) -> list[str]:
    """What a variant's compiled code must not be."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} B spilled")
    if row["shared"] > LIMITS[row["arch"]]:
        found.append(f"{row['shared']} B of shared memory do not fit")
    if row["predicted"] is not None and row["shared"] > row["predicted"]:
        found.append(f"{row['shared']} B of shared memory, predicted: {row['predicted']}")
    if "PREC" not in row["constants"]:  # no products of matrices
        return found
    # tensor cores know no fp32: precision "ieee" multiplies without them
    if row["dtype"] != "fp32" and not row[TENSOR_CORES[row["arch"]]]:
        found.append(f"no {TENSOR_CORES[row['arch']]}")
    if row["stages"] > 1 and not row["cp.async"] + row["tma"]:
        found.append("no asynchronous copies")
    if row["shared"] < row["predicted"] - 1024:
        found.append(f"{row['shared']} B of shared memory: an operand is not pipelined")
    return found


def all_faults(rows: list[dict]) -> list[str]:
    names = ("kernel", "launch", "arch", "dtype", "tile", "warps", "stages")
    texts = []
    for row in rows:
        head = " ".join(str(row[name]) for name in names)
        texts += [f"{head}: {fault}" for fault in faults(row)]
    return texts


# ---------------------------------------------------------------- compiled code


def test_every_kernel_compiles():
    """The first tile of each launch; the tool itself fails where a kernel has no case."""
    rows = compile_all("--arch", "90", "80", "--dtype", "bf16", "--tiles", "1")
    assert not all_faults(rows)
    rows = [row for row in rows if row["arch"] == 90 and row["case"] == "expert layer"]
    tuned = [row for row in rows if row["predicted"]]
    plain = len(rows) - len(tuned)
    assert len(tuned) * kernels_triton.MOST_TILES + plain == kernels_triton.compilations(
        kernels_triton.MOST_TILES
    )


@pytest.mark.nightly
@pytest.mark.parametrize("arch", LIMITS)
def test_every_tile_fits_its_card(arch):
    """In all dtypes; and what the first step of a run compiles is soon done."""
    rows = compile_all("--arch", str(arch))
    assert not all_faults(rows)
    for dtype in ("bf16", "fp16", "tf32", "fp32"):
        mine = [row for row in rows if row["dtype"] == dtype and row["tried"]]
        layer = [row for row in mine if row["case"] == "expert layer"]
        assert 0 < len(layer) <= kernels_triton.compilations(kernels_triton.MOST_TILES)
        # 7 to 16 s of one core's time; here twice that where others compute beside us
        assert sum(row["seconds"] for row in layer) < 40, dtype


GOOD = {
    "kernel": "gmm_kernel",
    "arch": 90,
    "dtype": "bf16",
    "constants": {"PREC": "tf32"},
    "spills": 0,
    "stages": 3,
}
GOOD |= {"shared": 98_304, "predicted": 99_328, "wgmma": 4, "cp.async": 24, "tma": 0}


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"spills": 16}, "spilled"),
        ({"shared": 232_449, "predicted": 233_000}, "do not fit"),
        ({"predicted": 98_303}, "predicted"),
        ({"shared": 66_048}, "not pipelined"),
        ({"wgmma": 0}, "no wgmma"),
        ({"wgmma": 0, "dtype": "fp32"}, None),
        ({"cp.async": 0}, "no asynchronous copies"),
        ({"cp.async": 0, "tma": 2}, None),
        ({"cp.async": 0, "stages": 1}, None),
        ({"cp.async": 0, "wgmma": 0, "constants": {}}, None),
    ],
)
def test_faults_are_found(change, fault):
    found = faults(GOOD | change)
    assert len(found) == (fault is not None) and (not found or fault in found[0])


# ---------------------------------------------------------------- which tiles are tried

TILES = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 4), (64, 64, 32, 8, 3)]
TILES += [(32, 64, 32, 4, 3), (32, 32, 32, 4, 2)]


def tried(monkeypatch, arch: int, dtype, limit=None, prec="tf32", rows=kernels_triton.MANY) -> list:
    """(BM, BN, BK) of those of TILES that are tried on such a card."""
    card = SimpleNamespace(major=arch // 10, shared_memory_per_block_optin=limit or LIMITS[arch])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(kernels_triton, "INTERPRET", False)
    tiles = []
    for m, n, k, warps, stages in TILES:
        sizes = {"BM": m, "BN": n, "BK": k}
        tiles.append(triton.Config(sizes, num_warps=warps, num_stages=stages))
    named = {"x": torch.empty(1, dtype=dtype), "bucket": rows}
    found = kernels_triton.worth_trying("BK", tiles, named, PREC=prec)
    return [tuple(tile.kwargs.values()) for tile in found]


def test_tiles_fit_the_card_and_dtype(monkeypatch):
    bf16, fp32 = torch.bfloat16, torch.float32
    large, middle, small, smaller, *_ = [tile[:3] for tile in TILES]
    assert tried(monkeypatch, 90, bf16) == [large, middle, small]
    assert tried(monkeypatch, 100, bf16) == [large, middle, small]
    # 294,912 B in fp32, and no room in registers on cards that keep sums there
    assert tried(monkeypatch, 90, fp32) == [middle, small, smaller]
    assert tried(monkeypatch, 80, bf16) == [middle, small, smaller]
    # 99 KB: (128, 128, 64) needs 128 in fp32, 64 in bf16
    assert middle in tried(monkeypatch, 120, bf16)
    assert tried(monkeypatch, 120, fp32)[0] == tried(monkeypatch, 86, fp32)[0] == small


@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("prec", ["ieee", "tf32"])
def test_some_tile_always_remains(monkeypatch, arch, dtype, prec):
    known = (monkeypatch, arch, dtype)
    assert 1 <= len(tried(*known, prec=prec)) <= kernels_triton.MOST_TILES
    assert tried(*known, limit=1, prec=prec) == [(32, 32, 32)]  # what needs least is tried


def test_products_without_tensor_cores_take_small_tiles(monkeypatch):
    """A thread's products of a step are all in its code: (64, 64, 64) on four warps spilled."""
    assert tried(monkeypatch, 90, torch.float32, prec="ieee") == [tile[:3] for tile in TILES[3:]]


def test_few_rows_an_expert_take_low_tiles(monkeypatch):
    few = tried(monkeypatch, 90, torch.bfloat16, rows=kernels_triton.FEW)
    assert few and all(tile[0] <= 64 for tile in few)


def test_a_deterministic_run_tunes_nothing(monkeypatch):
    """Another tile may add in another order: other bits after a restart."""
    assert kernels_triton.magnitude(8192, 8) == kernels_triton.MANY
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    rows = kernels_triton.magnitude(8192, 8)
    assert len(tried(monkeypatch, 90, torch.bfloat16, rows=rows)) == 1


def test_magnitudes_are_few_and_compile_nothing_anew():
    """Triton compiles an argument that is 1 or a multiple of 16 anew."""
    found = {kernels_triton.magnitude(rows, 4) for rows in range(0, 5000, 4)}
    assert found == {kernels_triton.FEW, kernels_triton.SOME, kernels_triton.MANY}
    for value in (*found, kernels_triton.UNTUNED):
        assert value != 1 and value % 16


# ---------------------------------------------------------------- the autotuner

TUNE = """
import json
import triton
import triton.language as tl
from triton.runtime import Autotuner, JITFunction
import kernels_triton
from tools import ptx

def forget():
    for kernel in ptx.all_kernels().values():
        if isinstance(kernel, Autotuner):
            kernel.cache.clear()

benched = []
def bench(self, *args, config, **meta):
    benched.append(self.base_fn.__name__)
    return [float(len(benched))] * 3

Autotuner._bench = bench
JITFunction.run = lambda *args, **keywords: None

def tune(dtype, rows):
    "How many tiles of gmm_kernel one launch tries when so many rows are an expert's."
    benched.clear()
    kernels_triton.magnitude = lambda *_: rows
    _, name, args, keywords = ptx.launches(dtype)[0]
    ptx.all_kernels()[name].run(*args, grid=(1,), warmup=True, **keywords)
    return len(benched)

MANY, SOME = kernels_triton.MANY, kernels_triton.SOME
with ptx.card(90):
    by_key = [tune("bf16", MANY), tune("bf16", MANY), tune("fp16", MANY), tune("bf16", SOME)]
    by_precision = [tune("tf32", MANY), tune("fp32", MANY)]
    forget()  # as a new process
    again = [tune("bf16", MANY), tune("tf32", MANY)]

@triton.jit
def helper(x):
    tl.store(x, 1)

@triton.jit
def forgotten(x):
    helper(x)

kernels_triton.helper, kernels_triton.forgotten = helper, forgotten
print(json.dumps([by_key, by_precision, again, ptx.without_case()]))
"""


def test_tuning_by_dtype_and_magnitude_is_kept_on_disk(tmp_path):
    """With Triton's own autotuner, a stand-in for the card and for the clock."""
    (tmp_path / "tune.py").write_text(TUNE)
    done = run_python(tmp_path / "tune.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    by_key, by_precision, again, without_case = json.loads(done.stdout)
    most = kernels_triton.MOST_TILES
    assert by_key == [most, 0, most, most]
    assert by_precision == [most, most]
    assert again == [0, 0]
    assert without_case == ["forgotten", "helper"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_tuned_kernels_write_nothing_that_they_read(monkeypatch):
    """The autotuner runs a kernel many times over the same tensors."""
    if triton.__version__ < "3.7" and kernels.INTERPRET:
        pytest.skip("the interpreter of this triton fails")
    seen = set()
    autotuner = type(kernels_triton.gmm_kernel)
    once = autotuner.run

    def twice(self, *args, **keywords):
        once(self, *args, **keywords)
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        first = [bits(tensor).clone() for tensor in tensors]
        once(self, *args, **keywords)
        assert all(torch.equal(a, bits(b)) for a, b in zip(first, tensors)), self.base_fn.__name__
        seen.add(self.base_fn.__name__)

    monkeypatch.setattr(autotuner, "run", twice)
    inputs, dout = tryout.sample("cpu", torch.float32, 24, 16, 24, 4, 2)
    tryout.fwd_bwd(lambda *layer: kernels.run_experts(*layer, "triton"), inputs, dout)
    tuned = {n for n, kernel in vars(kernels_triton).items() if isinstance(kernel, autotuner)}
    assert seen == tuned


# ---------------------------------------------------------------- said at the start


def test_tuning_is_said_before_it_begins(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "backends", lambda *_: {"triton": None, "slices": None})
    monkeypatch.setattr(kernels, "INTERPRET", False)
    shapes = []

    def selftest(device, dtype, T, *rest, names):
        shapes.append(T)
        return {name: (0.0, 1.0) for name in names}

    monkeypatch.setattr(tryout, "selftest", selftest)
    layer = ("cuda", torch.bfloat16, 64, 32, 1024, 8)
    tryout.pick_backend("auto", *layer, 100_000)
    said = capsys.readouterr().out
    assert (
        f"about {kernels_triton.compilations(kernels_triton.MOST_TILES)} compilations, cached in"
        in said
    )
    assert str(triton.knobs.cache.dir) in said
    monkeypatch.setenv("RANK", "1")
    tryout.pick_backend("auto", *layer, 100_000)
    assert not capsys.readouterr().out
    # what is tuned there serves the run itself
    assert kernels_triton.magnitude(shapes[0] * 8, 1024) == kernels_triton.magnitude(800_000, 1024)
    backend, why = tryout.pick_backend("triton", *layer, 100_000)
    assert backend == "triton" and "compilations" in why
    assert tryout.pick_backend("triton", "cpu", *layer[1:], 100)[1] == "as asked"
    torch.use_deterministic_algorithms(True)
    assert "about 7 compilations" in tryout.pick_backend("triton", *layer, 100_000)[1]
