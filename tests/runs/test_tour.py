"""docs/tour.ipynb, its code cells in order, without Jupyter: what its sentences claim is so."""

import sys
import warnings

import notebook
import pytest
import torch
from conftest import ROOT

FILE = ROOT / "docs" / "tour.ipynb"
TOUR = notebook.read(FILE)


@pytest.fixture(scope="module")
def toured():
    """(what the cells leave, what they print)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matplotlib, which has no screen here
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("MPLBACKEND", "Agg")
        patch.chdir(FILE.parent)
        space, outputs = notebook.run(TOUR)
    torch.use_deterministic_algorithms(deterministic)
    said = [line for found in outputs for one in found for line in one.get("text", [])]
    return space, "".join(said)


def test_a_step_with_a_bad_gradient_is_dropped_exactly(toured):
    space, said = toured
    assert space["unchanged"] and "weights unchanged, bit for bit: True" in said
    assert "step 60: nonfinite: drop" in said and "steps dropped: 1\n" in said


def test_a_broken_run_is_rolled_back_and_heals(toured):
    space, said = toured
    losses, broken, good = space["losses"], space["broken_at"], space["good"]
    assert space["mean"](losses[broken : broken + 20]) > good + 1, "it was broken"
    assert "divergence: wait" in said and "divergence: rollback" in said
    assert "outcome helped" in said and "divergence: stop" not in said
    assert space["healed"] < good, "and is better at the end than before"


def test_it_goes_on_where_it_stopped(toured):
    space, said = toured
    trainer = space["trainer"]
    assert (
        trainer.started_at == space["stopped_at"] > 0
        and f"goes on at step {trainer.started_at}" in said
    )
    assert trainer.step == space["keys"]["max_steps"] and space["code"] == 0
    assert space["decision"]["after"] == {"lr_scale": 0.5}


def test_the_experts_become_level_and_the_model_writes(toured):
    space, said = toured
    found = space["trainer"].get_expert_statistics()
    assert found["routing_entropy"] > space["entropy_at_first"] and found["dead"] == 0
    assert set(found["layers"]) == {0, 1} and said.count("layer 1 expert 7") == 2
    assert all(len(text) > 20 for text in space["texts"])
    assert not space["work"].exists(), "nothing stays behind"


def test_the_file_is_a_notebook_that_was_run():
    """python tests/notebook.py docs/tour.ipynb writes its outputs."""
    assert (TOUR["nbformat"], TOUR["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in TOUR["cells"]}) == len(TOUR["cells"])
    cells = notebook.code_cells(TOUR)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 2
    assert all(len(cell["source"]) < 45 for cell in TOUR["cells"]), "a cell is read at one glance"
    assert FILE.stat().st_size < 60_000
