"""Where a base lies: a local folder or file, or a model on the Hugging Face hub brought into its cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

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
from sdlora.models.checks import SOURCES, refuse_file
from sdlora.models.components import VARIANTS, has_weights

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
            "is no folder here, is not in the hub's cache, and the hub cannot be reached "
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
