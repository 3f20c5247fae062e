"""Brings the configs of other trainers to one level of keys, and resolves what depends on several of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdlora.translate.values import arguments, rate

# The key of the sets of images after the first.
SETS = "sets"
# Other names in the files of kohya_ss, the graphical interface, and in dataset files.
KOHYA_NAMES = {
    "optimizer": "optimizer_type",
    "epoch": "max_train_epochs",
    "max_resolution": "resolution",
    "lora_network_weights": "network_weights",
    "vae_path": "vae",
    "batch_size": "train_batch_size",
}


@dataclass(frozen=True)
class Trainer:
    """A trainer: its name, its table in keys.toml, what finds its keys, and beginnings of keys to ignore."""

    name: str
    table: str
    prepare: Callable[[dict[str, Any]], dict[str, Any]]
    ignored: tuple[str, ...] = ()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys; arguments of an optimizer stay a table."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and not key.endswith("_params"):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def all_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all sections together."""
    sections = [value for value in values.values() if isinstance(value, dict)]
    return {key: value for section in [*sections, values] for key, value in section.items()}


def _prepare_kohya(values: dict[str, Any]) -> dict[str, Any]:
    """Sections, the sets of images, and arguments of the network, with empty values dropped."""
    sets = [
        {**values.get("general", {}), **one, **part}
        for one in values.get("datasets") or [{}]
        for part in one.get("subsets") or [{}]
    ]
    for one in sets:
        one.pop("subsets", None)
        if one.get("is_reg"):
            one["default_caption"] = one.pop("class_tokens", None)
            one["weight"] = all_keys(values).get("prior_loss_weight", 1)
    found, *others = sorted(sets, key=lambda one: bool(one.get("is_reg")))
    found[SETS] = [{KOHYA_NAMES.get(key, key): value for key, value in one.items()} for one in others]
    for key, value in values.items():
        if key not in ("datasets", "general"):
            found |= value if isinstance(value, dict) else {key: value}
    percent = found.pop("lr_warmup", 0)
    found = {KOHYA_NAMES.get(key, key): value for key, value in found.items()}
    found |= arguments(found.pop("network_args", None))
    found = {key: value for key, value in found.items() if value not in (None, "", [])}
    if "LoRA_type" in found:
        # There, 0 is a rate that is not given; a rate for the denoiser alone excludes the text encoder.
        rates = [rate(found.get(key, 0)) for key in ("unet_lr", "text_encoder_lr")]
        found["network_train_unet_only"] = bool(rates[0] and not rates[1])
        found = {key: value for key, value in found.items() if value not in (0, "0", "none", "None")}
        if percent and "lr_warmup_steps" not in found:
            found["lr_warmup_steps"] = float(percent) / 100
        kind = found.pop("noise_offset_type", "Original")
        found.pop("multires_noise_iterations" if kind == "Original" else "noise_offset", None)
    _resolve_kohya(found)
    return found


def _resolve_kohya(found: dict[str, Any]) -> None:
    schedule = str(found.get("lr_scheduler", "constant"))
    if schedule == "constant":
        found.pop("lr_warmup_steps", None)
    if "restarts" not in schedule:
        found.pop("lr_scheduler_num_cycles", None)
    if schedule != "polynomial":
        found.pop("lr_scheduler_power", None)
    if found.get("max_train_epochs"):
        found.pop("max_train_steps", None)
    if found.pop("use_8bit_adam", False):
        found.setdefault("optimizer_type", "AdamW8bit")
    if (algorithm := found.pop("algo", "lora")) not in ("lora", "locon"):
        found["network_module"] = algorithm
    if "conv_dim" in found:
        found.setdefault("conv_alpha", 1)
    if {"min_timestep", "max_timestep"} & found.keys():
        low, high = found.pop("min_timestep", None), found.pop("max_timestep", None)
        found["min_timestep, max_timestep"] = [int(low or 0), int(high or 1000)]
    # The text encoder is trained too unless it is excluded.
    text_rate = found.setdefault("text_encoder_lr", found.get("learning_rate", 0))
    is_frozen = found.get("network_train_unet_only") or found.get("cache_text_encoder_outputs")
    if {"network_module", "LoRA_type"} & found.keys():
        found["network_train_unet_only"] = bool(is_frozen) or not rate(text_rate)
    if found.get("network_train_unet_only", True):
        del found["text_encoder_lr"]
    if found.get("unet_lr"):
        found.pop("learning_rate", None)
    if str(found.get("optimizer_type", "")).lower() == "adafactor":
        given = arguments(found.get("optimizer_args"))
        found["optimizer_args"] = {"scale_parameter": False, "relative_step": False, **given}


