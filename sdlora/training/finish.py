"""The end of a run: files for other programs, the proof that they load, the card, the loss curve."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from sdlora.data.records import count_of
from sdlora.errors import DataError, ProcessLost, RunError, RunStopped, SdloraError
from sdlora.export.export import export_adapter
from sdlora.export.metadata import run_metadata
from sdlora.export.model_card import write_model_card
from sdlora.export.postflight import postflight
from sdlora.memory.estimate import as_size
from sdlora.report.plots import draw_loss_curve
from sdlora.report.summary import describe_losses, doubt_losses
from sdlora.runs import RunFolder
from sdlora.training.batch_size import as_out_of_memory, describe_remedies
from sdlora.training.distributed import barrier
from sdlora.training.loop import Trainer
from sdlora.training.metadata import training_metadata
from sdlora.training.plan import RunPlan
from sdlora.writing import write_file


def finish(trainer: Trainer) -> None:
    """Exports every dialect, proves that diffusers loads each file, and prints what was learned.

    Raises:
        AdapterError: If a file does not do in diffusers what was trained; the run is not done.
    """
    if trainer.accelerator.is_main_process:
        with trainer.runner.inference_weights():
            export_final(trainer)
        draw_loss_curve(trainer.run)
        trainer.terminal.print(*describe_losses(trainer.run))
        if trainer.counters.skipped:
            trainer.terminal.print(
                f"skipped   {trainer.counters.skipped} of {trainer.plan.steps} steps were not finite"
            )
        if doubt := doubt_losses(trainer.run):
            trainer.terminal.warn(doubt)
        counters = trainer.counters
        trainer.event("done", loss_ema=counters.loss_ema, skipped=counters.skipped, doubt=doubt)
    barrier(trainer.accelerator)


def export_final(trainer: Trainer) -> None:
    """Writes `final.*` and the card, then proves that the files load."""
    run, plan, adapter = trainer.run, trainer.plan, trainer.runner.adapter
    facts = training_metadata(run, plan, step=trainer.step, images_seen=trainer.counters.images_seen)
    metadata, settings = run_metadata(facts), plan.config.export
    paths = []
    for dialect in dict.fromkeys(settings.formats):
        exported = export_adapter(
            adapter,
            run.final_adapter(dialect),
            dialect=dialect,
            precision=settings.precision,
            metadata=metadata,
        )
        paths.append(exported.path)
        trainer.terminal.print(f"export    {exported}")
        trainer.event("exported", path=str(exported.path.relative_to(run.path)), precision=exported.precision)
    for proof in postflight(paths, adapter, trainer.prepared.base.components, plan.info):
        trainer.terminal.print(f"postflight {proof}")
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


@contextmanager
def report_failed_start(plan: RunPlan, run: RunFolder) -> Iterator[None]:
    """Running out of memory before the first step is a line with the way on."""
    try:
        with as_out_of_memory():
            yield
    except torch.OutOfMemoryError as error:
        raise _explain_no_start(plan, run) from error


@contextmanager
def report_failure(trainer: Trainer) -> Iterator[None]:
    """What ends a run that has begun is a line with the way on, and an event; its trackers are closed."""
    try:
        with as_out_of_memory():
            yield
    except RunStopped:
        raise
    except (SdloraError, OSError, torch.OutOfMemoryError) as error:
        failure = _explain(error, trainer)
        trainer.event("failed", message=str(failure))
        # A launcher ends this process right after one that was lost: what matters is that it is told.
        if trainer.accelerator.is_main_process and not isinstance(error, ProcessLost):
            with suppress(OSError):
                draw_loss_curve(trainer.run)
        if failure is error:
            raise
        raise failure from error
    finally:
        for tracker in trainer.accelerator.trackers:
            tracker.finish()


def _explain(error: SdloraError | OSError | torch.OutOfMemoryError, trainer: Trainer) -> SdloraError:
    if isinstance(error, torch.OutOfMemoryError):
        plan = trainer.plan
        advice = describe_remedies(replace(plan.work, config=plan.config), plan.machine)
        images = count_of(plan.config.train.micro_batch, "image")
        failure = RunError(
            f"out of memory in step {trainer.step + 1}, with {images} of up to {plan.work.size} at once; "
            f"{advice}; {trainer.resume_hint()}"
        )
        failure.exit_code = 1
        return failure
    if isinstance(error, ProcessLost):
        return ProcessLost(f"{error}; {trainer.resume_hint()}", error.exit_code, is_told=error.is_told)
    if isinstance(error, DataError):
        return DataError(f"{error}; {trainer.resume_hint()}")
    if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
        failure = RunError(f"{error}; then {trainer.resume_hint()}")
        failure.exit_code = 1
        return failure
    return error


def _explain_no_start(plan: RunPlan, run: RunFolder) -> RunError:
    needed = f"{as_size(plan.memory.stages['encoding'])} of {plan.machine.device.type} memory"
    failure = RunError(
        f"out of memory while the base was loaded and the images encoded, which takes about {needed}; "
        f"free some and `sdlora resume {run.path}`, or start a new run with base.quantize=int8 or a smaller "
        "data.resolution"
    )
    failure.exit_code = 1
    return failure
