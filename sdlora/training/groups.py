"""Which parameters learn how fast: groups by module and factor, each a fixed share of the base rate."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sdlora.config import TrainSection
from sdlora.errors import ConfigError, shorten
from sdlora.lora.attach import match_names
from sdlora.lora.names import component_of

TEXT = "text encoders"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Args:
        name: The pattern of `train.learning_rates`, `text encoders` or `others`; and the factor, with LoRA+.
        ratio: The group's rate over `train.learning_rate`, the same at every step.
        parameters: The tensors.
    """

    name: str
    ratio: float
    parameters: list[Tensor]


def match_rates(modules: Sequence[str], settings: TrainSection) -> dict[str, str | None]:
    """The pattern of `train.learning_rates` that decides for each module: the last one that matches, or None.

    Args:
        modules: Names; those of text encoders start with `text_encoder.` or `text_encoder_2.`.
        settings: Patterns, or targets such as `convolutions`, and their rates.

    Raises:
        ConfigError: With one line for each pattern that decides for no module.
    """
    matched = {pattern: match_names(modules, pattern) for pattern in settings.learning_rates}
    chosen: dict[str, str | None] = dict.fromkeys(modules)
    for pattern, matches in matched.items():
        chosen |= dict.fromkeys(matches, pattern)
    problems = []
    for pattern, matches in matched.items():
        if pattern not in chosen.values():
            nearest = difflib.get_close_matches(pattern.strip("*."), modules, 1, 0.3) or list(modules[:1])
            reason = (
                f"is overruled by {chosen[matches[0]]!r} and others after it; put it last"
                if matches
                else f"matches no module that is trained; the nearest is {nearest[0]}"
            )
            problems.append(f"train.learning_rates: {shorten(repr(pattern))} {reason}")
    if problems:
        raise ConfigError(*problems)
    return chosen


def group_parameters(named: Mapping[str, Tensor], settings: TrainSection) -> list[ParameterGroup]:
    """Groups of parameters, in the order in which their first one comes; one group if all learn alike.

    LoRA+ (Hayou et al. 2024, 2402.12354): the rate of `up` is λ times that of `down`, with λ =
    `train.lora_plus_ratio`; at one rate for both, `up` learns too slowly in wide layers.

    Args:
        named: Tensors by module and factor, such as `mid_block.attentions.0.proj_in.down`.
        settings: `learning_rate`, `learning_rates`, `lora_plus_ratio`.

    Raises:
        ConfigError: With one line for each pattern that decides for no module.
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
    """What decides a module's learning rate, and the rate."""
    if pattern is not None:
        return pattern, settings.learning_rates[pattern]
    if component_of(module) != "unet":
        return TEXT, settings.text_encoder_rate
    return "others", settings.learning_rate


def describe_rates(modules: Sequence[str], settings: TrainSection) -> str:
    """The rates that differ from the base rate, for the plan; empty if none does."""
    chosen = match_rates(modules, settings)
    rates = Counter(_rate_of(module, pattern, settings) for module, pattern in chosen.items())
    texts = [
        f"{rate:g} on {key} ({count} of {len(modules)} modules)"
        for (key, rate), count in rates.items()
        if key != "others"
    ]
    if settings.lora_plus_ratio != 1:
        texts.append(f"up {settings.lora_plus_ratio:g} times as fast as down")
    return "; ".join(texts)
