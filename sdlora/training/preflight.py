"""`sdlora doctor`: everything that can be known about an image folder without a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdlora.config import RunConfig
from sdlora.data.buckets import BucketPlan
from sdlora.data.dataset import read_dataset
from sdlora.data.doctor import contact_sheet, examine, summary
from sdlora.data.records import DatasetIndex, Finding
from sdlora.errors import ConfigError
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.tokenizer import count_tokens, load_tokenizer
from sdlora.writing import write_file


@dataclass(frozen=True)
class Checkup:
    """What the doctor found.

    Args:
        summary: Images, captions, buckets.
        findings: Errors, warnings, notices.
        sheet: Where the contact sheet was written, if it was asked for.
    """

    summary: list[str]
    findings: list[Finding]
    sheet: Path | None = None

    @property
    def has_errors(self) -> bool:
        """Whether training would refuse the folder."""
        return any(finding.severity == "error" for finding in self.findings)

    def lines(self) -> list[str]:
        """As printed."""
        lines = [*self.summary, *(f"{finding.severity}: {finding.message}" for finding in self.findings)]
        if self.sheet is not None:
            lines.append(f"contact sheet: {self.sheet}")
        return [*lines, "not ready to train" if self.has_errors else "ready to train"]


def check_folder(config: RunConfig, sheet: Path | None = None) -> Checkup:
    """Examines the image folder as `train` would.

    Args:
        config: `images`, `base` and `data` are used.
        sheet: Where to draw what the model will see.

    Raises:
        SdloraError: If there are no images at all, or the base is not there.
        ConfigError: If the sheet would be one of the images.
    """
    if sheet is not None and Path(os.path.realpath(sheet)).is_relative_to(os.path.realpath(config.images)):
        raise ConfigError(
            f"--contact-sheet {sheet} is in the image folder and would be trained on; give another place"
        )
    info = inspect_base(config.base, config.objective)
    index, buckets = read_dataset(config, resolution=info.resolution, min_step=info.min_step)
    findings, lines = examine_images(config, info, index, buckets)
    if sheet is not None:
        drawing = contact_sheet(index, buckets, config.data)
        write_file(sheet, lambda path: drawing.save(path, format="PNG"))
    return Checkup(lines, findings, sheet)


def examine_images(
    config: RunConfig, info: BaseInfo, index: DatasetIndex, buckets: BucketPlan
) -> tuple[list[Finding], list[str]]:
    """What preflight says of images and captions: findings, and the lines of a summary."""
    count = partial(count_tokens, load_tokenizer(info), info.text_length)
    findings = [Finding("notice", text) for text in info.notices]
    findings += examine(index, buckets, config.data, count)
    return findings, summary(index, buckets, count)
