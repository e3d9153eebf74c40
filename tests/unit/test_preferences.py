"""Preferences: pairs as rows, their losses against trl's, log-probabilities by chunks, the
reference, the evaluation. No Trainer."""

import json
from pathlib import Path

import pytest
import torch

from lumen import preferences
from lumen.config import Config
from lumen.preferences import Preference, pair_losses

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trl_losses.json"
TRL = json.loads(FIXTURE.read_text())


def how(**keys) -> Preference:
    return preferences.preference(Config(**keys))


# ---------------------------------------------------------------- losses

AS_TRL = {
    "dpo": how(method="dpo"),
    "dpo beta 0.5": how(method="dpo", beta=0.5),
    "cdpo": how(method="cdpo"),
    "ipo": how(method="ipo"),
    "ipo beta 0.02": how(method="ipo", beta=0.02),
    "hinge": how(method="hinge"),
    "simpo": how(method="simpo"),
    "orpo": how(method="orpo"),
}


@pytest.mark.parametrize("name", AS_TRL)
def test_losses_and_rewards_are_trls(name):
    """On stored pairs of many lengths, one with equal sides, one far apart."""
    assert TRL["trl"] == "1.16.0"
    logp, reference, n = (
        torch.tensor([pair[key] for pair in TRL["pairs"]]) for key in ("logp", "reference", "n")
    )
    losses, rewards = pair_losses(AS_TRL[name], logp, reference, n)
    found = torch.cat([losses[:, None], rewards], 1)
    want = torch.tensor([pair["found"][name] for pair in TRL["pairs"]])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    with_sft = pair_losses(AS_TRL[name]._replace(sft_coef=0.5), logp, reference, n)[0]
    sft = torch.tensor([pair["found"]["sft"][0] for pair in TRL["pairs"]])
    torch.testing.assert_close(with_sft, want[:, 0] + 0.5 * sft, rtol=1e-5, atol=1e-5)
