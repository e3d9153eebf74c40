"""What trl makes of some pairs: tests/fixtures/trl_losses.json, which tests/unit/test_preferences.py
holds lumen/preferences.py against. trl is no requirement: install it elsewhere, and run from here

    python tests/programs/trl_figures.py > tests/fixtures/trl_losses.json
"""

import json
from collections import defaultdict
from types import SimpleNamespace

import torch
import trl
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

LENGTHS = [(3, 5), (1, 1), (12, 4), (40, 90), (7, 7), (2, 30)]
SCALES = [1.0, 0.1, 3.0, 1.5, 0.0, 8.0]  # of what the policy has learned


def dpo(loss_type: str, beta: float, pair: dict) -> tuple:
    """(loss, reward of the chosen, of the rejected) of one pair, by DPOTrainer."""
    T = max(len(side) for side in pair["logp"])
    mask = torch.zeros(2, 1 + T, dtype=torch.long)
    logp = torch.zeros(2, T)
    for side, values in enumerate(pair["logp"]):
        mask[side, 1 : 1 + len(values)] = 1
        logp[side, : len(values)] = torch.tensor(values)
    zeros = torch.zeros(2, T)
    out = SimpleNamespace(log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    own = SimpleNamespace(accelerator=same, model=SimpleNamespace(training=False), beta=beta)
    own.aux_loss_enabled = own.use_weighting = False
    own.ld_alpha, own.precompute_ref_logps, own.f_divergence_type = None, True, "reverse_kl"
    own.loss_types, own.loss_weights, own.label_smoothing = [loss_type], [1.0], 0.0
    own._total_train_tokens = 0
    own._metrics = defaultdict(lambda: defaultdict(list))
    reference = [torch.tensor(values).sum()[None] for values in pair["reference"]]
    inputs = {"input_ids": mask, "completion_mask": mask, "attention_mask": mask}
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference))
    loss = DPOTrainer._compute_loss(own, lambda **_: out, inputs, False)
    said = own._metrics["eval"]
    return loss.item(), said["rewards/chosen"][0], said["rewards/rejected"][0]


def other(trainer, pair: dict, logp: list, **options) -> tuple:
    same = SimpleNamespace(device="cpu")
    own = SimpleNamespace(accelerator=same, alpha=0.0, **options)
    compute = trainer.odds_ratio_loss if trainer is ORPOTrainer else trainer.cpo_loss
    found = compute(own, *(torch.tensor([x]) for x in logp))
    loss, *rewards = (x.item() for x in found[:3])
    if trainer is ORPOTrainer:  # as its get_batch_loss_metrics has it, of the reply alone
        loss = -sum(pair["logp"][0]) / len(pair["logp"][0]) - loss
    return loss, *rewards


def figures(pair: dict) -> dict:
    sums = [[sum(side) for side in pair[name]] for name in ("logp", "reference")]
    ratios = [a - b for a, b in zip(*sums)]
    means = [sum(side) / len(side) for side in pair["logp"]]
    found = {name: dpo(kind, 0.1, pair) for name, kind in KINDS.items()}
    found["dpo beta 0.5"] = dpo("sigmoid", 0.5, pair)
    found["ipo beta 0.02"] = dpo("ipo", 0.02, pair)
    found["sft"] = dpo("sft", 0.1, pair)
    # DPOTrainer has no smoothing of this kind any more; CPOTrainer's is the same formula
    smooth = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1}
    found["cdpo"] = other(CPOTrainer, pair, ratios, **smooth)
    simpo = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.0}
    found["simpo"] = other(CPOTrainer, pair, means, **simpo)
    found["orpo"] = other(ORPOTrainer, pair, means, beta=0.1)
    return found


KINDS = {"dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge"}


def main() -> None:
    draw = torch.Generator().manual_seed(1)
    pairs = []
    for lengths, scale in zip(LENGTHS, SCALES):
        pair = {"logp": [], "reference": []}
        for n in lengths:
            reference = -torch.rand(n, generator=draw) * 5 - 0.01
            logp = (reference + scale * torch.randn(n, generator=draw)).clamp(max=-0.001)
            for name, values in (("reference", reference), ("logp", logp)):
                pair[name].append([round(x, 4) for x in values.tolist()])
        pairs.append(pair)
    rows = []
    for pair in pairs:
        sums = {name: [sum(side) for side in pair[name]] for name in pair}
        n = [len(side) for side in pair["logp"]]
        rows.append(sums | {"n": n, "found": figures(pair)})
    print(json.dumps({"trl": trl.__version__, "pairs": rows}, indent=1))


if __name__ == "__main__":
    main()
