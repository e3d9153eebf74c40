"""lumen/parallel.py and train_fsdp.py on GPUs that are not here: which way each word between ranks
goes, with collectives that record."""

import mmap
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg

import train_fsdp
from lumen import machine, parallel, plan
from lumen.cli import read_any
from lumen.parallel import Parallel
from model import ModelConfig, Transformer

SBATCH = Path(__file__).parents[2] / "slurm" / "train.sbatch"
MODEL = {"vocab_size": 97, "d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 48}


def config(**keys):
    keys = {"data_dir": "none", "out_dir": "none", "model": MODEL} | keys
    return read_any(keys)[0]


@pytest.fixture
def said(monkeypatch):
    """What Parallel asks of torch, as [(name, device or None, dtype or None)], on the first of two
    ranks with a GPU each. The meta device stands in for CUDA where tensors are needed."""
    said = []

    def collective(tensor, *args, group=None):
        said.append(("all_reduce", tensor.device.type, tensor.dtype))

    def initialize(*args, **more):
        said.append(("init", args, more))

    def note(name):
        return lambda *args, **more: said.append((name, None, None))

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setattr(dist, "all_reduce", collective)
    monkeypatch.setattr(dist, "init_process_group", initialize)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, note(name))

    def detect(device, precision, compile_model, local_rank):
        return SimpleNamespace(device=torch.device("cuda", local_rank))

    monkeypatch.setattr(machine, "detect", detect)
    monkeypatch.setattr(parallel, "synchronize", note("synchronize"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: said.append(("set_device", d, None)))
    monkeypatch.setattr(parallel, "Feed", lambda device: None)
    return said


def on_two_gpus() -> Parallel:
    par = Parallel(config(comm_timeout=5000))
    par.device = torch.device("meta")
    return par


def test_how_ranks_with_gpus_meet(said):
    """The GPU is chosen before; objects and flags have gloo, tensors of a GPU NCCL; nothing is
    connected at once, by a device_id, for that changes how a mesh is made and where barrier()
    goes."""
    Parallel(config(comm_timeout=5000))
    (first, device, _), (_, args, more) = said
    assert (first, device) == ("set_device", torch.device("cuda", 1))
    assert args[0] == "cpu:gloo,cuda:nccl" and args[2:5] == (timedelta(seconds=5000), 2, 0)
    assert "device_id" not in more and len(args) < 9


def test_flags_go_over_gloo_whatever_the_default_device(said):
    """In a notebook it may be a GPU: then asking would wait for all that is queued there."""
    par = on_two_gpus()
    del said[:]
    with torch.device("meta"):
        assert par.all_reduce_max([3, 0]) == [3, 0]
    assert said == [("all_reduce", "cpu", torch.int64)]


def test_gradients_and_sums_go_over_nccl(said):
    """In dtypes that it knows; the sums first and alone."""
    par = on_two_gpus()
    with torch.device("meta"):
        model = Transformer(ModelConfig(**MODEL))
        vector = torch.zeros(5, dtype=torch.float64)
    del said[:]
    assert par.reduce(model, vector) is vector
    assert said[0] == ("all_reduce", "meta", torch.float64)
    assert len(said) > 1
    assert set(said[1:]) == {("all_reduce", "meta", torch.float32)}


def test_the_end_waits_for_the_others_over_gloo(said, monkeypatch):
    """After what the GPU still had to do; torch's barrier() may take NCCL, on a GPU it guesses."""
    par = on_two_gpus()
    del said[:]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    par.close()
    assert [name for name, _, _ in said] == ["synchronize", "all_reduce", "destroy_process_group"]
    assert said[1][1] == "cpu"


def test_objects_of_a_group_of_both_kinds_travel_over_gloo():
    """torch's own rule, in this torch: CUDA's part of the group would not carry them."""
    assert fake_pg  # its import makes "fake" known
    dist.init_process_group("cpu:gloo,cuda:fake", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert dist.distributed_c10d._get_object_coll_device(dist.group.WORLD) == "cpu"
        assert dist.group.WORLD.bound_device_id is None
        answers = [None]
        dist.all_gather_object(answers, {"a": 1})
        assert answers == [{"a": 1}]
    finally:
        dist.destroy_process_group()


@pytest.fixture
def eight():
    machine.init_fake_group(8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layout", "dense", "sparse"),
    [
        (plan.Layout(8, 3), (8,), None),
        (plan.Layout(8, 3, 4), (2, 4), None),
        (plan.Layout(8, 3, 0, 4), (8,), (2, 4)),
        (plan.Layout(8, 3, 4, 2), (2, 4), (4, 2)),
    ],
)
def test_meshes_are_of_the_ranks_own_kind_of_device(eight, layout, dense, sparse):
    """So their tensors lie on the GPU and their collectives take NCCL."""
    for kind in ("cuda", "cpu"):
        made = train_fsdp.meshes(kind, layout)
        assert [mesh and mesh.device_type for mesh in made] == [kind, sparse and kind]
        assert tuple(made[0].shape) == dense
        assert (made[1] and tuple(made[1].shape)) == sparse


def test_the_groups_of_a_mesh_wait_as_long_as_all_ranks(eight, monkeypatch):
    """They begin with half an hour of torch's own, which a larger comm_timeout did not change until
    the first step was done."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    seen = []

    def set_timeout(seconds):
        groups = len(dist.distributed_c10d._world.pg_map)
        seen.append((seconds, groups))

    monkeypatch.setattr(train_fsdp, "set_collective_timeout", set_timeout)
    train_fsdp.Sharded(config(comm_timeout=5000, zero_stage=3, hsdp_shard_size=4, device="cpu"))
    assert len(seen) == 1 and seen[0][0] == 5000
    assert seen[0][1] == len(dist.distributed_c10d._world.pg_map) > 1


# ---------------------------------------------------------------- what slurm/train.sbatch sets


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:TORCH_NCCL|TORCH_FR|TORCH_ELASTIC|TORCH_DISABLE)_[A-Z_]+\b", text))


def known_to_torch(name: str) -> bool:
    """In its C++ headers, its Python, or its library."""
    root = Path(torch.__file__).parent
    headers = root / "include/torch/csrc/distributed/c10d"
    sources = [headers / "ProcessGroupNCCL.hpp", headers / "FlightRecorder.hpp"]
    sources += [root / "distributed/run.py", *(root / "distributed/elastic").rglob("*.py")]
    if any(path.exists() and name in path.read_text(encoding="utf-8") for path in sources):
        return True
    with open(root / "lib/libtorch_cpu.so", "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            return library.find(name.encode()) >= 0


@pytest.mark.skipif(
    not (Path(torch.__file__).parent / "lib/libtorch_cpu.so").exists(), reason="not on Linux"
)
def test_what_the_job_sets_is_known_to_this_torch():
    """A name that torch has given up is believed in for years."""
    names = names_in(SBATCH.read_text())
    assert {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"} <= names
    if machine.version_numbers(torch.__version__) < (2, 13):
        names.discard("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")  # the job says so
    assert [name for name in sorted(names) if not known_to_torch(name)] == []
    assert not known_to_torch("TORCH_NCCL_NO_SUCH_NAME")
