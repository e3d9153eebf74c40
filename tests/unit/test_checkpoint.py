import errno
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumen import checkpoint, files
from lumen.errors import UserError


def save(out, step, tensors, cuts=1, **state):
    """As `cuts` ranks that each own a slice of the first axis; 0-d tensors belong to rank 0."""
    folder = checkpoint.step_dir(out, step).with_suffix(".tmp")
    for rank in range(cuts):
        pieces = {}
        for name, t in tensors.items():
            if t.dim() == 0:
                pieces |= {name: [((), (), t)]} if rank == 0 else {}
                continue
            n = len(t)
            a, b = n * rank // cuts, n * (rank + 1) // cuts
            if b > a:
                pieces[name] = [(tuple(t.shape), (a,) + (0,) * (t.dim() - 1), t[a:b])]
        assert checkpoint.write(folder, rank, pieces) is None
    checkpoint.commit(folder, checkpoint.step_dir(out, step), cuts, {"step": step} | state)
    return checkpoint.step_dir(out, step)


def tensors():
    gen = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(7, 5, generator=gen),
        "model.b": torch.randn(3, generator=gen).bfloat16(),
        "optim.a.step": torch.tensor(4.0),
        "optim.n": torch.arange(6),
    }


@pytest.mark.parametrize("cuts", [1, 2, 4, 8])
def test_what_any_number_wrote_any_number_reads(tmp_path, cuts):
    want = tensors()
    found = checkpoint.Checkpoint(save(tmp_path, 3, want, cuts))
    assert found.verify() == [] and found.step == 3
    for name, t in want.items():
        assert torch.equal(found.read(name), t) and found.read(name).dtype == t.dtype
    for a in range(0, 7, 2):
        assert torch.equal(
            found.read("model.a", (a, 1), (min(3, 7 - a), 3)), want["model.a"][a : a + 3, 1:4]
        )
    assert set(found.model_state()) == {"a", "b"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_region_of_any_cut(tmp_path_factory, data):
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    cuts = data.draw(st.integers(1, 5))
    t = torch.arange(shape[0] * shape[1]).view(shape)
    found = checkpoint.Checkpoint(save(tmp_path_factory.mktemp("c"), 1, {"t": t}, cuts))
    lo = [data.draw(st.integers(0, n - 1)) for n in shape]
    size = [data.draw(st.integers(1, n - a)) for a, n in zip(lo, shape)]
    assert torch.equal(
        found.read("t", lo, size), t[lo[0] : lo[0] + size[0], lo[1] : lo[1] + size[1]]
    )


def test_the_same_bytes_each_time(tmp_path):
    files = [sorted(p for p in save(tmp_path / n, 3, tensors(), 2).iterdir()) for n in "ab"]
    assert [p.name for p in files[0]] == [
        "manifest.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
        "state.json",
    ]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files))


def test_damage_is_found_and_named(tmp_path):
    def damaged(change):
        folder = save(tmp_path / "run", 5, tensors())
        change(folder)
        wrong = checkpoint.Checkpoint(folder).verify()
        shutil.rmtree(tmp_path / "run")
        return "; ".join(wrong)

    def flip(folder):
        data = bytearray((folder / "rank_00000.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "rank_00000.safetensors").write_bytes(data)

    assert "another sha256" in damaged(flip)
    assert "is missing" in damaged(lambda f: (f / "rank_00000.safetensors").unlink())
    assert "bytes instead of" in damaged(lambda f: (f / "rank_00000.safetensors").write_bytes(b"x"))
    with pytest.raises(UserError, match="E303"):
        damaged(lambda f: (f / "manifest.json").write_text("{"))
    newer = '{"format": 99, "files": {}, "tensors": {}}'
    with pytest.raises(UserError, match="E306"):
        damaged(lambda f: (f / "manifest.json").write_text(newer))


def test_the_model_of_a_checkpoint(tmp_path):
    """One reading, one code, for training, sampling, export and benchmarks."""

    def saved(**state):
        folder = checkpoint.step_dir(tmp_path, 1)
        assert checkpoint.write(tmp_path / "x.tmp", 0, {}) is None
        checkpoint.commit(tmp_path / "x.tmp", folder, 1, {"step": 1} | state)
        return checkpoint.Checkpoint(folder)

    keys = {"vocab_size": 100, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
    found = saved(config={"model": keys}, model_written=keys | {"n_layers": 3})
    assert (found.model_config().n_layers, found.model_config(written=True).n_layers) == (2, 3)
    assert saved(config={"model": keys}).model_config(written=True).n_layers == 2  # an older one
    for wrong, word in (
        (
            {"config": {"model": keys | {"n_minds": 1, "mod_future": 2}}},
            "model.mod_future, model.n_minds",
        ),
        ({"config": {"model": keys | {"norm_order": "later"}}}, "norm_order"),
        ({"config": {}}, "model"),
        ({}, "config"),
    ):
        with pytest.raises(UserError, match=f"E306.*{word}"):
            saved(**wrong).model_config()


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "rank_00000.safetensors", "rank_00001.safetensors"]
)
def test_no_flipped_bit_and_no_cut_is_believed(tmp_path, name):
    """At each 5th byte of each file: the damaged one is named and passed over, or what it says is
    what was saved."""
    want = {1: tensors(), 2: {k: t + 1 for k, t in tensors().items()}}
    for step, named in want.items():
        save(tmp_path, step, named, 2, tokens=1000 * step)
    file = checkpoint.step_dir(tmp_path, 2) / name
    whole, passed = file.read_bytes(), 0
    for at in range(0, len(whole), 5):
        for damaged in (
            whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :],
            whole[:at],
        ):
            file.write_bytes(damaged)
            said = []
            found = checkpoint.find(tmp_path, say=said.append)
            assert (found.step == 1) == ("E303: passed over" in "".join(said)), (at, said)
            passed += found.step == 1
            assert found.state == {"step": found.step, "tokens": 1000 * found.step, "format": 1}, at
            for key, t in want[found.step].items():
                assert torch.equal(found.read(key), t), (at, key)
    assert passed > 0.3 * len(whole)


