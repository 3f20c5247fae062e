"""What may change when a run is resumed: the fingerprint of a run, and overrides of its settings (R-03)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from sdlora.config import RunConfig, load_config
from sdlora.dtypes import Precision
from sdlora.errors import ConfigError, RunError
from sdlora.runs import RunFolder
from sdlora.training.device import package_versions
from sdlora.training.distributed import all_gather
from sdlora.training.plan import RunPlan

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
# Sections whose settings affect what a step computes.
SECTIONS = ("base", "data", "lora", "objective", "train")
RESUMABLE = {
    # Paths of files whose content is compared instead.
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
# Settings whose effect is compared elsewhere: in the images, the precision or the checkpoint.
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
# With another value the checkpoint does not fit, or the run would be another one.
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
    "lora.kind",
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


@dataclass(frozen=True)
class Change:
    """A field of the fingerprint that differs from the checkpoint."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        title = TITLES.get(self.field, self.field)
        return f"{title} changed (was {_short(self.before)}, now {_short(self.now)})"


def run_fingerprint(plan: RunPlan, precision: Precision) -> dict[str, Any]:
    """Everything that affects the next steps of a run, by field."""
    settings = plan.config.model_dump(mode="json")
    fields = {f"{section}.{key}": value for section in SECTIONS for key, value in settings[section].items()}
    return {
        **_file_fingerprints(plan),
        "global_batch": plan.global_batch,
        "compute": f"{precision.compute} on a base in {precision.base}",
        "sdlora": package_versions()["sdlora"],
        **{field: value for field, value in fields.items() if field not in FREE},
    }


def _file_fingerprints(plan: RunPlan) -> dict[str, Any]:
    """The content of the files that a run reads, wherever they are."""
    heldout = [(record.digest, record.caption) for record in plan.index.heldout]
    return {
        "base": plan.info.digest,
        "vae": plan.info.vae_digest,
        "text": plan.info.text_digest,
        "parent": [parent.ancestor.digest for parent in plan.parents],
        "dataset": plan.index.digest,
        "heldout": _digest(heldout),
    }


