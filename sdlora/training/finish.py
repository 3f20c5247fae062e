"""The end of a run: export, postflight, model card and loss curve; and errors that end it early."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from sdlora.data.doctor import Checkup, summarise
from sdlora.data.records import count_of
from sdlora.errors import DataError, ProcessLost, RunError, RunStopped, SdloraError, first_line, one_line
from sdlora.evaluation.page import write_report
from sdlora.export.export import export_adapter
from sdlora.export.metadata import run_metadata
from sdlora.export.model_card import write_model_card
from sdlora.export.postflight import postflight
from sdlora.export.webui import write_webui_files
from sdlora.memory.estimate import as_size
from sdlora.memory.work import as_time, describe_times
from sdlora.report.plots import draw_loss_curve
from sdlora.report.summary import describe_losses, doubt_losses
from sdlora.runs import RunFolder
from sdlora.training.checkpoint import training_metadata
from sdlora.training.device import as_out_of_memory
from sdlora.training.distributed import barrier
from sdlora.training.loop import Trainer
from sdlora.training.plan import RunPlan
from sdlora.writing import write_file


def finish(trainer: Trainer) -> None:
    """Exports every dialect, proves that diffusers loads each file, and prints what was learned.

    Raises an AdapterError if a file has another effect in diffusers than was trained: the run is not done.
    """
    if trainer.accelerator.is_main_process:
        run, terminal, counters = trainer.run, trainer.terminal, trainer.counters
        with trainer.prepared.watch.stage("postflight"), trainer.runner.inference_weights():
            export_final(trainer)
        draw_loss_curve(run)
        terminal.print(*describe_losses(run))
        times = count_seen(trainer.plan)
        terminal.print(f"seen      {describe_seen(times)}")
        trainer.event("seen", images=dict(times.most_common(MAX_SEEN)))
        if counters.skipped:
            terminal.print(f"skipped   {counters.skipped} of {trainer.plan.steps} steps were not finite")
        if doubt := doubt_losses(run):
            terminal.warn(doubt)
        record_usage(trainer)
        trainer.event("done", loss_ema=counters.loss_ema, skipped=counters.skipped, doubt=doubt)
        _report(trainer)
    barrier(trainer.accelerator)


def record_usage(trainer: Trainer) -> None:
    """Prints memory and time of the run beside what was planned, and keeps its speed for the next plan."""
    plan, watch = trainer.plan, trainer.prepared.watch
    peaks = {stage: watch.of(stage) for stage in watch.stages}
    peaks["training"] = max(peaks.get("training", 0), peaks.pop("validation", 0))
    peak, highest = max((size, stage) for stage, size in peaks.items())
    # On a GPU, what libraries take is not among the tensors that are measured.
    beside = 0 if plan.device_info.device.type == "cuda" else plan.memory.baseline
    planned = {stage: size + beside for stage, size in plan.memory.stages.items()}
    seconds = {stage: round(usage.seconds, 1) for stage, usage in watch.stages.items()}
    whole = watch.total_seconds
    stages = f": {describe_times(seconds)}".rstrip(": ")
    ahead = f"; planned {as_time(sum(plan.seconds.values()))}" if plan.seconds else ""
    trainer.terminal.print(
        f"memory    at most {as_size(peak)}, in {highest}; planned {as_size(max(planned.values()))}",
        f"time      {as_time(whole)}{stages}{ahead}",
    )
    resident = {stage: usage.resident for stage, usage in watch.stages.items()}
    trainer.event(
        "usage",
        peak=peak,
        stages=peaks,
        planned=planned,
        resident=resident,
        seconds={**seconds, "whole": round(whole, 1)},
    )
    trainer.pace.keep(plan.speed_key, plan.work_left(plan.steps, plan.steps + 1))


def count_seen(plan: RunPlan) -> Counter[str]:
    """How often a run saw each image, by name."""
    times = Counter(dict.fromkeys((record.name for record in plan.index.records), 0))
    for step in range(plan.steps):
        times.update(sample.record.name for sample in plan.order.step(step))
    return times


def describe_seen(times: Counter[str]) -> str:
    """How often images were seen; many different numbers as a range."""
    counts = sorted(Counter(times.values()).items())
    if len(counts) > 4:
        return f"{count_of(len(times), 'image')} {counts[0][0]} to {counts[-1][0]} times"
    return ", ".join(f"{count_of(images, 'image')} {count_of(number, 'time')}" for number, images in counts)


def _report(trainer: Trainer) -> None:
    """Writes `report.html`; no failure of it is one of the run."""
    plan = trainer.plan
    try:
        summary = summarise(plan.index, plan.buckets, None)
        checkup = Checkup(plan.index, plan.buckets, summary, plan.findings)
        write_report(trainer.run, checkup=checkup)
    except Exception as error:
        trainer.warn(f"cannot write the report: {one_line(str(error))}; `sdlora report {trainer.run.path}`")


def finish_killed(run: RunFolder) -> None:
    """Does what a process that was killed after the last event of a run has left undone."""
    if run.is_written:
        return
    run.remove_leftovers()
    run.process_file.unlink(missing_ok=True)
    if not run.report.is_file():
        with suppress(Exception):  # as in a run, a report is not worth a failure
            write_report(run.path)


def export_final(trainer: Trainer) -> None:
    """Writes `final.*` and the model card, and proves that the files load."""
    run, plan, adapter = trainer.run, trainer.plan, trainer.runner.adapter
    facts = training_metadata(run, plan, trainer.counters)
    metadata, precision = run_metadata(facts), plan.config.export.precision
    paths = []
    for dialect in dict.fromkeys(plan.config.export.formats):
        path = run.final_adapter(dialect)
        exported = export_adapter(adapter, path, dialect=dialect, precision=precision, metadata=metadata)
        paths.append(path)
        trainer.terminal.print(f"export    {exported}", *exported.lines()[1:])
        trainer.event("exported", path=str(path.relative_to(run.path)), precision=exported.precision)
    for proof in postflight(paths, adapter, trainer.prepared.base.components, plan.info):
        trainer.terminal.print(f"postflight {proof}")
    trainer.event("postflight", files=[path.name for path in paths])
    grids = sorted(run.samples.glob("step-*/grid.png"))
    if grids:
        write_file(run.adapters / "grid.png", lambda file: shutil.copyfile(grids[-1], file))
    grid, prompts = "grid.png" if grids else None, plan.config.sample.prompts
    write_model_card(run.model_card, facts, prompts=prompts, grid=grid, weights=run.adapter.name)
    # alone, a child has another effect than in the run
    if "kohya" in plan.config.export.formats and not plan.config.lora.parent:
        version, strengths = plan.info.traits.kohya_version, plan.config.sample.strengths
        skip = plan.config.data.clip_skip
        about = f"trained with Clip skip {skip}; set it in the settings" if skip > 1 else ""
        write_webui_files(
            run, version, strengths, plan.config.data.trigger, about=about, name=plan.config.export.name
        )


# Of the images whose number is in the event.
MAX_SEEN = 10_000
OUT_OF_MEMORY_REMEDIES = (
    "resume with train.gradient_checkpointing=true or a smaller train.batch_size (the global batch is kept), "
    "or start a new run with base.quantize=int8 (but for DoRA), a smaller data.resolution or lora.rank"
)


@contextmanager
def report_failed_start(plan: RunPlan, run: RunFolder) -> Iterator[None]:
    """Explains an out-of-memory error before the first step."""
    try:
        with as_out_of_memory():
            yield
    except torch.OutOfMemoryError as error:
        size, device = as_size(plan.memory.stages["encoding"]), plan.device_info.device.type
        problem = f"out of memory while loading the base and encoding the images ({device}, about {size})"
        remedy = "start a new run with base.quantize=int8 (but for DoRA) or a smaller data.resolution"
        retry = f"free some memory and run `sdlora resume {run.path}`"
        raise RunError(f"{problem}; {retry}, or {remedy}", key="out-of-memory", exit_code=1) from error


@contextmanager
def report_failure(trainer: Trainer) -> Iterator[None]:
    """Explains an error that ends a run, with how to continue, adds its event, and closes the trackers."""
    try:
        with as_out_of_memory():
            yield
    except RunStopped:
        raise
    except (SdloraError, OSError, torch.OutOfMemoryError) as error:
        failure = _explain(error, trainer)
        trainer.event("failed", message=str(failure))
        # A launcher ends this process soon after one that was lost: the message must come first.
        if trainer.accelerator.is_main_process and not isinstance(error, ProcessLost):
            with suppress(OSError):
                draw_loss_curve(trainer.run)
        if failure is error:
            raise
        raise failure from error
    except Exception as error:  # a mistake of a program, perhaps of the optimizer's
        trainer.event("failed", message=f"{type(error).__name__}: {first_line(error)}")
        raise
    finally:
        trainer.logger.finish_trackers(trainer.step)


def _explain(error: SdloraError | OSError | torch.OutOfMemoryError, trainer: Trainer) -> SdloraError:
    hint = trainer.resume_hint()
    if isinstance(error, torch.OutOfMemoryError):
        images = count_of(trainer.plan.config.train.micro_batch, "image")
        size = trainer.plan.memory_inputs.size
        problem = f"out of memory in step {trainer.step + 1}, with {images} of up to {size} at once"
        return RunError(f"{problem}; {OUT_OF_MEMORY_REMEDIES}; {hint}", key="out-of-memory", exit_code=1)
    if isinstance(error, ProcessLost):
        return ProcessLost(f"{error}; {hint}", error.exit_code, is_explained=error.is_explained)
    if isinstance(error, DataError):
        return DataError(f"{error}; {hint}", key=next(iter(error.keys), ""))
    if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
        return RunError(f"{error}; then {hint}", key="write-failed", exit_code=1)
    return error
