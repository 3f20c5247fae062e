"""What all processes of a run must agree on before it starts."""

from __future__ import annotations

import json

from accelerate import Accelerator

from sdlora.diffusion.objective import derive_seed
from sdlora.errors import ConfigError
from sdlora.training.device import Precision, package_versions
from sdlora.training.memory import Machine, free_bytes
from sdlora.training.plan import RunPlan
from sdlora.training.processes import gather_numbers


def check_same_plan(accelerator: Accelerator, plan: RunPlan) -> None:
    """All processes must have planned the same run, or they would train different ones.

    Raises:
        ConfigError: Naming what differs, on every process.
    """
    seen = {
        "the settings": plan.config.model_dump_json(exclude={"images"}),
        "the pictures or captions": plan.index.digest,
        "the held-out pictures": [(record.digest, record.caption) for record in plan.index.heldout],
        "the base": plan.info.digest,
        "the parent": [parent.ancestor.digest for parent in plan.parents],
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


def find_machine(accelerator: Accelerator, precision: Precision) -> Machine:
    """What all processes can count on: the least that one of them has, and of one CPU's memory a share."""
    own = free_bytes(accelerator.device)
    least = min(gather_numbers(accelerator, -1 if own is None else own))
    share = accelerator.num_processes if accelerator.device.type == "cpu" else 1
    return Machine(precision, accelerator.device, None if least < 0 else least // share)
