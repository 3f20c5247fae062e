"""`train` starts a run, `resume` continues one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import set_seed

from sdlora.config import RunConfig, load_config
from sdlora.dtypes import Precision
from sdlora.errors import ConfigError
from sdlora.lora.layers import DENOISER
from sdlora.memory.cards import check_device
from sdlora.memory.monitor import StageMonitor
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training.checkpoint import newest_complete_step, read_state
from sdlora.training.device import describe_environment, find_device, imagine_device, make_accelerator
from sdlora.training.distributed import barrier, broadcast, num_launched, propagate_failure
from sdlora.training.finish import finish, finish_killed, report_failed_start, report_failure
from sdlora.training.logger import start_trackers
from sdlora.training.loop import Trainer
from sdlora.training.plan import LABEL_WIDTH, RunPlan
from sdlora.training.planning import check_disk, make_plan, print_plan
from sdlora.training.prepare import COMPILED, prepare, warn_if_prediction_differs
from sdlora.training.resume import (
    Change,
    apply_overrides,
    check_fingerprint,
    check_same_plan,
    global_batch_of,
    run_fingerprint,
    vae_of,
)
from sdlora.writing import check_writable, next_free_folder


def train(
    images: str | Path,
    *,
    base: str | Path | None = None,
    out: str | Path | None = None,
    trigger: str | None = None,
    parent: str | Path | RunFolder | None = None,
    preset: str | None = None,
    config: str | Path | RunConfig | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    dry_run: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> RunFolder:
    """Trains a style LoRA on an image folder.

    Args:
        images: The folder, with captions beside the images.
        base: `builtin` (the default), a diffusers folder, a `.safetensors` file or a hub id.
        out: The run folder; by default `runs/NAME` after the image folder, or `runs/NAME-2` if that is taken.
        trigger: Words that invoke the style; added to captions that lack them.
        parent: A LoRA file, run or node to train on top of, with its own parents.
        preset: Name of a preset to start from, such as `sd15`.
        config: A TOML file with the settings that differ from the defaults, or a whole configuration.
        overrides: `section.key=value` texts, or a mapping from `section.key` to values.
        dry_run: Print the plan, load no weights and write nothing.
        device: Plan for this GPU instead, such as `RTX 3060 12GB` or `cuda:12GB`; for a dry run.
        quiet: Print nothing.

    Returns:
        The run folder; `run.adapter` is the path of the final file.

    Raises:
        SdloraError: One line for each mistake, with the remedy.
    """
    direct = {"base.source": base, "data.trigger": trigger, "lora.parent": parent}
    settings = load_config(config, overrides, images=images, preset=preset, arguments=direct)
    is_default_base = "source" not in settings.given().get("base", {})
    if device is not None:
        check_device(device, dry_run=dry_run)
        _plan_elsewhere(settings, device, Terminal(quiet), is_default_base)
        return RunFolder(_default_folder(images) if out is None else out)
    accelerator, precision, terminal = _start(settings, quiet)
    with propagate_failure(accelerator):
        run = _choose_folder(images, out, accelerator)
        plan = make_plan(settings, accelerator.num_processes, find_device(accelerator, precision))
        print_plan(plan, terminal, is_default_base=is_default_base)
        terminal.print(f"{'run':<{LABEL_WIDTH}}{_describe_folder(run, images if out is None else None)}")
        check_same_plan(accelerator, plan)
        check_disk(plan, run.path)
        if dry_run:
            terminal.print("dry run: no weights loaded, nothing written")
            return run
        environment = describe_environment(accelerator, precision, base_quantize=settings.base.quantize)
        if accelerator.is_main_process:
            _write_plan(run, plan, environment)
        barrier(accelerator)
        return _run(run, plan, accelerator, precision, terminal)


def _write_plan(run: RunFolder, plan: RunPlan, environment: dict[str, Any]) -> None:
    """Makes the run folder, with the settings, and the plan and its warnings as first events."""
    RunFolder.create(run.path, with_absolute_paths(plan.config), environment)
    run.append("plan", 0, **plan.as_event())
    for finding in (one for one in plan.findings if one.severity == "warning"):
        run.append("warning", 0, message=finding.message)


def plan_run(settings: RunConfig, device: str | None = None) -> RunPlan:
    """The plan of a run on this machine, or on a GPU by its name, before any weights are loaded."""
    if device is not None:
        return make_plan(settings, 1, imagine_device(device, settings))
    accelerator, precision = make_accelerator(settings)
    return make_plan(settings, accelerator.num_processes, find_device(accelerator, precision))


def resume(
    run_folder: str | Path | RunFolder,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    allow_changed: Collection[str] = (),
    quiet: bool = False,
) -> RunFolder:
    """Continues a run from its newest complete checkpoint, as if it had never stopped.

    Args:
        run_folder: The run.
        overrides: Settings that may change: steps, cadence, trackers, batch_size and accumulate (the global
            batch is kept).
        allow_changed: Other fields that may change, such as `dataset` or `train.learning_rate`.
        quiet: Print nothing.

    Raises:
        SdloraError: If the folder is not a run, or another setting would change.
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
    precision = replace(precision, vae=vae_of(run))
    with propagate_failure(accelerator):
        steps = changed.train.steps or 0
        if broadcast(accelerator, accelerator.is_main_process and run.is_finished(steps)):
            return _stay_finished(run, steps, accelerator, terminal)
        if accelerator.is_main_process:
            run.check_unwritten()
        # The main process reads the checkpoints, which are large, for all.
        newest = newest_complete_step(run, terminal) if accelerator.is_main_process else 0
        step = broadcast(accelerator, newest)
        kernels: Sequence[str] | None = None
        if step:
            # The checkpoint contains what that file contributed; the file may be gone.
            changed = changed.replace(lora={"init_from": None})
        plan = make_plan(changed, accelerator.num_processes, find_device(accelerator, precision))
        check_same_plan(accelerator, plan)
        changes: list[Change] = []
        if step:
            saved, now = read_state(run.checkpoint(step))["identity"], run_fingerprint(plan, precision)
            # Checkpoints of older versions have no field for them, and were computed without any.
            used = saved.pop("kernels", [])
            changes = check_fingerprint(run, step, saved, now, allow_changed)
            kernels = _kernels_after(used, changes, allow_changed)
        if step > plan.steps:
            problem = f"train.steps = {plan.steps} but {run.path} is already at step {step}"
            raise ConfigError(f"{problem}; set a larger one")
        check_disk(plan, run.path, step)
        nothing = f"{run.path} has no complete checkpoint: starting at step 0"
        terminal.print(f"resuming from step {step}" if step else nothing)
        resumption = Resumption(step, changes, settings.lora.init_from, kernels)
        return _run(run, plan, accelerator, precision, terminal, resumption)


