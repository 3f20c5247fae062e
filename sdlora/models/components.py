"""Where the parts of a base lie on the disk, in a diffusers folder or in one file, and how they are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlora.models.weights import digest_weights


@dataclass(frozen=True, eq=False)
class Part:
    """A UNet, a VAE or a text encoder.

    Args:
        name: As diffusers calls it, such as `text_encoder_2`.
        config: What its `config.json` says, or would say.
        files: The safetensors files that hold its weights.
        digest: Fingerprint of its weights and its configuration.
        num_parameters: How many numbers it has.
        folder: The folder that diffusers or transformers loads it from; None in a single file.
        variant: What stands in the names of the folder's files, such as `fp16`.
        prefix: Of its tensors in a single file.
    """

    name: str
    config: Mapping[str, Any] = field(repr=False)
    files: tuple[Path, ...]
    digest: str
    num_parameters: int
    folder: Path | None = None
    variant: str | None = None
    prefix: str = ""


@dataclass(frozen=True, eq=False)
class Words:
    """A tokenizer.

    Args:
        folder: With its vocabulary.
        digest: Fingerprint of its files and settings.
        settings: What the folder does not say, such as `pad_token`.
        length: The longest prompt in tokens that it allows; None if it sets no limit.
    """

    folder: Path
    digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """A base as it lies on the disk.

    Args:
        path: The folder, or the file.
        family: Its name in the table of families.
        parts: By diffusers' names; a single file may lack the VAE.
        words: A tokenizer for each text encoder.
        scheduler_config: Betas and prediction type.
        zeroes_empty_prompt: Whether its pipeline takes zeros for the text states of an empty prompt.
        notices: What had to be assumed, for people.
    """

    path: Path
    family: str
    parts: Mapping[str, Part]
    words: tuple[Words, ...]
    scheduler_config: Mapping[str, Any] = field(repr=False)
    zeroes_empty_prompt: bool = False
    notices: tuple[str, ...] = ()


def read_words(folder: Path, settings: Mapping[str, Any], length: int | None) -> Words:
    """The tokenizer of a folder; see `Words`."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".txt")]
    return Words(folder, digest_weights(files, settings), settings, length)
