"""Preflight for a base: `sdlora.data.doctor` with the size and the tokenizer of an inspected base."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from sdlora.config import RunConfig
from sdlora.data.doctor import Checkup, check_images
from sdlora.data.records import Finding
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.tokenizer import count_tokens, load_tokenizer


def check_folder(config: RunConfig, sheet: Path | None = None) -> Checkup:
    """Examines the image folder as `train` would.

    Args:
        config: `images`, `base` and `data` are used.
        sheet: Path of the contact sheet to draw.

    Raises:
        SdloraError: If there are no images at all, or the base is missing.
        ConfigError: If the sheet would be one of the images.
    """
    return check_for_base(config, inspect_base(config.base, config.objective), sheet)


def check_for_base(config: RunConfig, info: BaseInfo, sheet: Path | None = None) -> Checkup:
    """Examines the image folder with the tokenizer and size of an inspected base."""
    checkup = check_images(
        config,
        resolution=info.resolution,
        min_step=info.min_step,
        count_tokens=partial(count_tokens, load_tokenizer(info), info.text_length),
        sheet=sheet,
    )
    return replace(checkup, findings=[*(Finding("notice", text) for text in info.notices), *checkup.findings])