def check_same_plan(accelerator: Accelerator, plan: RunPlan) -> None:
    """Checks that all processes planned the same run: each reads its own files.

    Raises:
        ConfigError: Naming what differs, on every process.
    """
    seen = {
        "the settings": plan.config.model_dump_json(exclude={"images"}),
        **{TITLES[field]: value for field, value in _file_fingerprints(plan).items()},
        "the versions": dict(package_versions()),
    }
    for what, value in seen.items():
        digests = all_gather(accelerator, _digest(value))
        others = [str(process) for process, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise ConfigError(
                f"{what} of process {', '.join(others)} differ from those of process 0; "
                "give every host the same files",
                key="processes-differ",
            )


def check_fingerprint(
    run: RunFolder, step: int, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[Change]:
    """Compares the fingerprint in a checkpoint with that of the resumed run.

    Args:
        run: The run.
        step: Of the checkpoint.
        saved: The fingerprint in the checkpoint.
        now: The fingerprint of the run as resumed.
        allowed: Fields that may differ.

    Returns:
        The allowed changes.

    Raises:
        RunError: With a line for each other change.
    """
    # A field that only one of two versions has cannot be compared; the version is a field itself.
    changes = [
        Change(field, saved[field], value)
        for field, value in now.items()
        if field in saved and _current_spelling(saved[field]) != value
    ]
    problems = []
    for change in changes:
        if change.field in FIXED:
            remedy = f"restore it, or start a new run with lora.init_from={run.step_adapter(step)}"
        else:
            remedy = f"restore it, or allow it: --allow-changed {change.field}"
        if change.field in FIXED or change.field not in allowed:
            problems.append(f"{change} since the checkpoint of step {step}; {remedy}")
    if problems:
        raise RunError("\n".join(problems), key="checkpoint-changed")
    return changes


def _current_spelling(value: Any) -> Any:
    # data.crop = "center" in checkpoints of older versions.
    return "center" if value == "centre" else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}…"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def apply_overrides(
    settings: RunConfig,
    overrides: Iterable[str] | Mapping[str, Any],
    *,
    global_batch: int,
    num_processes: int,
    allowed: Collection[str] = (),
) -> RunConfig:
    """Applies overrides to the settings of a run; its global batch is kept.

    Args:
        settings: Of the run.
        overrides: `section.key=value` texts, or a mapping from `section.key` to values.
        global_batch: Of the run.
        num_processes: Of the resumed run.
        allowed: Fields that may change although they affect what a step computes.

    Raises:
        ConfigError: Naming a setting that may not change, or a global batch that cannot be divided.
    """
    if unknown := [field for field in allowed if field not in ALLOWABLE]:
        raise ConfigError(
            f"--allow-changed {unknown[0]} is not possible; it takes {', '.join(sorted(ALLOWABLE))}",
            key="allow-changed",
        )
    overrides = [overrides] if isinstance(overrides, str) else overrides
    pairs = overrides if isinstance(overrides, Mapping) else list(overrides)
    given_keys = pairs if isinstance(pairs, Mapping) else [text.partition("=")[0].strip() for text in pairs]
    asked = load_config(None, pairs)
    keys = [".".join(key.split(".")[:2]) for key in given_keys]
    problems = [
        f"{key} affects what a step computes; to change it in a resumed run, add --allow-changed {key}"
        if key in ALLOWABLE
        else f"{key} cannot change in a resumed run; only {', '.join(sorted(RESUMABLE))} can"
        for key in keys
        if key not in RESUMABLE and key not in allowed
    ]
    if problems:
        raise ConfigError(*problems)
    changes: dict[str, dict[str, Any]] = {"train": {}}
    for key in keys:
        section, name = key.split(".")
        changes.setdefault(section, {})[name] = getattr(getattr(asked, section), name)
    train = changes["train"]
    given: dict[str, Any] = {name: train.pop(name) for name in ("batch_size", "accumulate") if name in train}
    train |= _divide_batch(settings, given, global_batch, num_processes)
    return settings.replace(**changes)


def _divide_batch(
    settings: RunConfig, given: Mapping[str, Any], global_batch: int, num_processes: int
) -> dict[str, Any]:
    """batch_size and accumulate of each process: as given, else with no larger a batch_size than before."""
    if global_batch % num_processes:
        counts = ", ".join(str(n) for n in range(1, global_batch + 1) if global_batch % n == 0)
        raise ConfigError(
            f"the run's global batch of {global_batch} cannot be divided over {num_processes} processes; "
            f"use {counts}",
            key="global-batch",
        )
    share = global_batch // num_processes
    if given.get("batch_size", settings.train.batch_size) == "auto":
        if share > 1 and given.get("accumulate", share) == share:
            return {"batch_size": "auto", "accumulate": share}
        given = {"accumulate": 1, **given, "batch_size": 1}
    if "batch_size" in given:
        batch_size = given["batch_size"]
    elif "accumulate" in given:
        batch_size = max(1, share // given["accumulate"])
    else:
        batch_size = max(n for n in range(1, settings.train.micro_batch + 1) if share % n == 0)
    accumulate = given.get("accumulate", share // batch_size)
    if batch_size * accumulate != share:
        product = " x ".join(f"train.{name} = {value}" for name, value in given.items())
        raise ConfigError(
            f"{product} does not fit the run's {share} samples a step on each process; "
            f"leave it out, or give numbers whose product is {share}"
        )
    return {"batch_size": batch_size, "accumulate": accumulate}


def global_batch_of(run: RunFolder, settings: RunConfig) -> int:
    """The global batch of a run, from its plan.

    A run killed before it wrote its plan has it from its settings and its number of processes.
    """
    for event in run.events("plan"):
        return int(event["global_batch"])
    processes = int(run.read_environment()["num_processes"])
    return settings.train.micro_batch * settings.train.accumulate * processes
