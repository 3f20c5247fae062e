"""What an adapter stands on: its ancestors by the digest of their tensors, written into its file.

A child is right only on top of the adapters that it was trained on. Files may be moved and renamed: what
counts is what they hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sdlora.errors import AdapterError, shorten
from sdlora.lora.adapter import Adapter
from sdlora.lora.container import digest_tensors, read_lora_header
from sdlora.lora.files import load_adapter
from sdlora.lora.formats import adapter_to_diffusers
from sdlora.lora.names import is_kohya_key

PARENT, LINEAGE, HASH = "sdlora.parent", "sdlora.lineage", "sshs_model_hash"
ENDING, KOHYA_ENDING = ".safetensors", ".kohya.safetensors"


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An adapter that another one was trained on top of."""

    name: str
    """As it was called then."""
    digest: str
    """SHA-256 of the tensors of its diffusers file."""
    strength: float = 1.0
    """As it was mounted."""

    def __str__(self) -> str:
        return f"{self.name} ({short(self.digest)})"


def short(digest: str) -> str:
    """The first characters of a digest, as user interfaces show it."""
    return digest[:12]


def digest_adapter(adapter: Adapter) -> str:
    """SHA-256 of the tensors of the adapter's diffusers file: the file's own `sshs_model_hash`.

    Args:
        adapter: In the dtype of its file (`load_adapter(path, dtype=None)`).
    """
    return digest_tensors(adapter_to_diffusers(adapter))


def digest_file(path: Path) -> str:
    """The digest of a LoRA file, computed; files of one adapter in several dialects have the same."""
    return digest_adapter(load_adapter(path, dtype=None))


def noted_digest(path: Path) -> str | None:
    """The digest that a diffusers file names in its header; None if the file must be read to know it."""
    header = read_lora_header(path)
    return None if any(map(is_kohya_key, header.shapes)) else header.metadata.get(HASH)


def read_lineage(notes: Mapping[str, str]) -> tuple[Ancestor, ...]:
    """The ancestors that a file's metadata names, the root first.

    Raises:
        AdapterError: If the metadata is damaged; completes "FILE ...".
    """
    parent = notes.get(PARENT)
    if not parent:
        return ()
    try:
        chain = tuple(
            Ancestor(shorten(str(item["name"])), shorten(str(item["digest"])), float(item["strength"]))
            for item in json.loads(notes.get(LINEAGE) or "[]")
        )
        if not all(math.isfinite(ancestor.strength) for ancestor in chain):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise AdapterError(f"holds {LINEAGE} that cannot be read; export the LoRA again") from None
    if chain and chain[-1].digest != parent:
        raise AdapterError(
            f"names the parent {shorten(short(parent))} in {PARENT}, but {chain[-1]} in {LINEAGE}; "
            "export the LoRA again"
        )
    return chain or (Ancestor("its parent", parent),)


def lineage_notes(ancestors: Sequence[Ancestor]) -> dict[str, str]:
    """The metadata that names the ancestors; none for a root."""
    if not ancestors:
        return {}
    chain = json.dumps([asdict(ancestor) for ancestor in ancestors], ensure_ascii=False)
    return {PARENT: ancestors[-1].digest, LINEAGE: chain}


def lineage_below(name: str, parent: Adapter, strength: float = 1.0) -> tuple[Ancestor, ...]:
    """The ancestors of a child of an adapter, the root first.

    Args:
        name: What the parent is called.
        parent: In the dtype of its file.
        strength: As it is mounted.
    """
    return (*read_lineage(parent.notes), Ancestor(name, digest_adapter(parent), strength))


def explain_refusal(child: str, expected: Ancestor, found: str, digest: str | None) -> str | None:
    """Why a child must not be used as things are: an error, and with `--force` a warning.

    Args:
        child: What to call it.
        expected: As the child's file names it.
        found: What to call the one that is there; where it was looked for, if there is none.
        digest: Of that one; None if there is none.

    Returns:
        What was expected and what was found; None if that is the same.
    """
    if digest == expected.digest:
        return None
    trained = f"{child} was trained on {expected}"
    if digest is None:
        return f"{trained}, which is not {found}; put that file there (--force goes without it)"
    return f"{trained}, but {found} is {short(digest)} now; put the old file back (--force takes this one)"