def _kernels_after(
    used: Sequence[str], changes: Sequence[Change], allow_changed: Collection[str]
) -> Sequence[str] | None:
    """The kernels that a resumed run takes again; None to choose."""
    if "compute" in allow_changed:
        return None
    others = [kernel for kernel in used if kernel != COMPILED]
    compiles = [change.now for change in changes if change.field == "train.compile"] or [COMPILED in used]
    return [*others, COMPILED] if compiles[0] else others


def _stay_finished(run: RunFolder, steps: int, accelerator: Accelerator, terminal: Terminal) -> RunFolder:
    """Says that a run needs no more steps."""
    if accelerator.is_main_process:
        finish_killed(run)
    last = max((event["step"] for event in run.events("done")), default=steps)
    finished = f"{run.path} is already finished at step {last}: {run.adapter}"
    terminal.print(f"{finished}; to continue, set a larger train.steps")
    return run


class Resumption(NamedTuple):
    """A resumed run."""

    step: int
    """Of its checkpoint; 0 without one."""
    changes: Sequence[Change]
    """What was allowed to change."""
    init_from: str | None
    kernels: Sequence[str] | None
    """Those to take again; None to choose."""

    def config(self, plan: RunPlan) -> RunConfig:
        """What is written to `config.json`."""
        return with_absolute_paths(plan.config.replace(lora={"init_from": self.init_from}))

    def rewind(self, run: RunFolder, plan: RunPlan) -> None:
        """Removes what later steps left in the run folder: they will be done again."""
        run.remove_leftovers()
        run.remove_checkpoints(plan.config.train.keep_checkpoints, last=self.step)
        if self.changes:
            run.remove_saved(self.step)
        run.write_config(self.config(plan))
        run.cut_events(self.step)
        if not any(run.events("plan")):
            run.append("plan", 0, **plan.as_event())
        for change in self.changes:
            run.append("changed", self.step, field=change.field, before=change.before, now=change.now)


def with_absolute_paths(settings: RunConfig) -> RunConfig:
    """The configuration with absolute paths, so that a run can be resumed and sampled from anywhere."""

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


