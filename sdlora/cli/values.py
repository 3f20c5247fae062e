"""Reads the values of options."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, TypeVar

import typer

from sdlora.config import BaseSection, ObjectiveSection, load_config
from sdlora.errors import ConfigError, shorten
from sdlora.reading import UnfitFileError, read_bytes
from sdlora.runs import RunFolder

MAX_PROMPTS_BYTES = 2**20
Number = TypeVar("Number", int, float)


def parse_numbers(text: str | None, kind: type[Number], option: str) -> list[Number] | None:
    """`0.5,1` becomes [0.5, 1.0].

    Raises:
        ConfigError: If it is no list of numbers.
    """
    if text is None:
        return None
    try:
        return [_finite(kind(part)) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} {shorten(text)} must be numbers with commas between them, such as 0,1"
        ) from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`768x512` becomes (768, 512).

    Raises:
        ConfigError: If it is no size.
    """
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(text) < 12):
        raise ConfigError(f"--size {shorten(text)} must be WIDTHxHEIGHT, such as 768x512")
    return int(width), int(height)


def check_base(settings: BaseSection, objective: ObjectiveSection | None = None) -> None:
    """Looks at a base that is on this machine: that takes no torch, whose import costs seconds.

    Raises:
        SdloraError: If it is no base, or not whole.
    """
    from sdlora.models.hub import is_on_hub
    from sdlora.models.info import inspect_base

    if not any(is_on_hub(source) for source in (settings.source, settings.vae) if source):
        inspect_base(settings, objective)


def check_png(path: Path | None, option: str) -> None:
    """Refuses an image in place of what is no image, such as the file that is drawn.

    Raises:
        ConfigError: If it is not called as a PNG file.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(f"{option} {shorten(str(path))} must end in .png, which is what is written")


def note_newest(*sources: Path) -> None:
    """Says which adapter stands for a run that has no final one.

    Raises:
        RunError: If a run has none at all.
    """
    for run in map(RunFolder, sources):
        if run.config_file.is_file() and (file := run.adapter).stem.startswith("step-"):
            typer.echo(f"note: {run.path} is not finished; its newest adapter is taken, {file.name}")


def sample_settings(
    prompt: list[str] | None, prompts: Path | None, seeds: str | None, **others: Any
) -> dict[str, Any]:
    """What was given of the section `sample`, checked before torch is imported.

    Args:
        prompt: Texts of `--prompt`.
        prompts: The file of `--prompts`.
        seeds: As typed.
        others: The section's other keys; None for what was not given.

    Raises:
        ConfigError: If one of them is no value of its key.
    """
    given = {
        "prompts": [*(prompt or []), *(read_prompts(prompts) if prompts else [])] or None,
        "seeds": parse_numbers(seeds, int, "--seeds"),
        **others,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    # Prompts are checked where the trigger of a run or a file is known.
    load_config(None, {f"sample.{name}": value for name, value in changes.items() if name != "prompts"})
    return changes


def read_prompts(file: Path) -> list[str]:
    """A prompt on each line; empty lines and those that start with # are left out.

    Raises:
        ConfigError: If the file cannot be read, holds none, or has sd-scripts' options in a line.
    """
    try:
        lines = read_bytes(file, MAX_PROMPTS_BYTES).decode("utf-8-sig").splitlines()
    except UnfitFileError as error:
        raise ConfigError(f"--prompts {file} {error}; give a text file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file} cannot be read: {error}") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ConfigError(f"--prompts {file} holds no prompt; write one on each line")
    if found := next(filter(None, (re.search(r"\s--[a-z]{1,3}\s", prompt) for prompt in prompts)), None):
        raise ConfigError(
            f"--prompts {file} has sd-scripts' option {found[0].strip()} behind a prompt; leave such out, "
            "and give --negative-prompt, --size, --seeds, --steps and --guidance for all prompts"
        )
    return prompts


def parse_strengths(text: str | None) -> dict[str, float]:
    """`ink=0.5,ink/portraits=1` becomes {"ink": 0.5, "ink/portraits": 1.0}.

    Raises:
        ConfigError: If it is something else.
    """
    try:
        pairs = (part.rpartition("=") for part in (text or "").split(",") if part)
        return {name.strip(): _finite(float(number)) for name, _, number in pairs}
    except ValueError:
        raise ConfigError(
            f"--strengths {shorten(text or '')} must be NODE=NUMBER, such as ink=0.5,ink/portraits=1"
        ) from None


def _finite(number: Number) -> Number:
    """The number; ValueError if it is infinite or none."""
    if not -math.inf < number < math.inf:
        raise ValueError
    return number
