"""LoRA files on the Hugging Face Hub, by `owner/name` or `owner/name/file.safetensors`."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from sdlora.errors import AdapterError, first_line, join_names

HUB_FILE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w./ -]*\.safetensors))?")
USUAL = "pytorch_lora_weights.safetensors"
FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # no names of repositories


def fetch_adapter(source: str) -> Path | None:
    """Downloads the LoRA file of a Hub id, once, into the Hub's cache; None if it looks like a local path.

    Only safetensors files, and PEFT's configuration, are downloaded. A path whose first folder exists, or
    `folder/file.safetensors`, is a local one.

    Raises:
        AdapterError: If the Hub has no such file or several, or cannot be reached.
    """
    match = HUB_FILE.fullmatch(source)
    if match is None or Path(source).parts[0] in (".", "..") or Path(Path(source).parts[0]).exists():
        return None
    name, file = match.groups()
    if Path(name).suffix in FILE_ENDINGS:
        return None
    path = _download(name, file or USUAL)
    if not path.is_file() and file is None:
        path = _download(name, _only_file(name, _list_files(name)))
    if not path.is_file():
        raise AdapterError(f"{name} has no {file} on the Hub; check the name", key="lora.missing")
    return path


def _download(name: str, file: str) -> Path:
    """The place of a file in a snapshot of a repository, which has it if the Hub or the cache does."""
    # PEFT keeps alpha beside its file.
    wanted = [file, str(Path(file).with_name("adapter_config.json"))]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted)) / file
    except (OSError, HFValidationError) as error:
        raise _unreachable(name, error) from None


def _list_files(name: str) -> list[str]:
    try:
        return list(huggingface_hub.list_repo_files(name))
    except Exception as error:  # those of the network are not the Hub's own
        raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> AdapterError:
    problem = f"{name} is neither a local path nor a LoRA on the Hugging Face Hub"
    return AdapterError(f"{problem} ({first_line(error)}); check the name", key="lora.missing")


def _only_file(name: str, files: list[str]) -> str:
    found = sorted(file for file in files if file.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        problem = f"{name} has no .safetensors file on the Hub; pickles are not loaded"
        raise AdapterError(problem, key="lora.missing")
    problem = f"{name} has {len(found)} .safetensors files on the Hub ({join_names(found)})"
    raise AdapterError(f"{problem}; name one: {name}/{found[0]}", key="lora.missing")
