"""What a checkpoint keeps of a run, and how a run goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from sdlora.config import RunConfig, load_config
from sdlora.errors import ConfigError, RunError
from sdlora.models.dtypes import Precision
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training.checkpoint import read_checkpoint, read_state, restore_optimizer, save_checkpoint
from sdlora.training.device import package_versions
from sdlora.training.distributed import all_gather
from sdlora.training.health import Counters
from sdlora.training.plan import RunPlan
from sdlora.training.step import StepRunner

TITLES = {
    "base": "the base",
    "vae": "the base's VAE",
    "text": "the base's text encoder",
    "parent": "the parent",
    "dataset": "the images or captions",
    "heldout": "the held-out images",
    "global_batch": "the global batch",
    "compute": "the precision",
    "sdlora": "the version of sdlora",
}


@dataclass(frozen=True)
class Change:
    """A field that is another now than in the checkpoint."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{TITLES.get(self.field, self.field)} changed ({_short(self.before)}, now {_short(self.now)})"


def run_fingerprint(plan: RunPlan, precision: Precision) -> dict[str, Any]:
    """Everything that decides what the next steps of a run do, by field."""
    settings = plan.config.model_dump(mode="json")
    return {
        **_file_fingerprints(plan),
        "global_batch": plan.global_batch,
        "compute": f"{precision.compute} on a base in {precision.base}",
        "sdlora": package_versions()["sdlora"],
        **{
            f"{section}.{key}": value
            for section in SECTIONS
            for key, value in settings[section].items()
            if f"{section}.{key}" not in FREE
        },
    }


def _file_fingerprints(plan: RunPlan) -> dict[str, Any]:
    """What is in the files that a run reads, wherever they lie."""
    heldout = [(record.digest, record.caption) for record in plan.index.heldout]
    return {
        "base": plan.info.digest,
        "vae": plan.info.vae_digest,
        "text": plan.info.text_digest,
        "parent": [parent.ancestor.digest for parent in plan.parents],
        "dataset": plan.index.digest,
        "heldout": hashlib.sha256(json.dumps(heldout).encode()).hexdigest(),
    }


