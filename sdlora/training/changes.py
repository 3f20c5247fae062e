"""What may change when a run goes on, and how its global batch is divided anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sdlora.config import RunConfig, load_config
from sdlora.errors import ConfigError
from sdlora.runs import RunFolder

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
# These change nothing in a step that is not seen elsewhere: in the pictures, the precision, the checkpoint.
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
    "base.quantize_correction",
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


def apply_changes(
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