def _plan_elsewhere(settings: RunConfig, device: str, terminal: Terminal, is_default_base: bool) -> None:
    """Prints the plan of a run on a GPU that is not here."""
    plan = plan_run(settings, device)
    assert plan.device_info.card
    terminal.print(_describe_device(plan.device_info.card.name, plan.device_info.precision, settings))
    print_plan(plan, terminal, is_default_base=is_default_base)
    terminal.print("dry run for another machine: no weights loaded, nothing written")


def _default_folder(images: str | Path) -> Path:
    return next_free_folder(_first_folder(images))


def _first_folder(images: str | Path) -> Path:
    name = Path(os.path.realpath(images)).name
    return Path("runs") / (name.removesuffix(".zip") or name)


def _describe_folder(run: RunFolder, images: str | Path | None) -> str:
    """The folder of a run, and why it is not the first one that its images give it."""
    first = run.path if images is None else _first_folder(images)
    if first == run.path:
        return str(run.path)
    resume = f"; `sdlora resume {shlex.quote(str(first))}` continues that one"
    return f"{run.path}, since {first} exists{resume if RunFolder(first).exists else ''}"


def _choose_folder(images: str | Path, out: str | Path | None, accelerator: Accelerator) -> RunFolder:
    """The run folder, chosen and checked by the main process."""
    run = RunFolder(_default_folder(images) if out is None else out)
    if os.path.realpath(run.path) == os.path.realpath(images):
        problem = f"--out {run.path} is the image folder; a run would write its own images into it"
        raise ConfigError(f"{problem}; use another folder", key="option--out.images")
    if accelerator.is_main_process:
        run.check_free()
        check_writable(run.path)
    return RunFolder(broadcast(accelerator, str(run.path)))


def _start(settings: RunConfig, quiet: bool) -> tuple[Accelerator, Precision, Terminal]:
    accelerator, precision = make_accelerator(settings)
    terminal = Terminal(quiet=quiet or not accelerator.is_main_process)
    processes = f" in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    terminal.print(_describe_device(f"{accelerator.device.type}{processes}", precision, settings))
    return accelerator, precision, terminal


def _describe_device(name: str, precision: Precision, settings: RunConfig) -> str:
    quantized = "" if settings.base.quantize == "none" else f" with {settings.base.quantize} layers"
    dtypes = f"compute {precision.compute}, base stored in {precision.base}{quantized}, adapter fp32"
    return f"device    {name}, {dtypes}"


def _run(
    run: RunFolder,
    plan: RunPlan,
    accelerator: Accelerator,
    precision: Precision,
    terminal: Terminal,
    resumption: Resumption | None = None,
) -> RunFolder:
    is_main = accelerator.is_main_process
    if is_main:
        run.check_unwritten()  # again: the plan may have taken long
    with run.occupied(is_main), terminal.keep(run.log_file if is_main else None):
        set_seed(plan.config.train.seed)
        kernels, watch = resumption.kernels if resumption else None, StageMonitor(accelerator.device)
        with report_failed_start(plan, run), watch.stage("loading"):
            prepared = prepare(plan, accelerator, precision, terminal, kernels, watch)
        attention, dtypes = prepared.base.attention_kernel, prepared.base.dtypes
        autocast = "on" if precision.compute != precision.base else "off"
        terminal.print(
            f"attention {attention}; denoiser {dtypes[DENOISER]}, VAE {dtypes['vae']}, "
            f"text encoder {dtypes['text_encoder']}, autocast {autocast}"
        )
        if plan.config.train.trackers:
            start_trackers(accelerator, run.path, plan.config)
        trainer = Trainer(run, plan, prepared, accelerator, precision, terminal)
        if resumption is not None:
            if resumption.step:
                trainer.resume(resumption.step)
            if accelerator.is_main_process:
                resumption.rewind(run, plan)
        trainer.event(
            "prepared",
            attention=attention,
            kernels=list(prepared.kernels),
            dtypes={**dtypes, "adapter": "float32"},
            autocast=autocast,
        )
        if trainer.step == 0 and (warning := warn_if_prediction_differs(plan, prepared)):
            trainer.warn(warning)
        with report_failure(trainer):
            if plan.config.train.batch_size == "auto":
                trainer.fit_batch()
                if accelerator.is_main_process:
                    fitted = trainer.plan
                    config = resumption.config(fitted) if resumption else with_absolute_paths(fitted.config)
                    run.write_config(config)
            trainer.train()
            finish(trainer)
        return run
