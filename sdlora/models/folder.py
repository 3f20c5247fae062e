"""A base as a diffusers folder, on disk or downloaded from the hub, described without loading weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sdlora.errors import ModelError, first_line
from sdlora.models.checks import FAMILIES, SOURCES, USE_BASE, Family, family_of, refuse_file, refuse_folder
from sdlora.models.components import (
    AGAIN,
    VARIANTS,
    BaseFiles,
    Component,
    check_dtypes,
    digest_weights,
    find_weights,
    has_weights,
    read_header,
    read_json,
    read_tokenizer_spec,
)

BUILTIN = Path(__file__).parent.parent / "builtin" / "base"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# The root is a component too: of a VAE alone.
WEIGHTS = {
    **dict.fromkeys(("", "unet/", "vae/"), "diffusion_pytorch_model"),
    **dict.fromkeys(("text_encoder/", "text_encoder_2/", "safety_checker/"), "model"),
}
TEXTS = [
    *("model_index.json", "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"),
    *(f"{part}config.json" for part in WEIGHTS),
    *(f"{name}/*{suffix}" for name in ("tokenizer", "tokenizer_2") for suffix in (".json", ".txt")),
]
OFFLINE = (
    "is not a local folder, is not in the hub's cache, and the hub cannot be reached "
    "(offline, or HF_HUB_OFFLINE is set); use a folder, or download it once while online"
)
# Why a download failed; the first row that matches counts.
REASONS = {
    GatedRepoError: "requires your consent on its page at huggingface.co, and then `hf auth login`",
    RepositoryNotFoundError: "is neither a folder nor a public model on the hub; if private: `hf auth login`",
    RevisionNotFoundError: "has no such branch, tag or commit on the hub; change base.revision",
    LocalEntryNotFoundError: OFFLINE,
    OfflineModeIsEnabled: OFFLINE,
    HFValidationError: f"is neither a folder nor a hub id; use {SOURCES}",
}


def find_base(source: str, key: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder or file of a source; `key` is the setting with its value, for error messages.

    The hub is asked only if no local path has the name.
    """
    path = BUILTIN if source == "builtin" else Path(source).expanduser()
    try:
        is_file, exists = path.is_file(), path.is_file() or path.is_dir()
    except OSError as error:
        raise ModelError(
            f"cannot read {key}: {error.strerror}; use {SOURCES}", key="base.unreadable"
        ) from None
    if revision and exists:
        raise ModelError(
            f"base.revision = {revision} applies to the hub, but {key} is local; remove base.revision",
            key="base.revision",
        )
    if is_file:
        refuse_file(path, key)
    if exists:
        return path
    if is_on_hub(source):
        return download(source, key, revision, variant)
    raise ModelError(f"{key} does not exist; use {SOURCES} such as owner/name", key="base.missing")


def is_on_hub(source: str) -> bool:
    """Whether a source is looked up on the hub, since no local path has its name."""
    is_file = source.endswith((".safetensors", ".ckpt"))
    return bool(HUB_ID.fullmatch(source)) and not is_file and not Path(source).exists()


def download(source: str, key: str, revision: str | None, variant: str | None = None) -> Path:
    """The snapshot of a hub id, with huggingface_hub's own cache, token and offline mode.

    Of each component one precision is downloaded: `variant` if the hub has it, else plain files, else any.
    """

    def fetch(missing: Iterable[str], kind: str | None) -> None:
        # Offline, the cache may have another precision than this one.
        with suppress(LocalEntryNotFoundError, OfflineModeIsEnabled):
            patterns = weight_patterns(missing, kind)
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns)

    at = f" at revision {revision}" if revision else ""
    try:
        folder = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=TEXTS))
        if variant:
            fetch(_missing_weights(folder, variant), variant)
            if not any(has_weights(folder / part, stem, variant) for part, stem in WEIGHTS.items()):
                raise no_variant(f"{key}{at}", variant)
        for kind in (None, *VARIANTS):
            if missing := _missing_weights(folder):
                fetch(missing, kind)
    except (OSError, HFValidationError) as error:  # every error of the hub is an OSError
        other = f"cannot be downloaded from the hub ({first_line(error)}); try again, or use a folder"
        reason = next((reason for kind, reason in REASONS.items() if isinstance(error, kind)), other)
        raise ModelError(f"{key}{at} {reason}", key="base.hub") from None
    return folder


