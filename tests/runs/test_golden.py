"""A redesign changes no bit, and what was saved before it is read after it."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT, losses

from train import Trainer

# the run in fixtures/run_77c1c6b.zip: made at commit 77c1c6b with these keys, by
# `Trainer(KEYS).fit()`
MODEL = {"vocab_size": 13, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 4, "max_seq_len": 16}
MODEL |= {"n_experts": 2, "d_expert": 8, "moe_layers": [1], "mod_capacity": 0.5, "mod_layers": [0]}
KEYS = {"max_steps": 10, "batch_size": 2, "device": "cpu", "learning_rate": 3e-3, "warmup_steps": 5}
KEYS |= {"save_interval": 5, "log_interval": 1, "eval_tokens": 256, "val_fraction": 0.1}
KEYS |= {
    "precision": "fp32",
    "compile_model": False,
    "save_total_limit": 0,
    "lr_schedule": "constant",
}
KEYS |= {"model": MODEL | {"dropout": 0.1}}
VAL_LOSS = 2.4699331521987915  # at step 10
WENT_ON = [2.50366, 2.483409, 2.459419, 2.40051]  # losses of steps 11 to 14, at commit 77c1c6b


def test_a_checkpoint_written_before_the_house_was_rebuilt_goes_on_exactly(tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    np.save(data / "part_0.npy", (np.arange(3000) * 7 % 13).astype(np.uint16))
    zipfile.ZipFile(ROOT / "tests" / "fixtures" / "run_77c1c6b.zip").extractall(out)
    trainer = Trainer(KEYS | {"data_dir": str(data), "out_dir": str(out), "max_steps": 14})
    assert trainer.step == 10
    assert trainer.progress.val_loss == VAL_LOSS
    assert trainer.fit() == 0
    went_on = losses(out)
    assert [went_on[step] for step in (11, 12, 13, 14)] == pytest.approx(WENT_ON, abs=1e-5)


@pytest.mark.nightly
def test_no_bit_has_changed_since_the_golden_runs_were_written():
    command = [sys.executable, str(ROOT / "tools" / "golden.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert json.loads((ROOT / "tests" / "golden.json").read_text())["runs"]
