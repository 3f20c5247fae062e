"""A base in one `.safetensors` file, in the layouts of the original SD 1.x, SD 2.x and SDXL code.

Names and shapes of its tensors describe it; `configs/` has the rest. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import pstdev
from typing import Any

from sdlora.errors import ModelError
from sdlora.models.checks import SDXL, USE_BASE, refuse_tensors
from sdlora.models.components import (
    AGAIN,
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
from sdlora.models.infer_config import Shapes, text_config, unet_config, vae_config
from sdlora.reading import Header

CONFIGS = Path(__file__).parent / "configs"
TEXT_LENGTH = 77

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = "conditioner.embedders.0.model."  # the text encoder of SD 2 in later code, and of SDXL's refiner
# Families by the prefixes of their text encoders; the first row that is complete counts.
TEXTS = (
    ("sdxl", ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")),
    ("sd1", ("cond_stage_model.transformer.",)),
    ("sd2", ("cond_stage_model.model.",)),
    ("sd2", (FIRST,)),
)

# ComfyUI distinguishes Stable Diffusion 2 UNets by this bias, which spreads wider in v-prediction.
SD2_BIAS, SD2_SPREAD = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
# Prediction types by the metadata entries of modelspec.
PREDICTION_TYPES = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "epsilon": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
# Settings of a VAE that do not follow from shapes.
VAE_SETTINGS = (
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
    "sample_size",
)


@dataclass(frozen=True)
class _File:
    """A safetensors file with its header, and the setting with its value for error messages."""

    path: Path
    header: Header
    key: str

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.header.shapes)

    def read_component(
        self, name: str, prefix: str, known: Mapping[str, Any], infer: Callable[[Shapes], dict[str, Any]]
    ) -> Component:
        """Describes one component: `infer` makes the settings that are not `known` from its shapes."""
        shapes = {
            tensor.removeprefix(prefix): shape
            for tensor, shape in self.header.shapes.items()
            if tensor.startswith(prefix)
        }
        check_dtypes(self.header, self.key, prefix)
        try:
            config = {**known, **infer(shapes)}
        except ModelError as error:
            raise ModelError(f"{self.key}: {error}", key=error.keys[0]) from None
        except (LookupError, ValueError, ArithmeticError) as error:
            lack = f", without {error.args[0]}" if isinstance(error, KeyError) else ""
            raise ModelError(
                f"{self.key} is incomplete, or the layout of its {name} is unknown "
                f"({len(shapes)} tensors{lack}); {AGAIN}, or use a diffusers folder",
                key="base.incomplete",
            ) from None
        return Component(
            name=name,
            config=config,
            files=(self.path,),
            digest=digest_weights(spans_of(self.path, self.header, prefix), config),
            num_parameters=sum(map(prod, shapes.values())),
            prefix=prefix,
        )


def read_single_file(path: Path, key: str, prediction_type: str | None = None) -> BaseFiles:
    """Describes a base in one file, with a prediction type if the user forces it; its VAE may be missing."""
    file = _File(path, read_header(path), key)
    if not file.has(UNET):
        raise refuse_tensors(file.header.shapes, key)
    family, prefixes = _find_texts(file)
    _refuse_others(file, family)
    prediction, notices = (prediction_type, ()) if prediction_type else _find_prediction(file, family)
    known = read_known(family, prediction)
    scheduler = {**known["scheduler"], "prediction_type": prediction}
    if "ztsnr" in file.header.shapes:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    infer_text = partial(text_config, drop_last=family == "sd2")
    components = {
        name: file.read_component(name, prefix, known[name], infer_text) for name, prefix in prefixes.items()
    }
    pooled = components["text_encoder_2"].config["projection_dim"] if family == "sdxl" else 0
    components["unet"] = file.read_component("unet", UNET, known["unet"], partial(unet_config, pooled=pooled))
    if file.has(VAE):
        components["vae"] = file.read_component("vae", VAE, known["vae"], vae_config)
    return BaseFiles(
        path=path,
        family=family,
        components=components,
        tokenizers=tuple(
            read_tokenizer_spec(CONFIGS / "clip", settings, TEXT_LENGTH) for settings in known["tokenizers"]
        ),
        scheduler_config=scheduler,
        zeroes_empty_prompt=family == "sdxl",
        notices=notices,
    )


def read_known(family: str, prediction_type: str = "epsilon") -> dict[str, Any]:
    """Settings of a family that do not follow from shapes, by component."""
    row = "sd2-v" if (family, prediction_type) == ("sd2", "v_prediction") else family
    return read_json(CONFIGS / f"{row}.json")


def read_vae_file(path: Path, key: str, like: Mapping[str, Any]) -> Component:
    """Describes the VAE of a file, by original or diffusers' names, or that of a base in one file.

    Settings that do not follow from shapes are those of `like`, the base's own VAE.
    """
    file = _File(path, read_header(path), key)
    if file.has(UNET):
        components = read_single_file(path, key).components
        if "vae" not in components:
            raise ModelError(
                f"{key} is a base without a VAE; use a VAE, or a base with one", key="base.no-vae"
            )
        return components["vae"]
    prefix = VAE if file.has(VAE) else ""
    if f"{prefix}decoder.conv_in.weight" not in file.header.shapes:
        raise refuse_tensors(file.header.shapes, key)
    known = {name: like[name] for name in VAE_SETTINGS if name in like}
    return file.read_component("vae", prefix, known, vae_config)


def _find_texts(file: _File) -> tuple[str, dict[str, str]]:
    """The family, and the prefix of each text encoder; raises a ModelError if one is missing."""
    for family, prefixes in TEXTS:
        if all(file.has(prefix) for prefix in prefixes):
            return family, dict(zip(SDXL.text_encoders, prefixes, strict=False))
    found = [prefix for _, prefixes in TEXTS for prefix in prefixes if file.has(prefix)]
    raise ModelError(
        f"{file.key} has a UNet but not its text encoders (found: {', '.join(found) or 'none'}); {USE_BASE}",
        key="base.no-text-encoder",
    )


def _refuse_others(file: _File, family: str) -> None:
    """Refuses a refiner, an EDM or unCLIP base, and another architecture."""
    names = file.header.shapes
    is_other = family == "sd2" and f"{UNET}label_emb.0.0.weight" in names
    is_edm = "edm_mean" in names or "edm_vpred.sigma_max" in names
    problems = {
        "base.architecture": (
            "has a denoiser other than a UNet",
            f"{UNET}input_blocks.0.0.weight" not in names,
        ),
        "base.refiner": ("is an SDXL refiner", is_other and file.has(FIRST)),
        "base.other-inputs": ("is an unCLIP base, which starts from images", is_other),
        "base.method": ("was trained with EDM, which is not supported", is_edm),
    }
    for kind, (problem, applies) in problems.items():
        if applies:
            raise ModelError(f"{file.key} {problem}; {USE_BASE}", key=kind)


def _find_prediction(file: _File, family: str) -> tuple[str, tuple[str, ...]]:
    """The prediction type, and a notice if it is an assumption."""
    if "v_pred" in file.header.shapes:
        return "v_prediction", ()
    for name in ("modelspec.prediction_type", "modelspec.architecture"):
        if found := PREDICTION_TYPES.get(file.header.metadata.get(name, "").lower()):
            return found, ()
    kind, reason = "epsilon", f"as is usual for {family}"
    if family == "sd2" and SD2_BIAS in file.header.shapes:
        spread = pstdev(read_values(file.path, file.header, SD2_BIAS))
        kind = "v_prediction" if spread > SD2_SPREAD else "epsilon"
        reason = f"by the spread of a bias ({spread:.2f}), as in ComfyUI"
    return kind, (
        f"{file.path.name} does not name its prediction type: {kind} is assumed, {reason}; if that is wrong, "
        "set objective.prediction_type and objective.force_prediction_type=true",
    )
