"""A base as a diffusers folder, found on the disk or downloaded from the hub, and described by its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sdlora.errors import ModelError, first_line
from sdlora.models.checks import FAMILIES, GIVE_BASE, SOURCES, family_of, refuse_file, refuse_folder
from sdlora.models.components import (
    VARIANTS,
    BaseFiles,
    Component,
    TokenizerSpec,
    check_dtypes,
    count_parameters,
    digest_weights,
    find_weights,
    has_weights,
    read_header,
    read_json,
    read_tokenizer_spec,
)

BUILTIN = Path(__file__).parent.parent / "builtin" / "base"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
WORDS = ("tokenizer", "tokenizer_2")
# The root is a part too: of a VAE that stands alone.
WEIGHTS = {
    "": "diffusion_pytorch_model",
    "unet/": "diffusion_pytorch_model",
    "vae/": "diffusion_pytorch_model",
    "text_encoder/": "model",
    "text_encoder_2/": "model",
    "safety_checker/": "model",
}
TEXTS = [
    *("model_index.json", "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"),
    *(f"{part}config.json" for part in WEIGHTS),
    *(f"{name}/*{suffix}" for name in WORDS for suffix in (".json", ".txt")),
]


def find_base(source: str, key: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder or file that a source means; what exists here is never looked for on the hub (R-39).

    Args:
        source: `builtin`, a folder, a `.safetensors` file, or a hub id `owner/name`.
        key: The setting with its value, to open the error message with.
        revision: Branch, tag or commit of a hub id.
        variant: `fp16` or `bf16`, to be fetched instead of plain files where the hub has it.

    Raises:
        ModelError: If it is neither here nor on the hub, or is a file of another kind.
    """
    path = BUILTIN if source == "builtin" else Path(source).expanduser()
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:
        raise ModelError(f"{key} cannot be read: {error.strerror}; give {SOURCES}") from None
    if revision and (is_file or is_folder):
        raise ModelError(
            f"base.revision = {revision} is for a base on the hub, and {key} is here; leave base.revision out"
        )
    if source == "builtin":
        if not BUILTIN.is_dir():
            raise ModelError(f"{key}: {BUILTIN} is missing from this installation; install sdlora again")
        return BUILTIN
    if is_file:
        refuse_file(path, key)
        return path
    if is_folder:
        return path
    if is_on_hub(source):
        return download(source, key, revision, variant)
    raise ModelError(f"{key} does not exist; give {SOURCES} such as owner/name")


def is_on_hub(source: str) -> bool:
    """Whether a source is to be looked for on the hub, since nothing here has its name."""
    is_file = source.endswith((".safetensors", ".ckpt"))
    return bool(HUB_ID.fullmatch(source)) and not is_file and not Path(source).exists()


def download(source: str, key: str, revision: str | None, variant: str | None = None) -> Path:
    """The snapshot of a hub id, by huggingface_hub's own cache, token and offline conventions.

    Of each part one precision is fetched: `variant` if the hub has it, else the plain files, else any.

    Raises:
        ModelError: If it is not there, not allowed, or not reachable.
    """
    at = f" at revision {revision}" if revision else ""
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=TEXTS))
        if variant:
            _fetch(source, revision, weight_patterns(_lacking(folder, variant), variant))
            if not any(has_weights(folder / part, stem, variant) for part, stem in WEIGHTS.items()):
                raise ModelError(f"{key}{at} {lacks_variant(variant)}")
        for kind in (None, *VARIANTS):
            if lacking := _lacking(folder):
                _fetch(source, revision, weight_patterns(lacking, kind))
    except GatedRepoError:
        reason = "needs your consent on its page at huggingface.co, and then `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is neither a folder here nor a model on the hub (or it is private: `hf auth login`)"
    except RevisionNotFoundError:
        reason = "is on the hub, but not at this base.revision; give a branch, a tag or a commit of it"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = (
            "is not a local folder, is not in the hub's cache, and the hub cannot be reached "
            "(offline, or HF_HUB_OFFLINE is set); give a folder, or download it once while online"
        )
    except HFValidationError:
        reason = f"is neither a folder here nor a hub id; give {SOURCES}"
    except (HfHubHTTPError, OSError) as error:
        reason = f"cannot be fetched from the hub ({first_line(error)}); try again, or give a folder"
    else:
        return folder
    raise ModelError(f"{key}{at} {reason}")


def lacks_variant(variant: str) -> str:
    """The end of the message for a base without files of the precision that was asked for."""
    return f"has no files of base.variant = {variant}; leave base.variant out"


def _lacking(folder: Path, variant: str | None = None) -> list[str]:
    """Parts without weights in a precision, or in any."""
    return [
        part
        for part, stem in WEIGHTS.items()
        if (folder / part / "config.json").is_file() and not has_weights(folder / part, stem, variant)
    ]


def weight_patterns(parts: Iterable[str], kind: str | None) -> list[str]:
    """What the weights of some parts are called in one precision.

    Args:
        parts: From `WEIGHTS`.
        kind: `fp16`, `bf16`, or None for the plain files.
    """
    dotted = f".{kind}" if kind else ""
    return [
        part + name
        for part in parts
        for name in (
            f"{WEIGHTS[part]}{dotted}.safetensors",
            f"{WEIGHTS[part]}.safetensors.index{dotted}.json",
            f"{WEIGHTS[part]}{dotted}-[0-9]*-of-[0-9]*.safetensors",
        )
    ]


def _fetch(source: str, revision: str | None, patterns: list[str]) -> None:
    """Fetches files where there are any; offline the cache may hold another precision than this one."""
    with suppress(LocalEntryNotFoundError, OfflineModeIsEnabled):
        snapshot_download(source, revision=revision, allow_patterns=patterns)


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
        f"{key} is not a VAE; give the folder of an AutoencoderKL (config.json and weights), "
        "a VAE's .safetensors file, or a base"
    )


def _check_kind(folder: Path, key: str) -> tuple[dict[str, Any], str]:
    """The folder's index, and the family's name.

    Raises:
        ModelError: If it is not a base, or one that cannot be trained.
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
