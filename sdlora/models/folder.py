"""A base as a diffusers folder, told by its JSON files and tensor tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.errors import ModelError
from sdlora.models.checks import GIVE_BASE, refuse_folder
from sdlora.models.components import (
    BaseFiles,
    Component,
    TokenizerSpec,
    check_dtypes,
    count_parameters,
    digest_weights,
    find_weights,
    read_header,
    read_json,
    read_tokenizer_spec,
)
from sdlora.models.families import FAMILIES, family_of


def read_folder(folder: Path, key: str, variant: str | None = None) -> BaseFiles:
    """What a folder holds.

    Args:
        folder: With `model_index.json`.
        key: The setting with its value, to open the error message with.
        variant: `fp16` or `bf16`, to be taken before plain files where it is there.

    Raises:
        ModelError: If it is incomplete, or of a kind that sdlora does not train.
    """
    index, family = _check_kind(folder, key)
    encoders, tokenizers = FAMILIES[family].text_encoders, FAMILIES[family].tokenizers
    _check_files(folder, encoders, tokenizers, key)
    return BaseFiles(
        path=folder,
        family=family,
        components={
            name: read_component(folder / name, name, key, variant) for name in ("unet", "vae", *encoders)
        },
        tokenizers=tuple(_read_tokenizer(folder / name) for name in tokenizers),
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        zeroes_empty_prompt=family == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def read_component(folder: Path, name: str, key: str, variant: str | None = None) -> Component:
    """One part of a base, in a folder of its own.

    Args:
        folder: With `config.json` and weights.
        name: As diffusers calls the part.
        key: The setting with its value, to open the error message with.
        variant: As for `read_folder`.

    Raises:
        ModelError: If weights are missing, cut short, or of a kind that is not read.
    """
    config = read_json(folder / "config.json")
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    files, found = find_weights(folder, stem, key, variant)
    for file in files:
        check_dtypes(read_header(file), key)
    return Component(
        name=name,
        config=config,
        files=tuple(files),
        digest=digest_weights(files, config),
        num_parameters=count_parameters(files),
        folder=folder,
        variant=found,
    )


def find_vae_folder(folder: Path, key: str) -> Path:
    """Where the VAE is in a folder that is one, or that is a base with one.

    Raises:
        ModelError: If it is neither.
    """
    if (folder / "vae" / "config.json").is_file():
        return folder / "vae"
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("_class_name") == "AutoencoderKL":
        return folder
    raise ModelError(
        f"{key} is no VAE; give the folder of an AutoencoderKL (config.json and weights), "
        "a VAE's .safetensors file, or a base"
    )


def _check_kind(folder: Path, key: str) -> tuple[dict[str, Any], str]:
    """The folder's index, and the family's name.

    Raises:
        ModelError: If it is no base, or one that cannot be trained.
    """
    if not (folder / "model_index.json").is_file():
        raise refuse_folder(folder, key)
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if not kind.startswith("StableDiffusion") or "unet" not in index:
        raise ModelError(f"{key} is a {kind}, which sdlora does not train; {GIVE_BASE}")
    lacks_first = _has(index, "text_encoder_2") and not _has(index, "text_encoder")
    if lacks_first or index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{key} is an SDXL refiner, which reworks the images of a base; "
            "give the SDXL base, and the LoRA works beside any refiner"
        )
    config = folder / "unet" / "config.json"
    unet = read_json(config) if config.is_file() else {}
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ModelError(f"{key} has a {unet['_class_name']} for its UNet; {GIVE_BASE}")
    return index, "sdxl" if _has(index, "text_encoder_2") or "XL" in kind else family_of(unet)


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has a part; diffusers writes [null, null] for one that was left out."""
    entry = index.get(part)
    return isinstance(entry, list) and bool(entry[0])


def _check_files(folder: Path, encoders: Sequence[str], tokenizers: Sequence[str], key: str) -> None:
    """Names every part that an interrupted copy left out."""
    needed = [f"{part}/config.json" for part in ("unet", "vae", *encoders)]
    needed.append("scheduler/scheduler_config.json")
    for name in tokenizers:
        if not (folder / name / "tokenizer.json").is_file():
            needed += [f"{name}/vocab.json", f"{name}/merges.txt"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{key} is incomplete: {folder} lacks {', '.join(missing)}; download or copy it again"
        )


def _read_tokenizer(folder: Path) -> TokenizerSpec:
    file = folder / "tokenizer_config.json"
    length = read_json(file).get("model_max_length") if file.is_file() else None
    return read_tokenizer_spec(folder, {}, int(length) if length else None)
