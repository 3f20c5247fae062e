"""Converts the values of other trainers; the names in `CONVERTERS` are those of keys.toml.

A converter returns None if there is nothing to set, and raises a ValueError with the reason if it cannot.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

Converter = Callable[[Any], Any]
RESOLUTION_STEP = 64
_PRECISIONS = {"no": "fp32", "float": "fp32", "tfloat32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PRECISIONS |= {"float32": "fp32", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
_SCHEDULES = {name: name for name in ("constant", "linear", "cosine", "polynomial")}
_SCHEDULES |= {"constantwithwarmup": "constant"}
_SCHEDULES |= dict.fromkeys(("cosinewithrestarts", "cosinewithhardrestarts"), "cosine_with_restarts")
# sd-scripts' huber is the smooth one.
_LOSSES = {"l2": "mse", "mse": "mse", "l1": "l1", "mae": "l1", "smoothl1": "smooth_l1"}
_LOSSES |= {"huber": "pseudo_huber", "pseudohuber": "pseudo_huber"}
_TIMESTEPS = {"balanced": "uniform", "style": "cubic"}
_TIMESTEPS |= {"uniform": "uniform", "sigmoid": "sigmoid", "logitnormal": "logit_normal"}
_MODULES = {name: ["all-linear"] for name in ("networks.lora", "lycoris.kohya", "standard", "lora")}
_MODULES |= {name: ["all-linear"] for name in ("lycoris/locon", "kohya locon", "locon")}
_LAYERS = {"": ["all"], "attn": ["attention"], "attentions": ["all-linear"]}
_OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
    "prodigy": "prodigyopt.Prodigy",
    "lion": "lion_pytorch.Lion",
    "adafactor": "transformers.optimization.Adafactor",
    "dadaptation": "dadaptation.DAdaptAdam",
    **{f"dadapt{name.lower()}": f"dadaptation.DAdapt{name}" for name in ("Adam", "Lion", "SGD", "AdaGrad")},
}
_BITS = ("AdamW8bit", "Adam8bit", "Lion8bit", "SGD8bit", "PagedAdamW", "PagedAdamW8bit", "PagedLion8bit")
_OPTIMIZERS |= {name.lower(): f"bitsandbytes.optim.{name}" for name in _BITS}
_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "eulera": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2a": "KDPM2AncestralDiscreteScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsingle": "DPMSolverSinglestepScheduler",
}


@dataclass(frozen=True)
class Epochs:
    """A number of epochs, for a setting that counts steps."""

    count: float


def choose(table: Mapping[str, Any], remedy: str) -> Converter:
    """Converts a name by a table, whatever its case and underscores."""

    def convert(value: Any) -> Any:
        if (found := table.get(str(value).lower().removeprefix("k_").replace("_", ""))) is None:
            raise ValueError(f"not supported: {remedy}")
        return found

    return convert


def optimizer(value: Any) -> Any:
    """An optimizer's import path; one that is a path stays."""
    return value if "." in str(value) else choose(_OPTIMIZERS, "give the import path of its class")(value)


def number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("not a number")
    return float(value)


def whole(value: Any) -> int:
    if not math.isfinite(found := number(value)) or found != int(found):
        raise ValueError("not a whole number")
    return int(found)


def rate(value: Any) -> float | None:
    """A learning rate, the first of several; 0 is not given."""
    return number(value[0] if isinstance(value, list) else value) or None


def epochs(value: Any) -> Epochs | None:
    return Epochs(count) if (count := number(value)) else None


def steps_or_epochs(value: tuple[Any, str]) -> int | Epochs | None:
    """OneTrainer's number and its unit."""
    count, unit = value
    if unit not in ("NEVER", "STEP", "EPOCH"):
        raise ValueError("only steps and epochs are supported")
    if unit == "NEVER" or not count:
        return 0
    return whole(count) if unit == "STEP" else Epochs(number(count))


def flag(value: Any) -> bool:
    return value.lower() not in ("off", "false", "no", "0", "") if isinstance(value, str) else bool(value)


def when(result: Any) -> Converter:
    """Converts a switch: to `result` if it is on, else nothing."""
    return lambda value: result if flag(value) else None


