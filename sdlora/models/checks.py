"""Model families, and whether a base's configurations are those of one that can be trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sdlora.config import PredictionType
from sdlora.errors import ModelError, join_names, shorten
from sdlora.models.components import Component, read_json
from sdlora.reading import PICKLES


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of Stable Diffusion.

    Args:
        name: Our word for it, as written into files.
        title: As people say it.
        kohya_version: `ss_base_model_version`.
        kohya_v2: `ss_v2`.
        architecture: `modelspec.architecture` without its `/lora`.
        resolution: The side in pixels that it was trained for, where its own configuration is silent.
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


def family_of(denoiser_config: Mapping[str, Any]) -> str:
    """The family, by what conditions the denoiser; widths do not decide, since small variants exist."""
    if denoiser_config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if denoiser_config.get("use_linear_projection") else "sd1"


def describe_family(name: str, prediction_type: str) -> Family:
    """The row of the table; Stable Diffusion 2 has one for each prediction type."""
    if name == "sd2" and prediction_type == "v_prediction":
        return SD2_V
    return FAMILIES[name]


SOURCES = "builtin, a diffusers folder, a .safetensors file of a whole base, or a hub id"
GIVE_BASE = "give an SD 1.x, SD 2.x or SDXL base"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CLASSES = {
    "AutoencoderKL": "a VAE alone",
    "UNet2DConditionModel": "a UNet alone",
    "ControlNetModel": "a ControlNet",
    "CLIPTextModel": "a text encoder alone",
    "CLIPTextModelWithProjection": "a text encoder alone",
}


def refuse_file(path: Path, key: str) -> None:
    """Names a file that holds no tensors, or may hold more than tensors.

    Args:
        path: An existing file.
        key: The setting with its value, such as `base.source = model.ckpt`.

    Raises:
        ModelError: Unless it is a safetensors file.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as handle:
        start = handle.read(8)
    if suffix in PICKLES or start[:2] in (b"PK", b"\x80\x02"):
        raise ModelError(
            f"{key} is a pickle, which can run any code when it is read; "
            "get it as .safetensors, or convert it with a tool that you trust"
        )
    if suffix in IMAGES:
        raise ModelError(f"{key} is an image; give {SOURCES}")
    if suffix != ".safetensors":
        what = f"a {suffix} file" if suffix else "a file"
        raise ModelError(f"{key} is {what}, not a model; give {SOURCES}")


def describe_tensors(names: Iterable[str]) -> str:
    """Describes a safetensors file that is not a base, by the names of its tensors, and what to do."""
    names = list(names)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("lora_", ".lora.", "hada_", "lokr_"):
        return "is a LoRA file, not a base; give the base it was made for, and the LoRA to `sdlora sample`"
    if has("control_model.", "controlnet_"):
        return f"is a ControlNet, not a base; give {SOURCES}"
    if has("model.diffusion_model."):
        return f"is a UNet with its text encoders or a whole base, and no VAE alone; {GIVE_BASE}"
    if has("double_blocks.", "joint_blocks.", "transformer_blocks.0.attn.add_q_proj"):
        return f"is a transformer of another architecture than Stable Diffusion's UNet; {GIVE_BASE}"
    if has("down_blocks.", "input_blocks.") and has("time_embedding.", "time_embed."):
        return (
            "is a UNet alone; give the whole base: a folder with model_index.json, or one file with all parts"
        )
    if has("decoder.conv_in", "decoder.up"):
        return "is a VAE alone; give a base, and this as base.vae"
    if has("text_model.", "token_embedding"):
        return "is a text encoder alone; give the whole base"
    first = ", ".join(names[:3])
    return f"is not a base (its tensors are {first} ...); give {SOURCES}"


def refuse_folder(folder: Path, key: str) -> ModelError:
    """The error for a folder without `model_index.json`.

    Args:
        folder: An existing folder.
        key: The setting with its value.
    """
    names = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())
    if "events.jsonl" in names or "adapters/" in names:
        return ModelError(f"{key} is a run of sdlora, not a base; give the base that the run was trained on")
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return ModelError(f"{key} is a LoRA folder, not a base; give the base it was made for")
    remedy = "give the folder that holds model_index.json"
    if (folder.parent / "model_index.json").is_file():
        remedy = f"give {folder.parent}"
    inner = [name for name in names if (folder / name / "model_index.json").is_file()]
    if inner:
        remedy = f"did you mean {folder / inner[0]}?"
    if "config.json" in names:
        config = read_json(folder / "config.json")
        kind = str(config.get("_class_name") or (config.get("architectures") or [""])[0])
        if kind:
            extra = ", and this as base.vae" if kind == "AutoencoderKL" else ""
            return ModelError(f"{key} is {CLASSES.get(kind, f'a {kind}')}, not a base; {remedy}{extra}")
    return ModelError(
        f"{key} is not a diffusers folder: no model_index.json "
        f"(it holds {join_names(names, 6) or 'nothing'}); {remedy}"
    )


