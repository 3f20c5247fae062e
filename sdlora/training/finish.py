"""The end of a run: files for other programs, the proof that they load, the card, the loss curve."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import torch

from sdlora.evaluation.gap import measure_gap
from sdlora.export import export_adapter
from sdlora.lora.card import write_model_card
from sdlora.lora.metadata import run_metadata
from sdlora.postflight import postflight
from sdlora.report.course import describe_losses, doubt_losses
from sdlora.report.curve import draw_loss_curve
from sdlora.training.facts import describe_run
from sdlora.training.loop import Trainer
from sdlora.training.processes import meet
from sdlora.writing import write_file


def finish(trainer: Trainer) -> None:
    """Exports every dialect, loads each file back, and says what was learnt.

    Raises:
        AdapterError: If a file does not do in a fresh pipeline what was trained; the run is not done.
    """
    if trainer.accelerator.is_main_process:
        with trainer.learner.averaged():
            export_final(trainer)
            if trainer.plan.info.quantize != "none":
                tell_gap(trainer)
        draw_loss_curve(trainer.run)
        trainer.report.say(*describe_losses(trainer.run))
        if trainer.counters.skipped:
            trainer.report.say(
                f"skipped   {trainer.counters.skipped} of {trainer.plan.steps} steps were not finite"
            )
        if doubt := doubt_losses(trainer.run):
            trainer.report.warn(doubt)
        counters = trainer.counters
        trainer.event("done", loss_ema=counters.loss_ema, skipped=counters.skipped, doubt=doubt)
    meet(trainer.accelerator)


def export_final(trainer: Trainer) -> None:
    """Writes `final.*` and the card, then proves that the files load."""
    run, plan, adapter = trainer.run, trainer.plan, trainer.learner.adapter
    facts = describe_run(run, plan, step=trainer.step, images_seen=trainer.counters.images_seen)
    metadata, settings = run_metadata(facts), plan.config.export
    paths = []
    for dialect in dict.fromkeys(settings.formats):
        report = export_adapter(
            adapter,
            run.final_adapter(dialect),
            dialect=dialect,
            precision=settings.precision,
            metadata=metadata,
        )
        paths.append(report.path)
        trainer.report.say(f"export    {report}")
        trainer.event("exported", path=str(report.path.relative_to(run.path)), precision=report.precision)
    for proof in postflight(paths, adapter, trainer.prepared.base.components, plan.info):
        trainer.report.say(f"postflight {proof}")
    trainer.event("postflight", files=[path.name for path in paths])
    grids = sorted(run.samples.glob("step-*/grid.png"))
    if grids:
        write_file(run.adapters / "grid.png", lambda file: shutil.copyfile(grids[-1], file))
    write_model_card(
        run.model_card,
        facts,
        prompts=plan.config.sample.prompts,
        grid="grid.png" if grids else None,
        weights=run.adapter.name,
    )


def tell_gap(trainer: Trainer) -> None:
    """Says how the LoRA does on the full base, which is not what it was trained on (R-48)."""
    prepared = trainer.prepared
    split = "heldout" if "heldout" in prepared.splits else "train"
    stack = (*prepared.parents, (trainer.learner.adapter, 1.0))
    try:
        gap = measure_gap(prepared.base, stack, prepared.heldout_items(split), prepared.objective.schedule)
    except torch.OutOfMemoryError:
        trainer.warn("out of memory for the full base; `sdlora evaluate` measures the gap on another device")
        return
    pictures = {"train": "training", "heldout": "held-out"}[split]
    trainer.report.say(f"gap       {pictures} {gap}")
    trainer.event("gap", split=split, **asdict(gap), relative=gap.relative)