def area_side(value: Any) -> int:
    """The side of the square with the area of `512`, `[512, 768]`, `512,768` or `512x768`."""
    sides = [int(part) for part in re.findall(r"\d+", str(value))][:2]
    if not sides:
        raise ValueError("not a size in pixels")
    side = math.sqrt(sides[0] * sides[-1])
    return int(side) if side == int(side) else round(side / RESOLUTION_STEP) * RESOLUTION_STEP


def largest_side(value: Any) -> int:
    """The largest of several resolutions, all trained there: `[512, 768]` or `512,768`."""
    return max(map(area_side, value if isinstance(value, list) else str(value).split(",")))


def single(value: Any) -> str:
    if isinstance(value, list) and len(value) != 1:
        raise ValueError("only one parent is supported; merge them with `sdlora merge`")
    return str(value[0] if isinstance(value, list) else value)


def arguments(value: Any) -> dict[str, Any]:
    """Arguments from `["weight_decay=0.1", "betas=0.9,0.99"]`, the same with spaces, or a table."""
    if isinstance(value, dict):
        return {str(key): _literal(item) for key, item in value.items() if item is not None}
    parts = re.split(r"\s+(?=\w+=)", value.strip()) if isinstance(value, str) else list(value or ())
    pairs = [str(part).partition("=") for part in parts if part]
    if wrong := next((key for key, separator, _ in pairs if not separator), None):
        raise ValueError(f"{wrong} is not name=value")
    return {key.strip(): _literal(text) for key, _, text in pairs}


def _literal(text: Any) -> Any:
    """A number, switch or list that is written as text, as YAML reads `1e-2`."""
    with suppress(ValueError, SyntaxError):
        text = ast.literal_eval(text) if isinstance(text, str) else text
    return list(text) if isinstance(text, tuple) else text


def texts(value: Any) -> list[str]:
    """Texts that are not empty, of a list or a single one."""
    found = [value] if isinstance(value, str) else list(value or ())
    # Newer versions of ai-toolkit, and OneTrainer, have a table for each prompt.
    prompts = (item.get("prompt", "") if isinstance(item, dict) else item for item in found)
    return [str(prompt) for prompt in prompts if str(prompt).strip()]


SWITCHES = ("flag", "negated", "int8", "random", "center", "dora", "files", "alpha", "eight_bits")
CONVERTERS: dict[str, Converter] = {
    **{one.__name__: one for one in (number, whole, rate, epochs, steps_or_epochs, flag, area_side)},
    **{one.__name__: one for one in (largest_side, single, arguments, texts, optimizer)},
    **{name: when(name) for name in ("int8", "random", "center", "dora", "files", "alpha")},
    "eight_bits": when("bitsandbytes.optim.AdamW8bit"),
    **{name: when([name]) for name in ("wandb", "tensorboard")},
    "count": lambda value: whole(value) or None,  # 0 is not given
    "amount": lambda value: number(value) or None,
    "times": lambda value: None if (found := whole(value)) == 1 else found,
    "chunks": lambda value: round(whole(value) / 75) or None,
    "skip": lambda value: whole(value) + 1 if value else None,
    "negated": lambda value: not flag(value),
    "text": lambda value: str(value) if value else None,
    "seeds": lambda value: [whole(value)],
    "tracker": lambda value: {"all": ["tensorboard"], "none": None}.get(str(value), [str(value)]),
    "convolutions_rank": lambda value: {"convolutions": whole(value)},
    "convolutions_alpha": lambda value: {"convolutions": number(value)},
    "quantized": lambda value: {"NFLOAT_4": "nf4", "INT_8": "int8", "FLOAT_8": "int8"}.get(str(value)),
    "precision": choose(_PRECISIONS, "use fp32, bf16 or fp16"),
    "schedule": choose(_SCHEDULES, "see train.schedule"),
    "loss": choose(_LOSSES, "see objective.loss"),
    "timesteps": choose(_TIMESTEPS, "see objective.timesteps"),
    "scheduler": choose(_SCHEDULERS, "name a diffusers scheduler class"),
    "module": choose(_MODULES, "only LoRA and DoRA are"),
    "layers": choose(_LAYERS, "give names or patterns of layers in lora.targets"),
}
