"""Model families, and the checks that a base is one of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from sdlora.config import PredictionType
from sdlora.errors import ModelError, join_names, shorten
from sdlora.models.components import AGAIN, Component, read_json
from sdlora.models.infer_config import NUM_TIME_IDS
from sdlora.reading import PICKLES


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of Stable Diffusion.

    Args:
        kohya_version: `ss_base_model_version`.
        kohya_v2: `ss_v2`.
        architecture: `modelspec.architecture` without its `/lora`.
        resolution: Side in pixels of its training images, if its own configuration has none.
        pipeline: The stock diffusers pipeline class.
        text_encoders: Folder names of its text encoders.
    """

    name: str
    title: str
    kohya_version: str
    kohya_v2: bool
    architecture: str
    resolution: int
    pipeline: str = "StableDiffusionPipeline"
    text_encoders: tuple[str, ...] = ("text_encoder",)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Folder names of its tokenizers, one for each text encoder."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)


SD1 = Family("sd1", "Stable Diffusion 1.x", "sd_v1", False, "stable-diffusion-v1", 512)
SD1_V = replace(SD1, kohya_version="sd_v1_v")
SD2 = Family("sd2", "Stable Diffusion 2.x", "sd_v2", True, "stable-diffusion-v2-512", 512)
SD2_V = Family("sd2", "Stable Diffusion 2.x", "sd_v2_v", True, "stable-diffusion-v2-768-v", 768)
SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    "sdxl_base_v1-0",
    False,
    "stable-diffusion-xl-v1-base",
    1024,
    "StableDiffusionXLPipeline",
    ("text_encoder", "text_encoder_2"),
)

FAMILIES = {family.name: family for family in (SD1, SD2, SDXL)}
V_FAMILIES = {family.name: family for family in (SD1_V, SD2_V)}


def family_of(denoiser_config: Mapping[str, Any]) -> str:
    """The family, by the inputs of the UNet; its widths do not decide, since small variants exist."""
    if denoiser_config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if denoiser_config.get("use_linear_projection") else "sd1"


SOURCES = "builtin, a diffusers folder, a .safetensors file of a whole base, or a hub id"
USE_BASE = "use an SD 1.x, SD 2.x or SDXL base"
# Patterns of tensor names, and what a file with them is. The first one that matches counts.
FILES = {
    "base.is-lora": (r"lora_|\.lora\.|hada_|lokr_", "a LoRA file; use the base it was made for"),
    "base.is-controlnet": (r"control_model\.|controlnet_", "a ControlNet; use a base"),
    "base.architecture": (r"(double|joint)_blocks\.|\.attn\.add_q_proj", f"a transformer; {USE_BASE}"),
    "base.is-unet": (r"time_embed(ding)?\.", "a UNet alone; use the whole base"),
    "base.is-vae": (r"decoder\.(conv_in|up)", "a VAE alone; use a base, and pass this file as base.vae"),
    "base.is-text-encoder": (r"text_model\.|token_embedding", "a text encoder alone; use the whole base"),
}


def refuse_file(path: Path, key: str) -> None:
    """Refuses an existing file that is not a safetensors file, by its name and its first bytes."""
    suffix = path.suffix.lower()
    with path.open("rb") as handle:
        start = handle.read(8)
    if suffix in PICKLES or start[:2] in (b"PK", b"\x80\x02"):
        raise ModelError(
            f"{key} is a pickle, which can run code when opened; "
            "download it as .safetensors, or convert it with a tool that you trust",
            key="base.pickle",
        )
    if suffix != ".safetensors":
        kind = f"a {suffix} file" if suffix else "a file without suffix"
        raise ModelError(f"{key} is {kind}, not a model; use {SOURCES}", key="base.not-a-model")


def refuse_tensors(names: Iterable[str], key: str) -> ModelError:
    """The error for a safetensors file that is not a base, by the names of its tensors."""
    listed = list(names)
    for kind, (pattern, description) in FILES.items():
        if any(re.search(pattern, name) for name in listed):
            return ModelError(f"{key} is {description}", key=kind)
    first = join_names(listed, 3)
    return ModelError(f"{key} is not a base (its tensors: {first}); use {SOURCES}", key="base.not-a-base")


def refuse_folder(folder: Path, key: str) -> ModelError:
    """The error for an existing folder without `model_index.json`."""
    names = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())
    if "events.jsonl" in names or "adapters/" in names:
        return ModelError(
            f"{key} is a run of sdlora, not a base; use the base of that run", key="base.is-a-run"
        )
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return ModelError(
            f"{key} is a LoRA folder, not a base; use the base it was made for", key="base.is-lora"
        )
    remedy = "use the folder with model_index.json"
    if (folder.parent / "model_index.json").is_file():
        remedy = f"use {folder.parent}"
    elif inner := [name for name in names if (folder / name / "model_index.json").is_file()]:
        remedy = f"use {folder / inner[0]}"
    config = read_json(folder / "config.json") if "config.json" in names else {}
    if kind := str(config.get("_class_name") or (config.get("architectures") or [""])[0]):
        extra = ", and pass this folder as base.vae" if kind == "AutoencoderKL" else ""
        return ModelError(f"{key} has a {kind} alone, not a base; {remedy}{extra}", key="base.component")
    return ModelError(
        f"{key} is not a diffusers folder: it has no model_index.json "
        f"(found: {join_names(names, 6) or 'no files'}); {remedy}",
        key="base.not-a-base",
    )


