"""What a run is: the same for all its processes, and when it goes on, but for what was allowed to change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from sdlora.diffusion.objective import derive_seed
from sdlora.errors import ConfigError, RunError
from sdlora.runs import RunFolder
from sdlora.training.changes import FIXED, FREE, SECTIONS
from sdlora.training.device import Precision, package_versions
from sdlora.training.plan import RunPlan
from sdlora.training.processes import gather_numbers

TITLES = {
    "base": "the base",
    "vae": "the base's VAE",
    "text": "the base's text encoder",
    "parent": "the parent",
    "dataset": "the pictures or captions",
    "heldout": "the held-out pictures",
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


def identify(plan: RunPlan, precision: Precision) -> dict[str, Any]:
    """Everything that decides what the next steps of a run do, by field."""
    settings = plan.config.model_dump(mode="json")
    return {
        **_identify_files(plan),
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


def _identify_files(plan: RunPlan) -> dict[str, Any]:
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
        **{TITLES[field]: value for field, value in _identify_files(plan).items()},
        "the versions": dict(package_versions()),
    }
    for what, value in seen.items():
        numbers = gather_numbers(accelerator, derive_seed(json.dumps(value)))
        others = [str(process) for process, number in enumerate(numbers) if number != numbers[0]]
        if others:
            raise ConfigError(
                f"{what} of process {', '.join(others)} differ from those of process 0; "
                "give every host the same files"
            )


def check_identity(
    run: RunFolder, step: int, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[Change]:
    """Compares a checkpoint's identity with that of the run as it would go on.

    Args:
        saved: As `identify` gave it when the checkpoint of `step` was saved.
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
        if field in saved and saved[field] != now[field]:
            yield Change(field, saved[field], now[field])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 64 else f"{text[:12]}…"