PREDICTIONS: tuple[PredictionType, ...] = get_args(PredictionType)
NUM_TIME_IDS = 6
CHANNELS = {5: "a depth", 7: "an upscaling", 8: "an instruct-pix2pix", 9: "an inpainting"}

# What is computed with before anything is built; whatever else is odd stops the building.
COUNTS = {
    "unet": (
        *("in_channels", "out_channels", "block_out_channels", "cross_attention_dim", "sample_size"),
        *("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    ),
    "vae": ("latent_channels", "block_out_channels"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "max_position_embeddings", "projection_dim"),
}
CLIP_TEXT = ("clip_text_model", "clip")
# Inputs of a UNet beside text and SDXL's sizes.
OTHER_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")
# Schedulers of other ways to train: what they call noise is not what betas say.
OTHER_WAYS = {"EDM": "the EDM way", "FlowMatch": "by flow matching"}


def check_part(part: Component) -> None:
    """Refuses a part of another class, and numbers that are none.

    Raises:
        ModelError: Naming the file and what it says.
    """
    config, place = part.config, part.folder / "config.json" if part.folder else part.files[0]
    kind = part.name.removesuffix("_2")
    vae, text = config.get("_class_name", "AutoencoderKL"), config.get("model_type", CLIP_TEXT[0])
    if kind == "vae" and vae != "AutoencoderKL":
        raise ModelError(f"{place} is of {_article(vae)}, not an AutoencoderKL; give one with base.vae")
    if kind == "text_encoder" and text not in CLIP_TEXT:
        raise ModelError(f"{place} is of {_article(text)}, not CLIP's text encoder; {GIVE_BASE}")
    for key in COUNTS[kind]:
        value = config.get(key)
        counts = value if isinstance(value, list | tuple) else [value]
        if value is not None and not (counts and all(type(count) is int and count > 0 for count in counts)):
            raise ModelError(
                f"{place}: {key} = {shorten(repr(value))} must be whole numbers above 0; "
                "download or copy it again"
            )
    scale = config.get("scaling_factor", 1.0)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ModelError(
            f"{place}: scaling_factor = {shorten(repr(scale))} must be a number above 0; "
            "download or copy it again"
        )


def _article(name: Any) -> str:
    word = shorten(str(name))
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def check_latents(unet: Mapping[str, Any], vae: Mapping[str, Any], key: str) -> None:
    """Refuses a UNet and a VAE that cannot work together."""
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latent and unet.get("out_channels", 4) == latent:
        raise ModelError(
            f"{key} is {CHANNELS.get(channels, 'an inpainting or depth')} base "
            f"(UNet {channels} channels, VAE {latent}); "
            "give the text-to-image base of the family"
        )
    if channels != latent:
        raise ModelError(
            f"{key}: the UNet takes {channels} latent channels, the VAE makes {latent}; give a VAE that fits"
        )


def check_inputs(unet: Mapping[str, Any], key: str) -> None:
    """Refuses a UNet that must be told what neither captions nor sizes say."""
    others = {name: unet[name] for name in OTHER_INPUTS if unet.get(name)}
    if unet.get("addition_embed_type") not in (None, "text_time"):
        others["addition_embed_type"] = unet["addition_embed_type"]
    for name, value in others.items():
        raise ModelError(
            f"{key} has a UNet that reads more than text ({name} = {shorten(repr(value))} in its "
            f"config.json), which sdlora does not give it; {GIVE_BASE}"
        )


def check_texts(unet: Mapping[str, Any], texts: Sequence[Mapping[str, Any]], key: str) -> None:
    """Refuses a UNet and text encoders that cannot work together."""
    width, given = unet.get("cross_attention_dim", 1280), sum(text.get("hidden_size", 0) for text in texts)
    if given != width:
        raise ModelError(
            f"{key}: the UNet reads text of width {width}, "
            f"the text encoder{'s' * (len(texts) > 1)} give {given}; the parts are of different bases"
        )
    if unet.get("addition_embed_type") == "text_time":
        wanted = unet.get("projection_class_embeddings_input_dim")
        sizes, pooled = (
            NUM_TIME_IDS * unet.get("addition_time_embed_dim", 256),
            texts[-1].get("projection_dim", 512),
        )
        if wanted != sizes + pooled:
            raise ModelError(
                f"{key}: the UNet reads pooled text and sizes of width {wanted}, here they have "
                f"{pooled} and {sizes}; the parts are of different bases"
            )


def check_prediction(scheduler: Mapping[str, Any], key: str) -> None:
    name = str(scheduler.get("_class_name"))
    for start, way in OTHER_WAYS.items():
        if name.startswith(start):
            raise ModelError(
                f"{key} was trained {way} ({shorten(name)}), which sdlora does not train; "
                "give a base with an ordinary scheduler"
            )
    kind = scheduler.get("prediction_type") or "epsilon"
    if kind not in PREDICTIONS:
        raise ModelError(
            f"{key}: prediction_type = {kind!r} in its scheduler_config.json is not known; "
            f"it must be one of {', '.join(PREDICTIONS)}"
        )