PREDICTIONS: tuple[PredictionType, ...] = get_args(PredictionType)
CHANNELS = {5: "a depth", 7: "an upscaling", 8: "an instruct-pix2pix", 9: "an inpainting"}

# Values that are used before the network is built; other invalid values are errors of building it.
COUNTS = {
    "unet": (
        *("in_channels", "out_channels", "block_out_channels", "cross_attention_dim", "sample_size"),
        *("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    ),
    "vae": ("latent_channels", "block_out_channels"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "max_position_embeddings", "projection_dim"),
}
# The setting that names a component's class, and its supported values.
CLASSES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "vae": ("_class_name", ("AutoencoderKL",), "set base.vae to an AutoencoderKL"),
    "text_encoder": ("model_type", ("clip_text_model", "clip"), USE_BASE),
}
# Inputs of a UNet besides text and SDXL's sizes.
OTHER_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")
# Schedulers whose noise does not follow from betas.
OTHER_METHODS = ("EDM", "FlowMatch")


def check_base(
    components: Mapping[str, Component], scheduler: Mapping[str, Any], key: str, vae_key: str
) -> None:
    """Refuses components that cannot be trained, or that do not fit together.

    `key` is the setting of the base with its value, for error messages, and `vae_key` that of the VAE.
    """
    for component in components.values():
        _check_component(component)
    unet = components["unet"].config
    _check_inputs(unet, key)
    _check_latents(unet, components["vae"].config, vae_key)
    _check_texts(unet, [part.config for name, part in components.items() if "text_encoder" in name], key)
    _check_scheduler(scheduler, key)


def _check_component(part: Component) -> None:
    """Refuses another class, and sizes that are not numbers above 0."""
    config, place = part.config, part.folder / "config.json" if part.folder else part.files[0]
    kind = part.name.removesuffix("_2")
    name, supported, remedy = CLASSES.get(kind, ("", ("",), ""))
    found = config.get(name, supported[0])
    if found not in supported:
        raise ModelError(
            f"{place}: {name} = {shorten(repr(found))} is not supported; {remedy}", key=f"base.{kind}"
        )
    for name in COUNTS[kind]:
        value = config.get(name)
        counts = value if isinstance(value, list | tuple) else [value]
        if value is not None and not (counts and all(type(count) is int and count > 0 for count in counts)):
            raise _invalid(place, name, value, "whole numbers")
    scale = config.get("scaling_factor", 1.0)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise _invalid(place, "scaling_factor", scale, "a number")


def _invalid(place: Path, name: str, value: object, kind: str) -> ModelError:
    return ModelError(
        f"{place}: {name} = {shorten(repr(value))} must be {kind} above 0; {AGAIN}", key="base.config"
    )


def _check_inputs(unet: Mapping[str, Any], key: str) -> None:
    """Refuses a UNet with inputs that neither captions nor image sizes provide."""
    others = {name: unet[name] for name in OTHER_INPUTS if unet.get(name)}
    if unet.get("addition_embed_type") not in (None, "text_time"):
        others["addition_embed_type"] = unet["addition_embed_type"]
    for name, value in others.items():
        raise ModelError(
            f"{key}: its UNet needs inputs besides text, which is not supported ({name} = "
            f"{shorten(repr(value))} in its config.json); {USE_BASE}",
            key="base.other-inputs",
        )


def _check_latents(unet: Mapping[str, Any], vae: Mapping[str, Any], key: str) -> None:
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels == latent:
        return
    if unet.get("out_channels", 4) == latent:
        raise ModelError(
            f"{key} is {CHANNELS.get(channels, 'an inpainting or depth')} base (UNet {channels} channels, "
            f"VAE {latent}); use the text-to-image base of the family",
            key="base.not-text-to-image",
        )
    raise ModelError(
        f"{key}: the UNet reads {channels} latent channels, the VAE makes {latent}; use a VAE that fits",
        key="base.latents",
    )


def _check_texts(unet: Mapping[str, Any], texts: Sequence[Mapping[str, Any]], key: str) -> None:
    wanted, found = unet.get("cross_attention_dim", 1280), sum(text.get("hidden_size", 0) for text in texts)
    states = "text states"
    if wanted == found and unet.get("addition_embed_type") == "text_time":
        sizes = NUM_TIME_IDS * unet.get("addition_time_embed_dim", 256)
        wanted = unet.get("projection_class_embeddings_input_dim")
        found, states = sizes + texts[-1].get("projection_dim", 512), "pooled text and sizes"
    if wanted != found:
        raise ModelError(
            f"{key}: the UNet reads {states} of width {wanted}, its text encoders make {found}; "
            "the components are of different bases",
            key="base.text-states",
        )


def _check_scheduler(scheduler: Mapping[str, Any], key: str) -> None:
    """Refuses other noise than that of betas, and unknown prediction types."""
    name = str(scheduler.get("_class_name"))
    if name.startswith(OTHER_METHODS):
        raise ModelError(
            f"{key} was trained with unsupported noise ({shorten(name)}); {USE_BASE}",
            key="base.method",
        )
    kind = scheduler.get("prediction_type") or "epsilon"
    if kind not in PREDICTIONS:
        raise ModelError(
            f"{key}: prediction_type = {kind!r} in its scheduler_config.json must be one of "
            f"{', '.join(PREDICTIONS)}",
            key="base.prediction-type",
        )
