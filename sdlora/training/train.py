"""The two ways into a run: `train` starts one, `resume` goes on with one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from sdlora.config import RunConfig, load_config
from sdlora.errors import ConfigError
from sdlora.models.dtypes import Precision
from sdlora.models.load import attention_kernel
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder, next_free_folder
from sdlora.training.device import describe_environment, find_machine, make_accelerator, start_trackers
from sdlora.training.distributed import (
    all_reduce_count,
    barrier,
    broadcast,
    num_launched,
    propagate_failure,
)
from sdlora.training.finish import finish, report_failed_start, report_failure
from sdlora.training.loop import Trainer
from sdlora.training.plan import RunPlan, check_disk, make_plan
from sdlora.training.plan_summary import print_plan
from sdlora.training.prepare import prepare, warn_if_prediction_differs
from sdlora.training.resume import (
    Change,
    apply_overrides,
    check_same_plan,
    check_state,
    global_batch_of,
    newest_complete_step,
)


def train(
    images: str | Path,
    *,
    base: str | Path | None = None,
    out: str | Path | None = None,
    trigger: str | None = None,
    parent: str | Path | RunFolder | None = None,
    config: str | Path | RunConfig | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    dry_run: bool = False,
    quiet: bool = False,
) -> RunFolder:
    """Trains a style LoRA on an image folder.

    Args:
        images: The folder; captions are found beside the images.
        base: `builtin`, a diffusers folder, a `.safetensors` file or a hub id; `builtin` if none is given.
        out: The run folder; `runs/NAME` after the image folder if not given.
        trigger: Words that call the style; placed in captions that lack them.
        parent: A LoRA file, run or node that the new adapter is trained on top of, with all it stands on.
        config: A TOML file that says what differs from the defaults, or a whole configuration.
        overrides: `section.key=value` texts, or a mapping from `section.key` to values.
        dry_run: Prints the plan and stops before weights are loaded; writes nothing.
        quiet: Prints nothing.

    Returns:
        The run folder; `run.adapter` is the final file.

    Raises:
        SdloraError: One line (or a line for each mistake) that says what to do.
    """
    direct: dict[str, dict[str, Any]] = {
        "base": {"source": base},
        "data": {"trigger": trigger},
        "lora": {"parent": parent},
    }
    given = {name: values for name, values in direct.items() if None not in values.values()}
    settings = load_config(config, overrides, images=images).replace(**given)
    accelerator, precision, terminal = _start(settings, quiet)
    with propagate_failure(accelerator):
        run = _choose_folder(images, out, accelerator)
        plan = make_plan(settings, accelerator.num_processes, find_machine(accelerator, precision))
        print_plan(plan, terminal, is_default_base=base is None and settings.base.source == "builtin")
        check_same_plan(accelerator, plan)
        check_disk(plan, run.path)
        if dry_run:
            terminal.print("dry run: nothing was loaded, nothing was written")
            return run
        environment = describe_environment(accelerator, precision, base_quantize=settings.base.quantize)
        if accelerator.is_main_process:
            RunFolder.create(run.path, with_absolute_paths(plan.config), environment)
            run.append("plan", 0, **plan.as_event())
            for finding in plan.findings:
                if finding.severity == "warning":
                    run.append("warning", 0, message=finding.message)
        barrier(accelerator)
        return _run(run, plan, accelerator, precision, terminal)


def resume(
    run_folder: str | Path | RunFolder,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    allow_changed: Collection[str] = (),
    quiet: bool = False,
) -> RunFolder:
    """Goes on with a run from its newest complete checkpoint, as if it had never stopped.

    Args:
        run_folder: The run.
        overrides: Only what may change: steps, cadence, trackers, and batch_size with accumulate
            (their product is kept).
        allow_changed: What else may be another than in the checkpoint, such as `dataset` or
            `train.learning_rate`.
        quiet: Prints nothing.

    Raises:
        SdloraError: If the folder holds no run, or something else was asked to change.
    """
    run = RunFolder.open(run_folder)
    settings = run.read_config()
    changed = apply_overrides(
        settings,
        overrides,
        global_batch=global_batch_of(run, settings),
        num_processes=num_launched(os.environ),
        allowed=allow_changed,
    )
    accelerator, precision, terminal = _start(changed, quiet)
    with propagate_failure(accelerator):
        steps = changed.train.steps or 0
        is_finished = accelerator.is_main_process and run.is_finished(steps)
        if all_reduce_count(accelerator, is_finished):
            last = max((event["step"] for event in run.events("done")), default=steps)
            terminal.print(
                f"{run.path} is finished at step {last}: {run.adapter}; to continue, set a larger train.steps"
            )
            return run
        step = all_reduce_count(
            accelerator, newest_complete_step(run, terminal) if accelerator.is_main_process else 0
        )
        if step:
            # A checkpoint holds what was taken over from that file, which may be gone.
            changed = changed.replace(lora={"init_from": None})
        plan = make_plan(changed, accelerator.num_processes, find_machine(accelerator, precision))
        check_same_plan(accelerator, plan)
        changes = check_state(run, step, plan, precision, allow_changed) if step else []
        if step > plan.steps:
            raise ConfigError(
                f"train.steps = {plan.steps} but {run.path} is at step {step} already; give a larger one"
            )
        check_disk(plan, run.path, step)
        nothing = f"{run.path} has no complete checkpoint: starting at step 0"
        terminal.print(f"resuming from step {step}" if step else nothing)
        return _run(
            run, plan, accelerator, precision, terminal, Resumption(step, changes, settings.lora.init_from)
        )


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on, what was allowed to change, and where the run started from."""

    step: int
    changes: Sequence[Change]
    init_from: str | None

    def bring_back(self, run: RunFolder, plan: RunPlan) -> None:
        """Brings a run folder back to the step: what came after it will happen again."""
        run.remove_leftovers()
        run.remove_checkpoints(plan.config.train.keep_checkpoints, last=self.step)
        config = plan.config.replace(lora={"init_from": self.init_from})
        run.write_config(with_absolute_paths(config))
        run.cut_events(self.step)
        if not any(run.events("plan")):
            run.append("plan", 0, **plan.as_event())
        for change in self.changes:
            run.append("changed", self.step, field=change.field, before=change.before, now=change.now)