def check_same_plan(accelerator: Accelerator, plan: RunPlan) -> None:
    """All processes must have planned the same run, or they would train different ones.

    Raises:
        ConfigError: Naming what differs, on every process.
    """
    seen = {
        "the settings": plan.config.model_dump_json(exclude={"images"}),
        **{TITLES[field]: value for field, value in _file_fingerprints(plan).items()},
        "the versions": dict(package_versions()),
    }
    for what, value in seen.items():
        digests = all_gather(accelerator, hashlib.sha256(json.dumps(value).encode()).hexdigest())
        others = [str(process) for process, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise ConfigError(
                f"{what} of process {', '.join(others)} differ from those of process 0; "
                "give every host the same files"
            )


def check_fingerprint(
    run: RunFolder, step: int, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[Change]:
    """Compares a checkpoint's identity with that of the run as it would go on.

    Args:
        saved: As `run_fingerprint` gave it when the checkpoint of `step` was saved.
        now: As it gives it now.
        allowed: Fields that may differ.

    Returns:
        The changes that were allowed.

    Raises:
        RunError: With a line for each that was not.
    """
    changes = list(_changes(saved, now))
    problems = []
    for change in changes:
        if change.field in FIXED:
            way = f"put it back, or start a new run with lora.init_from={run.step_adapter(step)}"
        else:
            way = f"put it back, or allow it: --allow-changed {change.field}"
        if change.field in FIXED or change.field not in allowed:
            problems.append(f"{change} since the checkpoint of step {step}; {way}")
    if problems:
        raise RunError("\n".join(problems))
    return changes


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    # What only one of two versions knows cannot be compared; that the version changed is a field itself.
    for field in now:
        before = saved.get(field, now[field])
        # How older versions spelled data.crop=center.
        if ("center" if before == "centre" else before) != now[field]:
            yield Change(field, before, now[field])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}…"


# Sections whose settings decide what a step does.
SECTIONS = ("base", "data", "lora", "objective", "train")
RESUMABLE = {
    # Where things lie; what is in them is compared.
    "base.source",
    "base.vae",
    "data.heldout",
    "lora.parent",
    "train.steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.evaluate_every",
    "train.trackers",
    "train.batch_size",
    "train.accumulate",
    "train.gradient_checkpointing",
    "train.timeout_seconds",
    "sample.batch_size",
}
# These change nothing in a step that is not seen elsewhere: in the images, the precision, the checkpoint.
FREE = RESUMABLE | {
    "base.dtype",
    "base.revision",
    "base.variant",
    "data.allow_missing_captions",
    "data.cache",
    "data.on_bad_image",
    "lora.force_parent",
    "lora.init_from",
    "train.max_skipped_steps",
    "train.precision",
    "train.trace",
}
# A checkpoint of another one does not fit, or would be of another run altogether.
FIXED = {
    "base",
    "vae",
    "text",
    "parent",
    "global_batch",
    "base.quantize",
    "data.resolution",
    "lora.alpha",
    "lora.alpha_pattern",
    "lora.init",
    "lora.rank",
    "lora.rank_pattern",
    "lora.rslora",
    "lora.targets",
    "lora.text_encoder",
    "train.ema_decay",
    "train.optimizer",
    "train.seed",
}
ALLOWABLE = {"dataset", "heldout", "compute", "sdlora"} | {
    f"{section}.{key}"
    for section in SECTIONS
    for key in type(getattr(RunConfig(), section)).model_fields
    if f"{section}.{key}" not in FREE | FIXED
}
SHARED = ("batch_size", "accumulate")


def apply_overrides(
    settings: RunConfig,
    overrides: Iterable[str] | Mapping[str, Any],
    *,
    global_batch: int,
    num_processes: int,
    allowed: Collection[str] = (),
) -> RunConfig:
    """The run's settings with what may change, changed; the global batch is kept.

    Args:
        settings: As the run has them.
        overrides: `section.key=value` texts, or a mapping from `section.key` to values.
        global_batch: Samples of a full step of the run.
        num_processes: How many processes go on with it.
        allowed: Fields that may change although they decide what a step does.

    Raises:
        ConfigError: Naming what may not change, or what cannot be divided.
    """
    if unknown := [field for field in allowed if field not in ALLOWABLE]:
        raise ConfigError(
            f"--allow-changed {unknown[0]} is not possible; fields that can be allowed are "
            f"{', '.join(sorted(ALLOWABLE))}"
        )
    overrides = [overrides] if isinstance(overrides, str) else overrides
    pairs = overrides if isinstance(overrides, Mapping) else list(overrides)
    given_keys = pairs if isinstance(pairs, Mapping) else [text.partition("=")[0].strip() for text in pairs]
    asked = load_config(None, pairs)
    keys = [".".join(key.split(".")[:2]) for key in given_keys]
    problems = [
        f"{key} decides what a step does; to change it in a resumed run add --allow-changed {key}"
        if key in ALLOWABLE
        else f"{key} cannot change in a resumed run; only {', '.join(sorted(RESUMABLE))} can"
        for key in keys
        if key not in RESUMABLE and key not in allowed
    ]
    if problems:
        raise ConfigError(*problems)
    changes: dict[str, dict[str, Any]] = {}
    for key in keys:
        section, name = key.split(".")
        changes.setdefault(section, {})[name] = getattr(getattr(asked, section), name)
    train = changes.setdefault("train", {})
    given = {name: train.pop(name) for name in SHARED if name in train}
    train |= _divide(settings, given, global_batch, num_processes)
    return settings.replace(**changes)


def _divide(
    settings: RunConfig, given: Mapping[str, Any], global_batch: int, num_processes: int
) -> dict[str, Any]:
    """batch_size and accumulate of each process, as given; else no larger a batch_size than before."""
    if global_batch % num_processes:
        counts = ", ".join(str(n) for n in range(1, global_batch + 1) if global_batch % n == 0)
        raise ConfigError(
            f"the run's global batch of {global_batch} cannot be divided over {num_processes} processes; "
            f"use {counts}"
        )
    share = global_batch // num_processes
    if given.get("batch_size", settings.train.batch_size) == "auto":
        if share > 1 and given.get("accumulate", share) == share:
            return {"batch_size": "auto", "accumulate": share}
        given = {"accumulate": 1, **given, "batch_size": 1}
    product = " x ".join(f"train.{name} = {given[name]}" for name in SHARED if name in given)
    if len(given) == len(SHARED):
        batch_size, rest = given["batch_size"], share - given["batch_size"] * given["accumulate"]
    elif given:
        number = next(iter(given.values()))
        batch_size, rest = number if "batch_size" in given else share // number, share % number
    else:
        largest = settings.train.micro_batch
        batch_size, rest = max(n for n in range(1, largest + 1) if share % n == 0), 0
    if rest:
        raise ConfigError(
            f"{product} does not fit the run's {share} samples a step on each process; "
            f"leave it out, or give numbers whose product is {share}"
        )
    return {"batch_size": batch_size, "accumulate": share // batch_size}


def global_batch_of(run: RunFolder, settings: RunConfig) -> int:
    """Samples of a full step, as the run was planned.

    A run that was killed before it wrote its plan has the settings and the processes that it was given.
    """
    for event in run.events("plan"):
        return int(event["global_batch"])
    processes = int(run.read_environment()["num_processes"])
    return settings.train.micro_batch * settings.train.accumulate * processes


AVERAGE = "average."


def save_state(run: RunFolder, plan: RunPlan, runner: StepRunner, counters: Counters) -> None:
    """Writes the state of a step, then deletes the oldest ones.

    Raises:
        OSError: If there is no room; nothing is left behind, and no older state is deleted.
    """
    scaler, average = runner.accelerator.scaler, runner.ema
    averages = average.values if average else {}
    save_checkpoint(
        run.checkpoint(counters.step),
        tensors={
            **runner.adapter.named_tensors(),
            **{AVERAGE + name: value for name, value in averages.items()},
        },
        optimizer=runner.optimizer.state_dict(),
        state={
            "counters": asdict(counters),
            "num_averaged": average.num_updates if average else 0,
            "scaler": scaler.state_dict() if scaler else None,
            "identity": run_fingerprint(plan, runner.precision),
            "versions": dict(package_versions()),
        },
    )
    run.remove_checkpoints(keep=plan.config.train.keep_checkpoints)


def newest_complete_step(run: RunFolder, terminal: Terminal) -> int:
    """The step of the newest state that can be read whole; 0 if there is none."""
    for step in reversed(run.checkpoint_steps()):
        try:
            read_checkpoint(run.checkpoint(step))
        except RunError as error:
            terminal.warn(f"{error}; trying the one before")
            continue
        return step
    return 0


def check_state(
    run: RunFolder, step: int, plan: RunPlan, precision: Precision, allowed: Collection[str]
) -> list[Change]:
    """Compares what a state belongs to with what it would go on with.

    Returns:
        What changed and was allowed to.

    Raises:
        RunError: With a line for each change that was not.
    """
    state = read_state(run.checkpoint(step))
    return check_fingerprint(run, step, state["identity"], run_fingerprint(plan, precision), allowed)


def load_state(run: RunFolder, step: int, runner: StepRunner) -> Counters:
    """Puts a runner back to the state of a step.

    Raises:
        RunError: If it is of another adapter or another optimizer, or of another program.
    """
    folder = run.checkpoint(step)
    tensors, optimizer, state = read_checkpoint(folder)
    try:
        _restore(run, runner, tensors, optimizer, state)
        return Counters.restore(state["counters"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise RunError(
            f"checkpoint {folder} does not fit the run ({type(error).__name__}: {error}); "
            "take it away to go on from the one before"
        ) from None


def _restore(
    run: RunFolder,
    runner: StepRunner,
    tensors: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
) -> None:
    own = runner.adapter.named_tensors()
    averages = {
        name.removeprefix(AVERAGE): value for name, value in tensors.items() if name.startswith(AVERAGE)
    }
    if set(own) != {name for name in tensors if not name.startswith(AVERAGE)}:
        raise RunError(
            f"the checkpoint in {run.path} adapts other modules than lora.targets; start a new run"
        )
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        tensor.data.copy_(tensors[name])
    if runner.ema is not None:
        runner.ema.restore(averages, state["num_averaged"])
    restore_optimizer(runner.optimizer, optimizer)
    if runner.accelerator.scaler and state["scaler"]:
        runner.accelerator.scaler.load_state_dict(state["scaler"])
