"""backup_dir: verified copies of checkpoints, which training does not wait for."""

import shutil

import pytest
from conftest import fingerprint

from lumen import checkpoint
from train import Trainer


def finish(config):
    trainer = Trainer(config)
    assert trainer.fit() == 0
    return trainer


@pytest.fixture
def safe(tmp_path):
    return tmp_path / "safe"


def test_a_run_goes_on_from_its_backup_as_if_nothing_had_happened(tiny, safe, tmp_path, capsys):
    same = {"lr_schedule": "constant", "save_interval": 2}
    whole = finish(tiny(max_steps=8, **same))
    keys = tiny(max_steps=4, **same, backup_dir=str(safe), backup_interval_hours=0)
    short = finish(keys | {"out_dir": str(tmp_path / "lost")})
    copies = safe / "lost"
    assert checkpoint.list_steps(copies) == [2, 4]
    assert (copies / "config.yaml").exists()
    assert f"backup     {copies / 'step_00000002'}" in capsys.readouterr().out
    shutil.rmtree(short.out)
    again = finish(tiny(max_steps=8, **same, resume=str(copies), out_dir=str(tmp_path / "again")))
    assert fingerprint(again.out, 8) == fingerprint(whole.out, 8)


def test_the_newest_two_stay_and_an_interval_is_kept(tiny, safe):
    keys = {"max_steps": 6, "save_interval": 1, "backup_dir": str(safe)}
    trainer = finish(tiny(**keys, backup_interval_hours=0))
    assert len(checkpoint.list_steps(safe / trainer.out.name)) == 2
    assert checkpoint.list_steps(safe / trainer.out.name)[-1] == 6, "the last, always"
    shutil.rmtree(safe)
    trainer = finish(tiny(**keys, backup_interval_hours=1, resume="none", overwrite=True))
    kept = checkpoint.list_steps(safe / trainer.out.name)
    assert len(kept) == 2 and kept[-1] == 6 and kept[0] < 4, "the first save, and the end"


def test_a_copy_with_another_byte_gets_no_name_and_the_run_ends_well(
    tiny, safe, monkeypatch, capsys
):
    real = shutil.copyfile

    def flips(source, target, **more):
        real(source, target, **more)
        if str(target).endswith(".safetensors"):
            with open(target, "r+b") as file:
                file.seek(-1, 2)
                last = file.read()
                file.seek(-1, 2)
                file.write(bytes([last[0] ^ 1]))
        return target

    monkeypatch.setattr(shutil, "copyfile", flips)
    keys = {"max_steps": 2, "save_interval": 2, "backup_dir": str(safe)}
    trainer = finish(tiny(**keys, save_async=False))
    said = capsys.readouterr().out
    assert "no backup of" in said and "sha256" in said
    assert not list((safe / trainer.out.name).glob("step_*"))


def test_a_place_that_cannot_be_written_is_a_note(tiny, safe, capsys):
    safe.write_text("a file")
    trainer = finish(tiny(max_steps=2, save_interval=2, backup_dir=str(safe)))
    assert "no backup of" in capsys.readouterr().out and checkpoint.list_steps(trainer.out) == [2]