_TOOLKIT_IGNORED = ("type", "device", "model.arch", "model.is_", "model.dtype")


def _prepare_toolkit(values: dict[str, Any]) -> dict[str, Any]:
    """The first process, and its sets of images."""
    process = dict(values["config"]["process"][0])
    sets = sorted(process.pop("datasets", None) or [{}], key=lambda one: bool(one.get("is_reg")))
    found = flatten({"name": values["config"].get("name"), **process, "datasets": sets[0]})
    found[SETS] = [flatten({"datasets": one}) for one in sets[1:]]
    for old, new in (("rank", "linear"), ("alpha", "linear_alpha")):
        if f"network.{old}" in found:
            found.setdefault(f"network.{new}", found.pop(f"network.{old}"))
    if "network.conv" in found:
        found.setdefault("network.conv_alpha", found["network.conv"])
    if not found.get("train.train_text_encoder"):
        found.pop("train.text_encoder_lr", None)
    if not found.pop("train.ema_config.use_ema", False):
        found.pop("train.ema_config.ema_decay", None)
    if found.pop("train.disable_sampling", False):
        found["sample.sample_every"] = 0
    low, high = (found.pop(f"train.{side}_denoising_steps", None) for side in ("min", "max"))
    if (low or 0, high or 1000) != (0, 1000):
        found["train.min_denoising_steps, train.max_denoising_steps"] = [low or 0, high or 1000]
    usual = {"train.noise_scheduler": "ddpm", "train.train_unet": True}
    return {key: value for key, value in found.items() if usual.get(key, ...) != value}


# Beginnings of keys without a meaning here: of other models, devices, windows and caches, and of what
# `_prepare_onetrainer` resolves.
_ONETRAINER_IGNORED = (
    *("__version", "training_method", "model_type", "workspace_dir", "cache_dir", "debug_", "tensorboard_"),
    *("embedding", "additional_embeddings", "cloud", "oft_", "lokr_", "prior.", "transformer.", "decoder"),
    *("effnet_encoder", "quantization.", "optimizer_defaults", "secrets", "train_device", "temp_device"),
    *("dataloader_threads", "caching_threads", "vae.", "unet.", "text_encoder", "concept", "sample"),
    *("frames", "output_model_format", "lora_weight", "loss_weight_"),
    *("backup", "rolling_backup", "save_", "validat"),
    *("noising_", "min_noising", "max_noising", "mse_", "mae_", "vb_loss", "huber_", "ema", "peft_type"),
    *("layer_filter", "attention_mechanism", "non_ema", "continue_last", "device_indexes"),
)