def no_variant(key: str, variant: str) -> ModelError:
    """The error for a base without files of a precision."""
    return ModelError(
        f"{key} has no files of base.variant = {variant}; remove base.variant", key="base.variant"
    )


def _missing_weights(folder: Path, variant: str | None = None) -> list[str]:
    """Components without weights in a precision, or in any."""
    return [
        part
        for part, stem in WEIGHTS.items()
        if (folder / part / "config.json").is_file() and not has_weights(folder / part, stem, variant)
    ]


def weight_patterns(parts: Iterable[str], kind: str | None) -> list[str]:
    """Patterns of the weight files of some of `WEIGHTS` in a precision; None means the plain files."""
    dotted = f".{kind}" if kind else ""
    endings = (
        *(f"{dotted}.safetensors", f".safetensors.index{dotted}.json"),
        f"{dotted}-[0-9]*-of-[0-9]*.safetensors",
    )
    return [f"{part}{WEIGHTS[part]}{ending}" for part in parts for ending in endings]


def read_folder(folder: Path, key: str, variant: str | None = None) -> BaseFiles:
    """Describes a diffusers folder; a `variant`, `fp16` or `bf16`, is preferred to plain files."""
    index, family = _check_kind(folder, key)
    _check_files(folder, family, key)
    return BaseFiles(
        path=folder,
        family=family.name,
        components={
            name: read_component(folder / name, name, key, variant)
            for name in ("unet", "vae", *family.text_encoders)
        },
        tokenizers=tuple(read_tokenizer_spec(folder / name, {}) for name in family.tokenizers),
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        zeroes_empty_prompt=family.name == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def read_component(folder: Path, name: str, key: str, variant: str | None = None) -> Component:
    """Describes a folder with the `config.json` and the weights of one component; see `read_folder`."""
    config = read_json(folder / "config.json")
    files, found = find_weights(folder, WEIGHTS[f"{name}/"], key, variant)
    headers = [read_header(file) for file in files]
    for header in headers:
        check_dtypes(header, key)
    return Component(
        name=name,
        config=config,
        files=tuple(files),
        digest=digest_weights(files, config),
        num_parameters=sum(prod(shape) for header in headers for shape in header.shapes.values()),
        folder=folder,
        variant=found,
    )


def find_vae_folder(folder: Path, key: str) -> Path:
    """The folder of a VAE: the folder itself, or `vae` in that of a base; raises a ModelError for others."""
    if (folder / "vae" / "config.json").is_file():
        return folder / "vae"
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("_class_name") == "AutoencoderKL":
        return folder
    raise ModelError(
        f"{key} is not a VAE; use the folder or the .safetensors file of an AutoencoderKL, or a base",
        key="base.vae",
    )


def _check_kind(folder: Path, key: str) -> tuple[dict[str, Any], Family]:
    """The folder's index and the family; raises a ModelError for what is not a base or cannot be trained."""
    if not (folder / "model_index.json").is_file():
        raise refuse_folder(folder, key)
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if not kind.startswith("StableDiffusion") or "unet" not in index:
        raise ModelError(f"{key} is a {kind}, which is not supported; {USE_BASE}", key="base.pipeline")
    is_xl, lacks_first = has_part(index, "text_encoder_2"), not has_part(index, "text_encoder")
    if (is_xl and lacks_first) or index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{key} is an SDXL refiner; use the SDXL base, and the LoRA works with any refiner",
            key="base.refiner",
        )
    config = folder / "unet" / "config.json"
    unet = read_json(config) if config.is_file() else {}
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ModelError(
            f"{key} has a {unet['_class_name']} as its UNet; {USE_BASE}", key="base.architecture"
        )
    return index, FAMILIES["sdxl" if is_xl or "XL" in kind else family_of(unet)]


def has_part(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has a component; diffusers writes [null, null] for one that was left out."""
    entry = index.get(part)
    return isinstance(entry, list) and bool(entry[0])


def _check_files(folder: Path, family: Family, key: str) -> None:
    """Refuses an interrupted copy; the message names every missing file."""
    needed = [f"{part}/config.json" for part in ("unet", "vae", *family.text_encoders)]
    needed.append("scheduler/scheduler_config.json")
    for name in family.tokenizers:
        if not (folder / name / "tokenizer.json").is_file():
            needed += [f"{name}/vocab.json", f"{name}/merges.txt"]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise ModelError(
            f"{key} is incomplete: {folder} lacks {', '.join(missing)}; {AGAIN}", key="base.incomplete"
        )
