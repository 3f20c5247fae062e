"""The fingerprint of a run, and the settings that may change when it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from accelerate import Accelerator

from sdlora.config import RunConfig, load_config
from sdlora.dtypes import DTYPES, Precision
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


def _keys(**sections: str) -> set[str]:
    return {f"{section}.{name}" for section, names in sections.items() for name in names.split()}


# Settings that may change, and paths of files whose content is compared instead.
RESUMABLE = _keys(
    base="source vae",
    data="heldout",
    lora="parent",
    train="steps save_every keep_checkpoints sample_every evaluate_every trackers batch_size accumulate "
    "gradient_checkpointing timeout_seconds",
    sample="batch_size",
)
# Settings whose effect is compared elsewhere: in the images, the precision or the checkpoint.
FREE = RESUMABLE | _keys(
    base="dtype revision variant",
    data="allow_missing_captions cache on_bad_image",
    lora="force_parent init_from",
    train="epochs max_skipped_steps precision trace",
)
# With another value the checkpoint does not fit, or the run would be another one.
FIXED = {"base", "vae", "text", "parent", "global_batch"} | _keys(
    base="quantize",
    data="resolution",
    lora="alpha alpha_pattern init kind rank rank_pattern rslora targets text_encoder",
    train="ema_decay optimizer seed",
)
ALLOWABLE = {"dataset", "heldout", "compute", "sdlora"} | {
    f"{section}.{key}"
    for section in SECTIONS
    for key in type(getattr(RunConfig(), section)).model_fields
    if f"{section}.{key}" not in FREE | FIXED
}


class Change(NamedTuple):
    """A field of the fingerprint that differs from the checkpoint."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = (text if len(text) < 64 else f"{text[:12]}…" for text in map(str, self[1:]))
        return f"{TITLES.get(self.field, self.field)} changed (was {before}, now {now})"


def run_fingerprint(plan: RunPlan, precision: Precision) -> dict[str, Any]:
    """All values that affect the next steps of a run, by field."""
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
    """Digests of the files that a run reads, wherever they are."""
    return {
        "base": plan.info.digest,
        "vae": plan.info.vae_digest,
        "text": plan.info.text_digest,
        "parent": [parent.ancestor.digest for parent in plan.parents],
        "dataset": plan.index.digest,
        "heldout": digest_json([(record.digest, record.caption) for record in plan.index.heldout]),
    }


def digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_same_plan(accelerator: Accelerator, plan: RunPlan) -> None:
    """Raises a ConfigError on every process if they planned different runs: each reads its own files."""
    seen = {
        "the settings": plan.config.model_dump_json(exclude={"images"}),
        **{TITLES[field]: value for field, value in _file_fingerprints(plan).items()},
        "the versions": dict(package_versions()),
    }
    for what, value in seen.items():
        digests = all_gather(accelerator, digest_json(value))
        others = [str(process) for process, digest in enumerate(digests) if digest != digests[0]]
        if others:
            problem = f"{what} of process {', '.join(others)} differ from those of process 0"
            raise ConfigError(f"{problem}; use the same files on every host", key="processes-differ")


def check_fingerprint(
    run: RunFolder, step: int, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[Change]:
    """Compares the fingerprint in the checkpoint of a step with that of the resumed run.

    Returns the changes if their fields are `allowed`; else raises a RunError with a line for each other one.
    """
    # A field that only one of two versions has cannot be compared; the version is a field itself.
    changes = [
        Change(field, saved[field], value)
        for field, value in now.items()
        if field in saved and _current_spelling(saved[field]) != value
    ]
    problems = []
    for change in changes:
        remedy = f"allow it: --allow-changed {change.field}"
        if change.field in FIXED:
            remedy = f"start a new run with lora.init_from={run.step_adapter(step)}"
        elif change.field in allowed:
            continue
        problems.append(f"{change} since the checkpoint of step {step}; restore it, or {remedy}")
    if problems:
        raise RunError("\n".join(problems), key="checkpoint-changed")
    return changes


def _current_spelling(value: Any) -> Any:
    # data.crop = "center" in checkpoints of older versions.
    return "center" if value == "centre" else value


def apply_overrides(
    settings: RunConfig,
    overrides: Iterable[str] | Mapping[str, Any],
    *,
    global_batch: int,
    num_processes: int,
    allowed: Collection[str] = (),
) -> RunConfig:
    """Applies overrides, or those of the fields that are `allowed` to change; the global batch is kept.

    Raises a ConfigError for a setting that may not change, or a global batch that cannot be divided.
    """
    if unknown := [field for field in allowed if field not in ALLOWABLE]:
        problem = f"--allow-changed {unknown[0]} is not possible; choose from {', '.join(sorted(ALLOWABLE))}"
        raise ConfigError(problem, key="allow-changed")
    if not isinstance(overrides, Mapping):
        overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    asked = load_config(None, overrides)
    keys = [".".join(text.partition("=")[0].strip().split(".")[:2]) for text in overrides]
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
        problem = f"the run's global batch of {global_batch} cannot be divided over {num_processes} processes"
        raise ConfigError(f"{problem}; use {counts}", key="global-batch")
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
            f"remove it, or set numbers whose product is {share}"
        )
    return {"batch_size": batch_size, "accumulate": accumulate}


def vae_of(run: RunFolder) -> str | None:
    """Dtype of the VAE that a run began with, so that its latents stay the same; None if it has not begun."""
    recorded = (event["dtypes"]["vae"] for event in run.events("prepared"))
    names = {str(dtype): name for name, dtype in DTYPES.items()}
    return next((names.get(f"torch.{dtype}") for dtype in recorded), None)


def global_batch_of(run: RunFolder, settings: RunConfig) -> int:
    """The global batch of a run, from its plan; if it was killed before writing one, from its settings."""
    for event in run.events("plan"):
        return int(event["global_batch"])
    processes = int(run.read_environment()["num_processes"])
    return settings.train.micro_batch * settings.train.accumulate * processes