def _prepare_onetrainer(values: dict[str, Any]) -> dict[str, Any]:
    """The concepts that are enabled, the optimizer, losses and timesteps."""
    values = dict(values)
    concepts = [concept for concept in values.pop("concepts", None) or () if concept.get("enabled", True)]
    own = {key: value for key, value in (values.pop("optimizer", None) or {}).items() if value is not None}
    kinds = [str(one.get("type", "STANDARD")) for one in concepts]
    sets = [one for one, kind in zip(concepts, kinds, strict=True) if kind == "STANDARD"]
    found = flatten(values)
    for one in sets:
        if (unit := one.get("balancing_strategy", "REPEATS")) != "REPEATS":
            found[f"balancing in {unit} of {one.get('path')}"] = one.pop("balancing", None)
    found |= flatten({"concept": (sets or [{}])[0]})
    found[SETS] = [flatten({"concept": one}) for one in sets[1:]]
    for one, kind in zip(concepts, kinds, strict=True):
        found |= {} if kind == "STANDARD" else {f"path of a concept {kind}": one.get("path")}
    if name := own.pop("optimizer", None):
        betas = [own[key] for key in ("beta1", "beta2") if key in own]
        kept = {key: own[key] for key in ("weight_decay", "eps", "momentum", "d_coef") if key in own}
        found["optimizer"] = name
        found["optimizer_args"] = kept | ({"betas": betas} if len(betas) == 2 else {})
    if found.get("unet.learning_rate"):
        found.pop("learning_rate", None)
    else:
        found.pop("unet.learning_rate", None)
    if not found.setdefault("text_encoder.train", True) or not found.get("text_encoder.learning_rate"):
        rate_of_all = values.get("learning_rate", 3e-6)
        found["text_encoder.learning_rate"] = rate_of_all if found["text_encoder.train"] else None
    if found.get("ema", "OFF") == "OFF":
        found.pop("ema_decay", None)
    for key in ("save_every", "sample_after", "validate_after"):
        if key in found:
            found[key] = (found[key], found.get(f"{key}_unit", "EPOCH"))
    if not found.get("validation"):
        found.pop("validate_after", None)
    if not found.get("masked_training"):
        for key in ("unmasked_weight", "masked_prior_preservation_weight"):
            found.pop(key, None)
    if "RESTARTS" not in str(found.get("learning_rate_scheduler")):
        found.pop("learning_rate_cycles", None)
    _resolve_noise(found)
    return found


def _resolve_noise(found: dict[str, Any]) -> None:
    """The loss, its weights and the timesteps of OneTrainer, which are spread over several keys."""
    losses = {"mse": "mse", "mae": "l1", "huber": "huber"}
    given = [losses[name] for name in losses if found.get(f"{name}_strength")]
    if len(given) > 1:
        found["a mixture of losses"] = given
    elif given:
        found["mse_strength, mae_strength, huber_strength"] = given[0]
    if given == ["huber"]:
        found["huber_schedule"] = "constant"
    else:
        found.pop("huber_delta", None)
    weight = found.pop("loss_weight_fn", "CONSTANT")
    if weight != "MIN_SNR_GAMMA":
        found.pop("loss_weight_strength", None)
    if weight == "DEBIASED_ESTIMATION":
        found["loss_weight_fn"] = True
    elif weight not in ("CONSTANT", "MIN_SNR_GAMMA"):
        found["a weight of the loss"] = weight
    low, high = (float(found.get(f"{side}_noising_strength", end)) for side, end in (("min", 0), ("max", 1)))
    if (low, high) != (0, 1):
        found["min_noising_strength, max_noising_strength"] = [round(low * 1000), round(high * 1000)]
    steep, shift = float(found.get("noising_weight", 0)), float(found.get("noising_bias", 0))
    if (kind := found.get("timestep_distribution")) == "SIGMOID":
        found["noising_weight of SIGMOID"], found["noising_bias of SIGMOID"] = steep, shift
    elif kind == "LOGIT_NORMAL":
        found["noising_bias of LOGIT_NORMAL"] = shift
        found["noising_weight of LOGIT_NORMAL"] = steep + 1


KOHYA = Trainer("sd-scripts (kohya)", "kohya", _prepare_kohya)
TOOLKIT = Trainer("ai-toolkit", "toolkit", _prepare_toolkit, _TOOLKIT_IGNORED)
ONETRAINER = Trainer("OneTrainer", "onetrainer", _prepare_onetrainer, _ONETRAINER_IGNORED)