def with_absolute_paths(settings: RunConfig) -> RunConfig:
    """The configuration as a run keeps it: it can be resumed and sampled from anywhere."""

    def resolve(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and path != "builtin" and Path(path).exists() else path

    heldout = settings.data.heldout
    if isinstance(heldout, str) and heldout != "auto" and not (Path(settings.images) / heldout).is_dir():
        heldout = resolve(heldout) or heldout
    return settings.replace(
        base={"source": resolve(settings.base.source), "vae": resolve(settings.base.vae)},
        data={"heldout": heldout},
        lora={"init_from": resolve(settings.lora.init_from)},
    ).model_copy(update={"images": resolve(settings.images)})


def _choose_folder(images: str | Path, out: str | Path | None, accelerator: Accelerator) -> RunFolder:
    """The run folder: the main process chooses and checks it, before it or another one writes."""
    path = ""
    if accelerator.is_main_process:
        name = Path(os.path.realpath(images)).name
        free = next_free_folder(Path("runs") / name) if out is None else Path(out)
        RunFolder(free).check_free()
        RunFolder(free).check_writable()
        path = str(free)
    return RunFolder(broadcast(accelerator, path))


def _start(settings: RunConfig, quiet: bool) -> tuple[Accelerator, Precision, Terminal]:
    accelerator, precision = make_accelerator(settings)
    terminal = Terminal(quiet=quiet or not accelerator.is_main_process)
    few_bits = "" if settings.base.quantize == "none" else f" with {settings.base.quantize} layers"
    processes = f" in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    terminal.print(
        f"device    {accelerator.device.type}{processes}, compute {precision.compute}, "
        f"base stored in {precision.base}{few_bits}, adapter fp32"
    )
    return accelerator, precision, terminal


def _run(
    run: RunFolder,
    plan: RunPlan,
    accelerator: Accelerator,
    precision: Precision,
    terminal: Terminal,
    resumption: Resumption | None = None,
) -> RunFolder:
    set_seed(plan.config.train.seed)
    with report_failed_start(plan, run):
        prepared = prepare(plan, accelerator, precision, terminal)
    kernel, dtypes = attention_kernel(prepared.base.unet), prepared.base.dtypes
    autocast = "on" if precision.compute != precision.base else "off"
    terminal.print(
        f"attention {kernel}; UNet {dtypes['unet']}, VAE {dtypes['vae']}, "
        f"text encoder {dtypes['text_encoder']}, autocast {autocast}"
    )
    if plan.config.train.trackers:
        start_trackers(accelerator, run.path, flat_settings(plan.config))
    trainer = Trainer(run, plan, prepared, accelerator, precision, terminal)
    if resumption is not None:
        if resumption.step:
            trainer.resume(resumption.step)
        if accelerator.is_main_process:
            resumption.bring_back(run, plan)
    trainer.event("prepared", attention=kernel, dtypes={**dtypes, "adapter": "float32"}, autocast=autocast)
    if trainer.step == 0 and (doubt := warn_if_prediction_differs(plan, prepared)):
        trainer.warn(doubt)
    with report_failure(trainer):
        if plan.config.train.batch_size == "auto":
            trainer.fit_batch()
            if accelerator.is_main_process:
                run.write_config(with_absolute_paths(trainer.plan.config))
        trainer.train()
        finish(trainer)
    return run


def flat_settings(settings: RunConfig) -> dict[str, str]:
    """Every setting by its `section.key`, as text."""
    return {
        f"{section}.{key}": str(value)
        for section, keys in settings.model_dump(mode="json").items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
