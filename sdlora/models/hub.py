"""Where a base lies: a local folder, or a model on the Hugging Face hub brought into its cache."""

from __future__ import annotations

import re
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

from sdlora.errors import ModelError
from sdlora.models.kinds import refuse_file

BUILTIN = Path(__file__).parent.parent / "builtin" / "base"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
PARTS = ("scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae")
WANTED = ["*.json", "diffusion_pytorch_model*.safetensors"] + [
    f"{part}/*{suffix}" for part in PARTS for suffix in (".json", ".txt", ".safetensors")
]
UNWANTED = [
    "*.fp16.*",
    "*.bf16.*",
    "*non_ema*",
    "*openvino*",
    "*flax*",
    "safety_checker/*",
    "image_encoder/*",
]


def find_folder(source: str, key: str, revision: str | None = None) -> Path:
    """The folder that a source means; what exists here is never looked for on the hub (R-39).

    Args:
        source: `builtin`, a folder, or a hub id `owner/name`.
        key: The setting with its value, to open the error message with.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ModelError: If it is neither here nor on the hub, or is a file.
    """
    if source == "builtin":
        if not BUILTIN.is_dir():
            raise ModelError(f"{key}: {BUILTIN} is missing from this installation; install sdlora again")
        return BUILTIN
    path = Path(source).expanduser()
    if path.is_file():
        raise refuse_file(path, key)
    if path.is_dir():
        return path
    if HUB_ID.fullmatch(source) and not source.endswith((".safetensors", ".ckpt")):
        return download(source, key, revision)
    raise ModelError(f"{key} does not exist; give builtin, a diffusers folder or a hub id such as owner/name")


def download(source: str, key: str, revision: str | None) -> Path:
    """The snapshot of a hub id, by huggingface_hub's own cache, token and offline conventions.

    Raises:
        ModelError: If it is not there, not allowed, or not reachable.
    """
    at = f" at revision {revision}" if revision else ""
    try:
        folder = snapshot_download(source, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED)
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
        reason = "is neither a folder here nor a hub id; give builtin, a diffusers folder or a hub id"
    except (HfHubHTTPError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = f"cannot be fetched from the hub ({first}); try again, or give a folder"
    else:
        return Path(folder)
    raise ModelError(f"{key}{at} {reason}")