def test_a_manifest_of_before_it_had_a_checksum_is_read(tmp_path):
    folder = save(tmp_path, 5, tensors(), 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert torch.equal(checkpoint.find(tmp_path).read("model.a"), tensors()["model.a"])


def test_a_missing_piece_is_not_made_up(tmp_path):
    folder = save(tmp_path, 5, tensors(), 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["model.a"]["pieces"].pop()
    manifest["sha256"] = checkpoint.manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="E303.*model.a"):
        checkpoint.Checkpoint(folder).read("model.a")


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    """A bad sector is damage like any other: it does not end the process that looks for the newest
    whole one."""
    for step in (1, 2):
        save(tmp_path, step, tensors())
    real, said = files.sha256, []

    def failing(path):
        if str(path).endswith("step_00000002/rank_00000.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256", failing)
    assert checkpoint.find(tmp_path, say=said.append).step == 1
    assert "rank_00000.safetensors cannot be read" in said[0]


def test_find_takes_newest_best_or_the_one_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, tensors())
    checkpoint.write_json(tmp_path / "best.json", {"step": 2, "val_loss": 1.0})
    said = []
    assert checkpoint.find(tmp_path).step == 3
    assert checkpoint.find(tmp_path, best=True).step == 2
    assert checkpoint.find(checkpoint.step_dir(tmp_path, 1)).step == 1
    (checkpoint.step_dir(tmp_path, 3) / "state.json").write_text("{}")
    assert checkpoint.find(tmp_path, say=said.append).step == 2 and "step_00000003" in said[0]
    with pytest.raises(UserError, match="E303"):
        checkpoint.find(checkpoint.step_dir(tmp_path, 3))
    for missing in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="E304"):
            checkpoint.find(missing)
    for damaged in ("", '{"step"', "[]", '{"step": null}', None):
        (tmp_path / "best.json").unlink() if damaged is None else (
            tmp_path / "best.json"
        ).write_text(damaged)
        with pytest.raises(UserError, match="E304.*best.json"):
            checkpoint.find(tmp_path, best=True)


def test_clean_up_after_a_crash(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, tensors())
    checkpoint.step_dir(tmp_path, 2).rename(
        tmp_path / "step_00000002.old"
    )  # moved aside, then the power went
    shutil.copytree(
        checkpoint.step_dir(tmp_path, 1), tmp_path / "step_00000001.old"
    )  # replaced, not yet deleted
    (tmp_path / "step_00000003.tmp").mkdir()
    assert checkpoint.list_steps(tmp_path) == [1]
    checkpoint.clean_up(tmp_path)
    assert checkpoint.list_steps(tmp_path) == [1, 2] and len(list(tmp_path.iterdir())) == 2
    assert checkpoint.find(tmp_path).step == 2


def test_half_a_line_is_cut_off(tmp_path):
    save(tmp_path, 1, tensors())
    many = "{}\n" * 400_000  # more than is looked at
    for whole, half in (
        ("", ""),
        ("", '{"a"'),
        ("{}\n{}\n", ""),
        ("{}\n", '{"a": 1'),
        (many, '{"a": 1'),
    ):
        (tmp_path / "metrics.jsonl").write_text(whole + half)
        checkpoint.clean_up(tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == whole
    assert not (tmp_path / "decisions.jsonl").exists()


def test_saving_over_a_name_replaces_it(tmp_path):
    save(tmp_path, 1, {"model.a": torch.zeros(2)})
    save(tmp_path, 1, {"model.a": torch.ones(2)})
    assert (
        checkpoint.find(tmp_path).read("model.a").tolist() == [1, 1]
        and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.parametrize(
    "limit, every, best, left",
    [
        (0, 0, None, [1, 2, 3, 4, 5, 6]),
        (2, 0, 1, [1, 5, 6]),
        (1, 3, None, [3, 6]),
        (1, 0, 6, [6]),
        (3, 2, 1, [1, 2, 4, 5, 6]),
    ],
)
def test_retention(tmp_path, limit, every, best, left):
    for step in range(1, 7):
        save(tmp_path, step, {"model.a": torch.zeros(1)})
    checkpoint.prune(tmp_path, limit, every, best)
    assert checkpoint.list_steps(tmp_path) == left


def test_the_newest_clean_one_is_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, {"model.a": torch.zeros(1)}, clean=step < 3)
    checkpoint.prune(tmp_path, 1, 0, None)
    assert checkpoint.list_steps(tmp_path) == [2, 4]


def test_write_reports_instead_of_raising(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "Error" in checkpoint.write(tmp_path / "file" / "step_1.tmp", 0, {})


def test_listing(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step, tensors(), tokens=1000 * step, val_loss=4.0 / step)
    checkpoint.write_json(tmp_path / "best.json", {"step": 2, "val_loss": 2.0})
    assert checkpoint.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2,000" in out and "2.0000" in out and "best" in out and out.count("verified") == 2
    with pytest.raises(UserError, match="E002"):
        checkpoint.main([])
