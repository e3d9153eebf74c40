"""The reference's log-probabilities, and the evaluation of preferences."""

from __future__ import annotations


class Reference:
    """Of all the pairs of a run.

    data: lumen.data.Data, opened for pairs; base: {base_sha256, quantize_base, compute_dtype,
    template}, what else they depend on; say: one line to the console."""

    def __init__(self, data, base: dict, out_dir, say=print):
        raise NotImplementedError

    def load_or_compute(self, model, parallel, batch_size: int, known=None, off=None) -> dict:
        """Sets `reference` of every source; returns {source: key} for state.json.

        known: that of the checkpoint that is resumed (None: none is); off: what gives a context in
        which the model is the base, lora.off for example; None: the model is the base where
        nothing is known, and else nothing can be computed. E312."""
        raise NotImplementedError

    def check_start(self, model, cfg, parallel, batch_size: int) -> str:
        """A line: loss (ln 2) and margin (0) of the first rows. E312 where they are not."""
        raise NotImplementedError


def evaluate(model, cfg, rows, sources, parallel, batch_size: int, stop=None):
    """As evaluate.evaluate_loss: an object with loss, batch_losses, row(), beside(other)."""
    raise NotImplementedError
