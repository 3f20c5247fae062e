"""LoRA files on the Hugging Face Hub, by `owner/name` or `owner/name/file.safetensors`."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from sdlora.errors import AdapterError, first_line, join_names

HUB_FILE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w./ -]*\.safetensors))?")
USUAL = "pytorch_lora_weights.safetensors"


def fetch_adapter(source: str) -> Path | None:
    """Downloads the LoRA file of a Hub id, once, into the Hub's own cache; None if a text is no such id.

    Only safetensors files are downloaded. A path whose first folder exists is a local one.

    Raises:
        AdapterError: If the Hub has no such file or several, or cannot be reached.
    """
    match = HUB_FILE.fullmatch(source)
    if match is None or Path(source).parts[0] in (".", "..") or Path(Path(source).parts[0]).exists():
        return None
    name, file = match.groups()
    try:
        if file is None:
            try:
                return Path(huggingface_hub.hf_hub_download(name, USUAL))
            except EntryNotFoundError:
                file = _only_file(name, huggingface_hub.list_repo_files(name))
        if Path(file).name == "adapter_model.safetensors":
            # PEFT keeps alpha beside its file.
            with suppress(EntryNotFoundError):
                huggingface_hub.hf_hub_download(name, f"{file.removesuffix('model.safetensors')}config.json")
        return Path(huggingface_hub.hf_hub_download(name, file))
    except (OSError, HFValidationError) as error:  # every error of the Hub is an OSError
        problem = f"{source} is neither a local path nor a LoRA on the Hugging Face Hub"
        raise AdapterError(f"{problem} ({first_line(error)}); check the name", key="lora.missing") from None


def _only_file(name: str, files: list[str]) -> str:
    found = sorted(file for file in files if file.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        problem = f"{name} has no .safetensors file on the Hub; pickles are not loaded"
        raise AdapterError(problem, key="lora.missing")
    problem = f"{name} has {len(found)} .safetensors files on the Hub ({join_names(found)})"
    raise AdapterError(f"{problem}; name one: {name}/{found[0]}", key="lora.missing")
