"""A base in one `.safetensors` file, in the layouts of the original SD 1.x, SD 2.x and SDXL code.

Told by the names and shapes of its tensors; what those do not say stands in `configs/`. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from statistics import pstdev
from typing import Any

from sdlora.errors import ModelError
from sdlora.models.checks import GIVE_BASE, describe_tensors
from sdlora.models.components import (
    BaseFiles,
    Component,
    check_dtypes,
    digest_weights,
    read_header,
    read_json,
    read_tokenizer_spec,
    read_values,
    spans_of,
)
from sdlora.models.infer_config import Shapes, clip_config, open_clip_config, unet_config, vae_config
from sdlora.reading import Header

CONFIGS = Path(__file__).parent / "configs"
TEXT_LENGTH = 77

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, CLIP_OF_SDXL = "cond_stage_model.transformer.", "conditioner.embedders.0.transformer."
OPEN_CLIP, OPEN_CLIP_OF_SDXL = "cond_stage_model.model.", "conditioner.embedders.1.model."
OPEN_CLIP_FIRST = "conditioner.embedders.0.model."  # of SD 2 as later code writes it, and of SDXL's refiner

# ComfyUI tells Stable Diffusion 2 UNets apart by this bias, which spreads wider where v is predicted.
SD2_BIAS, SD2_SPREAD = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09


SAID = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "epsilon": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
# What the shapes of a VAE do not say.
UNSAID = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size")


def is_original(names: Iterable[str]) -> bool:
    """Whether these are names of the tensors of a base in one file."""
    return any(name.startswith(UNET) for name in names)


def read_single_file(path: Path, key: str, prediction_type: str | None = None) -> BaseFiles:
    """What a file holds; its VAE may be missing.

    Args:
        path: A safetensors file with the tensors of a UNet.
        key: The setting with its value, to open the error message with.
        prediction_type: What its UNet predicts, where the user knows it.

    Raises:
        ModelError: If it is cut short, or of a kind that sdlora does not train.
    """
    header = read_header(path)
    if not is_original(header.shapes):
        raise ModelError(f"{key} {describe_tensors(header.shapes)}")
    family, prefixes = _find_texts(header, key)
    _refuse_others(header, family, key)
    prediction, notices = (prediction_type, ()) if prediction_type else _find_prediction(path, header, family)
    facts = read_facts(family, prediction)
    scheduler = {**facts["scheduler"], "prediction_type": prediction}
    if "ztsnr" in header.shapes:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

    def read(name: str, prefix: str, derive: Callable[[Shapes], dict[str, Any]]) -> Component:
        return read_component(
            path, header, name, prefix, lambda shapes: {**facts[name], **derive(shapes)}, key
        )

    parts = {
        name: read(name, prefix, lambda shapes: _text_config(shapes, family))
        for name, prefix in prefixes.items()
    }
    pooled = parts["text_encoder_2"].config["projection_dim"] if family == "sdxl" else 0
    parts["unet"] = read("unet", UNET, lambda shapes: unet_config(shapes, pooled))
    if has_tensors(header, VAE):
        parts["vae"] = read("vae", VAE, vae_config)
    tokenizers = tuple(
        read_tokenizer_spec(CONFIGS / "clip", settings, TEXT_LENGTH) for settings in facts["tokenizers"]
    )
    return BaseFiles(path, family, parts, tokenizers, scheduler, family == "sdxl", notices)


def read_facts(family: str, prediction_type: str = "epsilon") -> dict[str, Any]:
    """What the weights of a family do not say, by part."""
    row = "sd2-v" if (family, prediction_type) == ("sd2", "v_prediction") else family
    return read_json(CONFIGS / f"{row}.json")


def read_vae_file(path: Path, key: str, like: Mapping[str, Any]) -> Component:
    """The VAE of a file that holds nothing else, by original or diffusers' names, or of a base in one file.

    Args:
        path: A safetensors file.
        key: The setting with its value, to open the error message with.
        like: The configuration of the base's own VAE: says what shapes do not, such as the scaling.

    Raises:
        ModelError: If it has no VAE.
    """
    header = read_header(path)
    if is_original(header.shapes):
        parts = read_single_file(path, key).components
        if "vae" not in parts:
            raise ModelError(f"{key} is a base without a VAE; give a VAE, or a base that has one")
        return parts["vae"]
    prefix = VAE if has_tensors(header, VAE) else ""
    if f"{prefix}decoder.conv_in.weight" not in header.shapes:
        raise ModelError(f"{key} is not a VAE: it {describe_tensors(header.shapes)}")
    unsaid = {name: like[name] for name in UNSAID if name in like}
    return read_component(path, header, "vae", prefix, lambda shapes: {**unsaid, **vae_config(shapes)}, key)


def read_component(
    path: Path, header: Header, name: str, prefix: str, derive: Callable[[Shapes], dict[str, Any]], key: str
) -> Component:
    """One part of a file.

    Args:
        path: The file.
        header: Of the file.
        name: As diffusers calls the part.
        prefix: Of its tensors.
        derive: Makes its configuration from the shapes of its tensors.
        key: The setting with its value, to open the error message with.

    Raises:
        ModelError: If tensors are missing that every part of its kind has.
    """
    shapes = {
        tensor.removeprefix(prefix): at for tensor, at in header.shapes.items() if tensor.startswith(prefix)
    }
    check_dtypes(header, key, prefix)
    try:
        config = derive(shapes)
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from None
    except (LookupError, ValueError, ArithmeticError) as error:
        lack = f", {error.args[0]} is not among them" if isinstance(error, KeyError) else ""
        raise ModelError(
            f"{key} is incomplete, or its {name} is of an unknown layout ({len(shapes)} tensors{lack}); "
            "download or copy it again, or give a diffusers folder"
        ) from None
    return Component(
        name=name,
        config=config,
        files=(path,),
        digest=digest_weights(spans_of(path, header, prefix), config),
        num_parameters=sum(map(prod, shapes.values())),
        prefix=prefix,
    )


def has_tensors(header: Header, prefix: str) -> bool:
    """Whether there are tensors with a prefix."""
    return any(name.startswith(prefix) for name in header.shapes)


def _find_texts(header: Header, key: str) -> tuple[str, dict[str, str]]:
    """The family, and the prefix of each text encoder.

    Raises:
        ModelError: If a text encoder is missing (SDXL has two).
    """
    if has_tensors(header, OPEN_CLIP_OF_SDXL):
        if not has_tensors(header, CLIP_OF_SDXL):
            raise ModelError(f"{key} lacks the first text encoder of SDXL ({CLIP_OF_SDXL}...); {GIVE_BASE}")
        return "sdxl", {"text_encoder": CLIP_OF_SDXL, "text_encoder_2": OPEN_CLIP_OF_SDXL}
    if has_tensors(header, CLIP):
        return "sd1", {"text_encoder": CLIP}
    for prefix in (OPEN_CLIP, OPEN_CLIP_FIRST):
        if has_tensors(header, prefix):
            return "sd2", {"text_encoder": prefix}
    raise ModelError(f"{key} holds a UNet but no text encoder that sdlora knows; {GIVE_BASE} that is whole")


def _refuse_others(header: Header, family: str, key: str) -> None:
    """Names what has the layout of a base, but is none.

    Raises:
        ModelError: For a refiner, an EDM or unCLIP base, or another architecture.
    """
    names = header.shapes
    if f"{UNET}input_blocks.0.0.weight" not in names:
        raise ModelError(
            f"{key} is a model of another architecture than Stable Diffusion's UNet; {GIVE_BASE}"
        )
    if family == "sd2" and f"{UNET}label_emb.0.0.weight" in names:
        is_refiner = has_tensors(header, OPEN_CLIP_FIRST)
        what = "an SDXL refiner, which reworks" if is_refiner else "an unCLIP base, which starts from"
        raise ModelError(f"{key} is {what} images; {GIVE_BASE}")
    if "edm_mean" in names or "edm_vpred.sigma_max" in names:
        raise ModelError(f"{key} was trained the EDM way, which sdlora does not train; {GIVE_BASE}")


def _find_prediction(path: Path, header: Header, family: str) -> tuple[str, tuple[str, ...]]:
    """The prediction type, and a notice where it had to be assumed (R-32)."""
    if "v_pred" in header.shapes:
        return "v_prediction", ()
    for name in ("modelspec.prediction_type", "modelspec.architecture"):
        if found := SAID.get(header.metadata.get(name, "").lower()):
            return found, ()
    kind, why = "epsilon", f"as is usual for {family}"
    if family == "sd2" and SD2_BIAS in header.shapes:
        spread = pstdev(read_values(path, header, SD2_BIAS))
        kind = "v_prediction" if spread > SD2_SPREAD else "epsilon"
        why = f"by the spread of a bias ({spread:.2f}), as ComfyUI tells it"
    return kind, (
        f"{path.name} does not say what its UNet predicts: {kind} is assumed, {why}; if that is wrong, "
        "set objective.prediction_type and objective.force_prediction_type=true",
    )


def _text_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """Of either kind of text encoder, told by its names."""
    if "positional_embedding" in shapes:
        return open_clip_config(shapes, drop_last=family == "sd2")
    return clip_config({f"text_model.{name.removeprefix('text_model.')}": at for name, at in shapes.items()})
