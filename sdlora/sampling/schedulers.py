"""Schedulers by name, set up as the base asks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from sdlora.errors import ConfigError, shorten
from sdlora.models.info import BaseInfo
from sdlora.models.quiet import quiet
from sdlora.sampling.images import SampleSettings

SCHEDULERS = sorted(
    {member.name for member in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
    | {"LCMScheduler", "TCDScheduler", "SASolverScheduler"}
)
"""Schedulers of diffusers that can step Stable Diffusion; EDM's is for networks preconditioned its way."""


def make_scheduler(info: BaseInfo, name: str | None = None) -> Any:
    """A fresh scheduler with the base's betas and prediction type.

    Args:
        name: A diffusers class, with or without its ending `Scheduler`; the base's own if left out.

    Raises:
        ConfigError: If there is none of that name, or it needs a package that is not installed.
    """
    wanted = name or str(info.scheduler_config.get("_class_name", "DDIMScheduler"))
    full = {entry.lower().removesuffix("scheduler"): entry for entry in SCHEDULERS}
    entry = full.get(wanted.lower().removesuffix("scheduler"))
    if entry is None:
        guess = difflib.get_close_matches(wanted, SCHEDULERS, 1, 0.4)
        remedy = f"did you mean {guess[0]}?" if guess else "use DDIMScheduler or EulerDiscreteScheduler"
        if name is None:
            raise ConfigError(
                f"the base {info.name} names the scheduler {shorten(wanted)}, which sdlora does not "
                "support; set sample.scheduler, such as DDIMScheduler"
            )
        raise ConfigError(f"sample.scheduler = {wanted!r} is not a scheduler for this base; {remedy}")
    try:
        with quiet():
            return getattr(schedulers, entry).from_config(dict(info.scheduler_config))
    except ImportError as error:
        package = re.search(r"requires the (\S+) library", str(error))
        raise ConfigError(
            f"sample.scheduler = {wanted!r} needs {package.group(1) if package else 'a package'}, "
            "which is not installed; install it, or use DDIMScheduler"
        ) from None


PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses what cannot be a prompt.

    Raises:
        ConfigError: With one line for each prompt that is empty or has a placeholder left in it (R-30).
    """
    problems = [] if prompts else ["sample.prompts is empty; set at least one prompt"]
    for prompt in prompts:
        left = PLACEHOLDER.search(prompt)
        if not prompt.strip():
            problems.append("sample.prompts has an empty prompt; describe what the image should show")
        elif left and left.group() == "{trigger}":
            problems.append(
                f"prompt {prompt!r} has {{trigger}} in it but no trigger is set; set data.trigger"
            )
        elif left:
            problems.append(f"prompt {prompt!r} contains the placeholder {left.group()}; replace it")
    if problems:
        raise ConfigError(*problems)


def resolve_settings(info: BaseInfo, settings: SampleSettings) -> SampleSettings:
    """Fills in the base's own choices and checks the rest against it.

    Raises:
        ConfigError: With one line for each setting that does not fit.
    """
    scheduler = make_scheduler(info, settings.scheduler)
    name = type(scheduler).__name__
    sides = {
        side: info.resolution if asked is None else asked
        for side, asked in (("width", settings.width), ("height", settings.height))
    }
    problems = [
        f"the images' {side} = {pixels} must be a multiple of {info.min_step} pixels; "
        f"use {max(1, round(pixels / info.min_step)) * info.min_step}"
        for side, pixels in sides.items()
        if pixels < info.min_step or pixels % info.min_step
    ]
    if not 1 <= settings.steps <= info.num_train_timesteps:
        problems.append(
            f"sample.steps = {settings.steps} must be 1 to {info.num_train_timesteps} (the base's timesteps)"
        )
    elif not _can_step(scheduler, settings.steps):
        problems.append(f"sample.steps = {settings.steps} is too few for {name}; use 20 to 50")
    if problems:
        raise ConfigError(*problems)
    guidance = info.guidance if settings.guidance is None else settings.guidance
    width, height = sides["width"], sides["height"]
    return replace(settings, guidance=guidance, scheduler=name, width=width, height=height)


def _can_step(scheduler: Any, steps: int) -> bool:
    """Whether a scheduler has timesteps for so few; PNDM, the one of SD 1.5, wants four."""
    try:
        with quiet():
            scheduler.set_timesteps(steps)
    except (ValueError, IndexError):
        return False
    return True
