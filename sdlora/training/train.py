"""The two ways into a run: `train` starts one, `resume` goes on with one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from sdlora.config import RunConfig, load_config
from sdlora.errors import ConfigError, TrainingDiverged
from sdlora.models.load import attention_kernel
from sdlora.runs import RunFolder, next_free_folder
from sdlora.training.console import Report
from sdlora.training.device import Precision, describe_environment, make_accelerator
from sdlora.training.finish import finish
from sdlora.training.loop import Trainer
from sdlora.training.plan import RunPlan, check_disk, make_plan
from sdlora.training.prepare import prepare

RESUMABLE = {
    "train.steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.evaluate_every",
    "train.trackers",
    "train.batch_size",
    "train.accumulate",
    "sample.batch_size",
}


def train(
    images: str | Path,
    *,
    base: str | None = None,
    out: str | Path | None = None,
    trigger: str | None = None,
    config: str | Path | RunConfig | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    dry_run: bool = False,
    quiet: bool = False,
) -> RunFolder:
    """Trains a style LoRA on an image folder.

    Args:
        images: The folder; captions are found beside the pictures.
        base: `builtin`, a diffusers folder, a `.safetensors` file or a hub id; `builtin` if none is given.
        out: The run folder; `runs/NAME` after the image folder if not given.
        trigger: Words that call the style; placed in captions that lack them.
        config: A TOML file that says what differs from the defaults, or a whole configuration.
        overrides: `section.key=value` texts, or a mapping from `section.key` to values.
        dry_run: Prints the plan and stops before weights are loaded; writes nothing.
        quiet: Prints nothing.

    Returns:
        The run folder; `run.adapter` is the final file.

    Raises:
        SdloraError: One line (or a line for each mistake) that says what to do.
    """
    settings = config if isinstance(config, RunConfig) else load_config(config, overrides, images=images)
    direct = {"base": {"source": base}, "data": {"trigger": trigger}}
    given = {name: values for name, values in direct.items() if None not in values.values()}
    settings = settings.replace(**given).model_copy(update={"images": str(images)})
    run = (
        RunFolder(out)
        if out is not None
        else RunFolder(next_free_folder(Path("runs") / Path(images).resolve().name))
    )
    run.check_free()
    run.check_writable()
    accelerator, precision, report = _start(settings, run, quiet)
    plan = make_plan(settings, accelerator.num_processes)
    _announce(plan, report, is_default_base=base is None and settings.base.source == "builtin")
    check_disk(plan, run.path)
    if dry_run:
        report.say("dry run: nothing was loaded, nothing was written")
        return run
    environment = describe_environment(accelerator, precision)
    if accelerator.is_main_process:
        RunFolder.create(run.path, with_absolute_paths(plan.config), environment)
        run.append("plan", 0, **plan.as_event())
        for finding in plan.findings:
            if finding.severity == "warning":
                run.append("warning", 0, message=finding.message)
    accelerator.wait_for_everyone()
    return _run(run, plan, accelerator, precision, report)


def resume(
    run_folder: str | Path, overrides: Iterable[str] | Mapping[str, Any] = (), *, quiet: bool = False
) -> RunFolder:
    """Goes on with a run from its newest complete checkpoint, as if it had never stopped.

    Args:
        run_folder: The run.
        overrides: Only what may change: steps, cadence, trackers, and batch_size with accumulate
            (their product is kept).
        quiet: Prints nothing.

    Raises:
        SdloraError: If the folder holds no run, or something else was asked to change.
    """
    run = RunFolder.open(run_folder)
    settings = run.read_config()
    changed = _apply(settings, overrides)
    accelerator, precision, report = _start(changed, run, quiet)
    steps = changed.train.steps or 0
    if run.is_finished(steps):
        report.say(f"{run.path} is finished at step {steps}: {run.adapter}; a larger train.steps goes on")
        return run
    plan = make_plan(changed, accelerator.num_processes)
    check_disk(plan, run.path)
    return _run(run, plan, accelerator, precision, report, resuming=True)


def with_absolute_paths(settings: RunConfig) -> RunConfig:
    """The configuration as a run keeps it: it can be resumed and sampled from anywhere."""

    def resolve(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and path != "builtin" and Path(path).exists() else path

    base = {"source": resolve(settings.base.source), "vae": resolve(settings.base.vae)}
    changed = settings.replace(base=base, lora={"init_from": resolve(settings.lora.init_from)})
    return changed.model_copy(update={"images": resolve(settings.images)})


def _start(settings: RunConfig, run: RunFolder, quiet: bool) -> tuple[Accelerator, Precision, Report]:
    accelerator, precision = make_accelerator(settings, str(run.path))
    report = Report(quiet=quiet or not accelerator.is_main_process)
    report.say(
        f"device    {accelerator.device}, compute {precision.compute}, base stored in {precision.base}, "
        "adapter fp32"
    )
    return accelerator, precision, report


def _announce(plan: RunPlan, report: Report, *, is_default_base: bool) -> None:
    if is_default_base:
        report.say("no --base was given: training on the built-in base (128 px; give --base for a real one)")
    report.say(*plan.lines())
    for finding in plan.findings:
        if finding.severity == "warning":
            report.warn(finding.message)
        else:
            report.say(f"note: {finding.message}")


def _apply(settings: RunConfig, overrides: Iterable[str] | Mapping[str, Any]) -> RunConfig:
    """The run's settings with what may change, changed.

    Raises:
        ConfigError: Naming what may not.
    """
    pairs = overrides if isinstance(overrides, Mapping) else list(overrides)
    keys = pairs if isinstance(pairs, Mapping) else [text.partition("=")[0].strip() for text in pairs]
    fixed = [key for key in keys if key not in RESUMABLE]
    asked = load_config(None, pairs)
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} cannot change in a resumed run; only {', '.join(sorted(RESUMABLE))} can"
        )
    changes: dict[str, dict[str, Any]] = {}
    for key in keys:
        section, name = key.split(".")
        changes.setdefault(section, {})[name] = getattr(getattr(asked, section), name)
    changed = settings.replace(**changes)
    before = (settings.train.batch_size or 1) * settings.train.accumulate
    after = (changed.train.batch_size or 1) * changed.train.accumulate
    if before != after:
        raise ConfigError(
            f"train.batch_size x train.accumulate = {after} but the run has {before}; "
            "keep their product, or start a new run"
        )
    return changed


def _run(
    run: RunFolder,
    plan: RunPlan,
    accelerator: Accelerator,
    precision: Precision,
    report: Report,
    *,
    resuming: bool = False,
) -> RunFolder:
    set_seed(plan.config.train.seed)
    prepared = prepare(plan, accelerator, precision, report)
    kernel, dtypes = attention_kernel(prepared.base.unet), prepared.base.dtypes
    autocast = "on" if precision.compute != precision.base else "off"
    report.say(
        f"attention {kernel}; UNet {dtypes['unet']}, VAE {dtypes['vae']}, "
        f"text encoder {dtypes['text_encoder']}, autocast {autocast}"
    )
    if plan.config.train.trackers:
        _start_trackers(accelerator, plan)
    trainer = Trainer(run, plan, prepared, accelerator, precision, report)
    if resuming:
        trainer.resume()
        if trainer.step > plan.steps:
            raise ConfigError(
                f"train.steps = {plan.steps} but {run.path} is at step {trainer.step} already; "
                "give a larger one"
            )
        if accelerator.is_main_process:
            run.write_config(plan.config)
            run.cut_events(trainer.step)
    trainer.event("prepared", attention=kernel, dtypes={**dtypes, "adapter": "float32"}, autocast=autocast)
    try:
        trainer.train()
    except TrainingDiverged as error:
        trainer.event("failed", message=str(error))
        raise
    finally:
        accelerator.end_training()
    finish(trainer)
    return run


def _start_trackers(accelerator: Accelerator, plan: RunPlan) -> None:
    values = plan.config.model_dump(mode="json")
    flat = {
        f"{section}.{key}": str(value)
        for section, keys in values.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
    accelerator.init_trackers("sdlora", config=flat)
