"""What a Trainer does once: before its first step, and after its last."""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from lumen import files, fp8, heap, lines
from lumen import machine as machines
from lumen.differences import differences, versions
from lumen.errors import UserError
from lumen.probe import largest_batch
from lumen.resolve import Findings, Run, gather_facts, resolve_on_all, with_rate
from lumen.resume import take_weights
from lumen.schedule import enough_steps


def take_vocabulary(trainer) -> None:
    """The data say what the model's vocabulary is, and whether documents see each other. E114:
    early_stopping_patience without validation data; E501: evaluate.tasks without a tokenizer."""
    cfg, data = trainer.cfg, trainer.data
    trainer.token_bytes = data.token_bytes()
    model = dataclasses.replace(cfg.model, vocab_size=data.vocab_size)
    masked = cfg.document_mask if data.document_mask is None else data.document_mask
    trainer.cfg = dataclasses.replace(cfg, model=model, document_mask=masked)
    if cfg.early_stopping_patience and not data.val_sources:
        text = f"early_stopping_patience: {cfg.early_stopping_patience} stops by evaluations"
        raise UserError("E114", f"{text}; {lines.no_validation(cfg)}")
    trainer.in_training.open()


def resolve(trainer, saved) -> None:
    """run: what auto and null become, as rank 0 finds it; and what else comes to light.

    saved: the checkpoint that it goes on from, or None.
    """
    t, cfg, par = trainer, trainer.cfg, trainer.parallel
    state = saved.state if saved else None
    # with overwrite what an earlier run has left is about to be deleted
    hints = None if cfg.overwrite and t.start.anew else t.out
    facts = gather_facts(cfg, t.written, t.data, par, hints)
    t.counted = facts.model  # the model's shapes, without weights
    t.flops_per_token = t.counted.flops_per_token()
    found = t.found = Findings(t.start.changes)
    if t.fine_tunes:
        cfg = enough_steps(cfg, facts, state, found)
    t.run = resolve_on_all(cfg, facts, state, found, par)
    cfg = t.cfg = with_rate(cfg, t.run)
    t.machine = found.machine
    par.run_or_raise_on_all(fp8.check, t.counted, t.run.precision, par.device)
    t.versions = versions(t.machine, par.world)
    if saved:
        found.changes += differences(cfg, t.run, t.versions, state, saved.step)


def use_deterministic(wanted: bool) -> None:
    """Both are set whatever they were: this may be a process's second run."""
    torch.use_deterministic_algorithms(wanted)
    # a debugging aid that costs a pass over memory
    torch.utils.deterministic.fill_uninitialized_memory = False


def prepare_model(model, cfg, run: Run, compute_dtype: torch.dtype) -> None:
    """What a model is told beside its ModelConfig; and its blocks are compiled. A CPU's malloc is
    told to keep what each step asks for anew."""
    if run.device == "cpu":
        heap.keep_pages(machines.own_memory("cpu"))
    model.compute_dtype = compute_dtype
    model.z_loss = cfg.z_loss
    model.fused_loss = run.loss == "fused"
    model.skip_masked = run.device == "cpu"
    model.backend = run.attention
    model.recompute = cfg.activation_checkpointing
    for moe in model.sparse_layers("moe").values():
        moe.backend = run.expert_backend
    fp8.convert(model, run.precision)
    if run.compile_model:
        # dense, MoE and MoD blocks, each while training and evaluating
        torch.compiler.config.recompile_limit = 64
        # one graph serves all layers: fast to compile, and nothing else gains by it
        for block in model.blocks:
            block.compile()


def fill(trainer, saved, weights: tuple | None) -> None:
    """Model and optimizer from the checkpoint `saved`, or the model from the `weights` that
    find_weights found; with neither the initial weights stay."""
    if saved is not None:
        trainer.parallel.run_or_raise_on_all(trainer.state.load, saved)
    elif weights is not None:
        trainer.parallel.run_or_raise_on_all(take_initial, trainer, *weights)
        trainer.say(f"weights    from {trainer.cfg.init_from}")


def take_initial(trainer, model, weights) -> None:
    """The weights of `model` that init_from names; see resume.take_weights."""
    cfg = trainer.cfg
    slots = [m.n_experts_max or m.n_experts for m in (cfg.model, model)]
    args = (model, slots[0] - slots[1], trainer.tensors(), trainer.parallel)
    take_weights(f"init_from {cfg.init_from}", weights, *args)
    if cfg.model.n_experts_max:
        for moe in trainer.moe.values():
            moe.router.retired.fill_(-1)  # the steps of another run


def probe(trainer) -> None:
    """batch_size: auto on CUDA: what really fits takes the place of what was estimated."""
    t = trainer
    rows = t.run.rows_per_step // t.parallel.rows()[1]
    best, found = largest_batch(t, rows)
    t.run = dataclasses.replace(t.run, micro_batch=best, accumulation=rows // best)
    t.say(f"batch_size {best} rows a micro-step, by a probe: {found}")


def open_run_files(trainer) -> None:
    """Rank 0, whose out_dir is now: what stands in it beside checkpoints. E300, E003."""
    t, report, progress = trainer, trainer.report, trainer.progress
    if not t.main:
        return
    try:
        report.open(lines.config_yaml(t.cfg, t.run), t.data.tokenizer_dir)
        report.copy_tokenizer(t.data.tokenizer_sum, t.start.tokenizer)
    except OSError as error:
        raise UserError("E300", f"out_dir {t.out} cannot be written: {error}") from error
    if t.step:  # a process that was killed may have saved and not yet said so
        best = {"step": progress.best_step, "val_loss": progress.best_val_loss}
        with contextlib.suppress(OSError):
            if progress.best_step is None:  # the one it names is of another validation set
                (t.out / "best.json").unlink(missing_ok=True)
            else:
                files.write_json(t.out / "best.json", best)
    t.write_status("running")
    report.open_charts(t.cfg)


def open_run(trainer) -> None:
    """The last before the first step: files, a number for this attempt, signals."""
    t = trainer
    t.parallel.run_or_raise_on_all(open_run_files, t)
    t.report.attempt = t.parallel.broadcast(t.report.attempt)
    t.orchestrator.begin_attempt()
    begun = f"from step {t.step}" if t.step else "new"
    t.say(f"run        {t.out}, attempt {t.report.attempt}, {begun}; details in its train.log")
    t.signals.listen()


def finish(trainer, state: str, code: int) -> None:
    """The last words: a sample, the status, everything closed."""
    trainer.report.close_bar()
    if state == "finished" and trainer.cfg.sample_prompt is not None:
        if trainer.main or not trainer.parallel.collective_free:
            with trainer.report.optional("sample"):
                how = (trainer.cfg.sample_prompt, trainer.cfg.seed)
                trainer.report.print_sample(trainer.model, trainer.parallel, *how)
    reason = trainer.tell.end(state, code)
    if state == "finished" and trainer.main and not trainer.fine_tunes:
        with trainer.report.optional("suggested.yaml"):
            trainer.tell.suggest()
    trainer.write_status(state, code, reason)
    trainer.close()
    if state == "finished" and trainer.saver.backup:  # nobody waits for rank 0 any more
        with trainer.report.optional("backup"):
            trainer.saver.backup.finish()


def nothing_left(trainer) -> int:
    """The run was finished before it began; the exit code."""
    done = f"{trainer.out} is finished at step {trainer.step}"
    trainer.say(f"{done}; a larger max_steps goes on, another out_dir begins anew")
    trainer.write_status("finished")
    trainer.close()
    return 0
