"""The optimizer, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdlora.config import TrainSection
from sdlora.errors import ConfigError, shorten
from sdlora.lora.attach import match_names
from sdlora.lora.layers import DENOISER, component_of

TEXT = "text encoders"
POLYNOMIAL_END = 1e-7


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    name: str  # pattern of train.learning_rates, `text encoders` or `others`; with LoRA+ also the part
    ratio: float  # the group's learning rate over train.learning_rate, at every step
    parameters: list[Tensor]


def match_rates(modules: Sequence[str], settings: TrainSection) -> dict[str, str | None]:
    """The last pattern of `train.learning_rates` that matches each module, or None.

    Raises a ConfigError with one line for each pattern without effect.
    """
    matched = {pattern: match_names(modules, pattern) for pattern in settings.learning_rates}
    chosen: dict[str, str | None] = dict.fromkeys(modules)
    for pattern, matches in matched.items():
        chosen |= dict.fromkeys(matches, pattern)
    problems = []
    for pattern, matches in matched.items():
        if pattern in chosen.values():
            continue
        nearest = difflib.get_close_matches(pattern.strip("*."), modules, 1, 0.3) or list(modules[:1])
        reason = f"matches no trained module; the nearest is {nearest[0]}"
        if matches:
            reason = f"is overridden by {chosen[matches[0]]!r} after it; move it to the end"
        problems.append(f"train.learning_rates: {shorten(repr(pattern))} {reason}")
    if problems:
        raise ConfigError(*problems)
    return chosen


def group_parameters(named: Mapping[str, Tensor], settings: TrainSection) -> list[ParameterGroup]:
    """Groups the parameters by learning rate, in order of appearance.

    LoRA+ (Hayou et al. 2024, 2402.12354): the rate of `up` is λ times that of `down`, with λ =
    `train.lora_plus_ratio`; at equal rates, `up` learns too slowly in wide layers.

    Args:
        named: Tensors by module and part, such as `mid_block.attentions.0.proj_in.down`.
        settings: `learning_rate`, `learning_rates`, `lora_plus_ratio`.
    """
    chosen = match_rates(list(dict.fromkeys(name.rpartition(".")[0] for name in named)), settings)
    groups: dict[str, ParameterGroup] = {}
    for name, tensor in named.items():
        module, _, factor = name.rpartition(".")
        key, rate = _rate_of(module, chosen[module], settings)
        ratio = rate / settings.learning_rate
        if settings.lora_plus_ratio != 1:
            key = f"{key} {factor}"
            ratio *= settings.lora_plus_ratio if factor == "up" else 1
        groups.setdefault(key, ParameterGroup(key, ratio, [])).parameters.append(tensor)
    return list(groups.values())


def _rate_of(module: str, pattern: str | None, settings: TrainSection) -> tuple[str, float]:
    """The group of a module, and its learning rate."""
    if pattern is not None:
        return pattern, settings.learning_rates[pattern]
    if component_of(module) != DENOISER:
        return TEXT, settings.text_encoder_rate
    return "others", settings.learning_rate


def describe_rates(modules: Sequence[str], settings: TrainSection) -> str:
    """The learning rates that differ from the base rate; empty if none does."""
    chosen = match_rates(modules, settings)
    rates = Counter(_rate_of(module, pattern, settings) for module, pattern in chosen.items())
    texts = [
        f"{rate:g} on {key} ({count} of {len(modules)} modules)"
        for (key, rate), count in rates.items()
        if key != "others"
    ]
    if settings.lora_plus_ratio != 1:
        texts.append(f"LoRA+ ratio {settings.lora_plus_ratio:g}")
    return "; ".join(texts)


def num_warmup_steps(warmup: float, steps: int) -> int:
    """A share of the steps when below 1, else a number of steps."""
    return round(warmup * steps) if warmup < 1 else min(round(warmup), steps)


def learning_rate(step: int, settings: TrainSection, steps: int) -> float:
    """The learning rate after `step` of `steps` updates, from 0.

    It rises linearly over the warm-up, whose last step has the peak, then follows the schedule, by the
    formulas of `diffusers.optimization.get_scheduler`.
    """
    warmup = num_warmup_steps(settings.warmup, steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    if settings.schedule == "linear":
        return settings.learning_rate * (1 - progress)
    if settings.schedule == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    if settings.schedule == "cosine_with_restarts":
        part = settings.schedule_cycles * progress % 1
        return settings.learning_rate * (1 + math.cos(math.pi * part)) / 2
    if settings.schedule == "polynomial":
        end = min(POLYNOMIAL_END, settings.learning_rate)
        return (settings.learning_rate - end) * math.pow(1 - progress, settings.schedule_power) + end
    return settings.learning_rate


def build_optimizer(settings: TrainSection, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Builds the optimizer: `adamw`, or any class by its import path.

    Raises a ConfigError if the class cannot be imported, is not an optimizer, rejects its arguments, averages
    weights like `train.ema_decay`, or adapts one learning rate where groups have several.
    """
    cls, arguments = find_optimizer(settings)
    name, rate = f"train.optimizer = {settings.optimizer}", settings.learning_rate
    try:
        optimizer = cls(
            [{"params": group.parameters, "lr": rate * group.ratio} for group in groups], lr=rate, **arguments
        )
    except (TypeError, ValueError) as error:
        problem = f"{name} cannot be used"
        if settings.optimizer_args:
            problem = (
                f"train.optimizer_args = {settings.optimizer_args!r} is rejected by {settings.optimizer}"
            )
        raise ConfigError(f"{problem} ({error}); change train.optimizer_args, or use adamw") from None
    assert isinstance(optimizer, torch.optim.Optimizer)
    if settings.ema_decay and hasattr(optimizer, "eval"):
        problem = f"train.ema_decay = {settings.ema_decay:g} conflicts with {name}"
        raise ConfigError(f"{problem}, which averages weights itself; remove train.ema_decay, or use adamw")
    # Prodigy and D-Adaptation keep their one estimate of the rate as `d`, and fail at the first step.
    if len({group.ratio for group in groups}) > 1 and "d" in optimizer.param_groups[0]:
        raise ConfigError(
            f"{name} adapts one learning rate for all parameters; remove train.learning_rates and "
            "train.lora_plus_ratio (with lora.text_encoder, also set "
            f"train.text_encoder_learning_rate={rate:g}), or use adamw"
        )
    return optimizer


