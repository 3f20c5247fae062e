"""The optimizer by name, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch

from sdlora.config import TrainSection
from sdlora.errors import ConfigError
from sdlora.training.groups import ParameterGroup, group_parameters


def num_warmup_steps(warmup: float, steps: int) -> int:
    """A share of the steps when below 1, else a number of steps."""
    return round(warmup * steps) if warmup < 1 else min(round(warmup), steps)


def learning_rate(step: int, settings: TrainSection, steps: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        step: Updates already done, from 0.
        settings: Peak, schedule and warm-up.
        steps: Updates in the whole run.

    Returns:
        A linear rise over the warm-up (its last step has the peak), then the schedule, which at
        the last step of linear and cosine has come down to one part in (steps - warm-up).
    """
    warmup = num_warmup_steps(settings.warmup, steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    if settings.schedule == "linear":
        return settings.learning_rate * (1 - progress)
    if settings.schedule == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate


def build_optimizer(settings: TrainSection, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Makes the optimizer: `adamw`, or any class by its import path.

    Raises:
        ConfigError: If it cannot be imported, is no optimizer, refuses its arguments, is schedule-free where
            `train.ema_decay` averages too, or finds one rate for all parameters where groups ask for several.
    """
    cls, arguments = find_optimizer(settings)
    if settings.optimizer.lower() == "adamw":
        # One fused kernel for all tensors: 3 times quicker than the default on a CPU.
        arguments = {"fused": True, **arguments}
    try:
        optimizer = cls(
            [{"params": group.parameters, "lr": settings.learning_rate * group.ratio} for group in groups],
            lr=settings.learning_rate,
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train.optimizer_args = {settings.optimizer_args!r} is refused by {settings.optimizer}: {error}"
        ) from None
    assert isinstance(optimizer, torch.optim.Optimizer)
    if settings.ema_decay and hasattr(optimizer, "eval"):
        raise ConfigError(
            f"train.ema_decay = {settings.ema_decay:g} averages what train.optimizer = {settings.optimizer} "
            "averages already; leave train.ema_decay out, or use adamw"
        )
    # Prodigy and D-Adaptation keep their one estimate of the rate as `d`, and fail at the first step.
    if len({group.ratio for group in groups}) > 1 and "d" in optimizer.param_groups[0]:
        raise ConfigError(
            f"train.optimizer = {settings.optimizer} finds one rate for all parameters; leave "
            "train.learning_rates and train.lora_plus_ratio out (with lora.text_encoder, set "
            f"train.text_encoder_learning_rate={settings.learning_rate:g} too), or use adamw"
        )
    return optimizer


def check_optimizer(settings: TrainSection, modules: Sequence[str]) -> None:
    """Makes the optimizer of one number for each factor: every mistake shows before a weight is loaded.

    Raises:
        ConfigError: As `group_parameters` and `build_optimizer` do.
    """
    named = {f"{name}.{factor}": torch.zeros(1) for name in modules for factor in ("down", "up")}
    build_optimizer(settings, group_parameters(named, settings))


def find_optimizer(settings: TrainSection) -> tuple[type, dict[str, Any]]:
    """The class and its arguments; checked before anything is loaded."""
    arguments = dict(settings.optimizer_args)
    if "lr" in arguments:
        raise ConfigError("train.optimizer_args has lr; set train.learning_rate instead")
    if settings.optimizer.lower() == "adamw":
        return torch.optim.AdamW, arguments
    module_name, _, name = settings.optimizer.rpartition(".")
    if not module_name:
        raise ConfigError(
            f"train.optimizer = {settings.optimizer!r} is not known; use adamw or an import path "
            "such as torch.optim.SGD or bitsandbytes.optim.AdamW8bit"
        )
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        package = module_name.split(".")[0]
        raise ConfigError(
            f"train.optimizer = {settings.optimizer} cannot be imported ({error}); pip install {package}"
        ) from None
    except AttributeError:
        raise ConfigError(
            f"train.optimizer = {settings.optimizer}: {module_name} has no {name}; check the spelling"
        ) from None
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"train.optimizer = {settings.optimizer} is not a torch optimizer; give a class")
    return cls, arguments
