"""Schedulers by name, set up as the base asks."""

from __future__ import annotations

import difflib
import re
from typing import Any

from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from sdlora.errors import ConfigError, shorten
from sdlora.models.info import BaseInfo
from sdlora.models.quiet import quiet

SCHEDULERS = sorted(
    {member.name for member in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
    | {"LCMScheduler", "TCDScheduler", "SASolverScheduler"}
)
"""Those of diffusers that can step a Stable Diffusion UNet; EDM's is for networks preconditioned its way."""


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
                f"the base {info.name} names the scheduler {shorten(wanted)}, with which sdlora cannot "
                "sample; set sample.scheduler, such as DDIMScheduler"
            )
        raise ConfigError(f"sample.scheduler = {wanted!r} is no scheduler that fits this base; {remedy}")
    try:
        with quiet():
            return getattr(schedulers, entry).from_config(dict(info.scheduler_config))
    except ImportError as error:
        package = re.search(r"requires the (\S+) library", str(error))
        raise ConfigError(
            f"sample.scheduler = {wanted!r} needs {package.group(1) if package else 'a package'}, "
            "which is not installed; install it, or use DDIMScheduler"
        ) from None