def check_optimizer(settings: TrainSection, num_dims: Mapping[str, int]) -> None:
    """Builds the optimizer with one number for each tensor, to find mistakes before weights are loaded.

    `num_dims` are the tensors' numbers of dimensions: some optimizers take matrices alone.
    """
    named = {name: torch.zeros([1] * count) for name, count in num_dims.items()}
    optimizer = build_optimizer(settings, group_parameters(named, settings))
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        problem = f"train.optimizer = {settings.optimizer} computes the loss several times in a step"
        raise ConfigError(f"{problem}, which training does not support; use adamw")


def find_optimizer(settings: TrainSection) -> tuple[type, dict[str, Any]]:
    """The class of `train.optimizer` and its arguments; raises a ConfigError if they cannot be used."""
    setting, arguments = f"train.optimizer = {settings.optimizer}", dict(settings.optimizer_args)
    if "lr" in arguments:
        raise ConfigError("train.optimizer_args contains lr; set train.learning_rate instead")
    if settings.optimizer.lower() == "adamw":
        # One fused kernel for all tensors: 3 times quicker than the default on a CPU.
        return torch.optim.AdamW, {"fused": True, **arguments}
    module, _, name = settings.optimizer.rpartition(".")
    if not module:
        examples = "torch.optim.SGD or bitsandbytes.optim.AdamW8bit"
        raise ConfigError(f"{setting} is unknown; use adamw or an import path such as {examples}")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.split(".")[0]
        raise ConfigError(f"{setting} cannot be imported ({error}); pip install {package}") from None
    except AttributeError:
        raise ConfigError(f"{setting}: {module} has no {name}; check the spelling") from None
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"{setting} is not a subclass of torch.optim.Optimizer; use adamw or one that is")
    return cls, arguments
