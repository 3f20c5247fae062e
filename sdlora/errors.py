"""Every error that users can encounter.

SdloraError
├── ConfigError        a setting is unknown, of the wrong type, out of range, or in conflict with another
├── DataError          the image folder, an image or a caption is missing or unreadable
├── ModelError         the base is missing, incomplete or not supported
├── AdapterError       a LoRA file is damaged, not supported or for another family
├── RunError           a run folder is missing, already used or incomplete
├── TrainingDiverged   training failed: non-finite numbers, modules without gradients
├── ProcessLost        another process of the run failed or does not respond
└── RunStopped         a signal stopped the run after saving a checkpoint
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MAX_SHOWN = 200
MAX_LINE = 2000
MAX_PROBLEMS = 40
_SETTING = re.compile(r"[a-z_]+\.[a-z_0-9]+")


def unfit_letters(text: str) -> set[str]:
    """Characters that break lines, control terminals or cannot be encoded.

    Control characters, lone surrogates, line and paragraph separators; but not joiners and spaces, which
    scripts and emoji need.
    """
    if text.isprintable():
        return set()
    return {letter for letter in set(text) if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")}


def one_line(text: str) -> str:
    unfit = unfit_letters(text)
    return "".join(repr(letter)[1:-1] if letter in unfit else letter for letter in text) if unfit else text


def shorten(text: str) -> str:
    """A value for a message: short, on one line."""
    return one_line(_cut(text, MAX_SHOWN))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def join_names(names: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """Lists the first names, and the number of others."""
    listed = list(names)
    shown = separator.join(listed[:limit])
    return f"{shown} and {len(listed) - limit} more" if len(listed) > limit else shown


class SdloraError(Exception):
    """Base class of all errors.

    Args:
        message: One line: what is wrong, the value, the setting as the user spells it, what to do.
        key: Stable name of the mistake, such as `data.no-images`, or the setting. Messages may change, keys
            do not.
        exit_code: By default that of the class.
    """

    exit_code = 2

    def __init__(self, message: str, *, key: str = "", exit_code: int | None = None) -> None:
        super().__init__(message)
        self.keys: tuple[str, ...] = (key,) if key else ()
        self.exit_code = exit_code or type(self).exit_code

    def __str__(self) -> str:
        return "\n".join(one_line(_cut(line, MAX_LINE)) for line in super().__str__().split("\n"))


class ConfigError(SdloraError):
    """One or more settings are wrong.

    Args:
        problems: One line per mistake; only the first ones are kept.
        key: Name of the mistake if it is not about a setting; else `keys` are the settings that the lines
            begin with.
    """

    def __init__(self, *problems: str, key: str = "") -> None:
        if len(problems) > MAX_PROBLEMS:
            problems = (*problems[:MAX_PROBLEMS], f"and more mistakes, {len(problems):,} or more in all")
        super().__init__("\n".join(problems), key=key)
        self.problems = problems
        self.keys += tuple(found[0] for line in problems if (found := _SETTING.match(line)))


class DataError(SdloraError):
    """The image folder cannot be used."""


class ModelError(SdloraError):
    """The base model cannot be used."""


class AdapterError(SdloraError):
    """A LoRA file, or an adapter in memory, cannot be used."""


class RunError(SdloraError):
    """A run folder cannot be used."""


class TrainingDiverged(SdloraError):
    """Training produced values that no later step can repair."""

    exit_code = 1


class ProcessLost(SdloraError):
    """Another process of the run failed or does not respond, so this one stops too.

    Args:
        message: Which process, and its error if known.
        exit_code: Of the other process, if known.
        is_explained: Whether the other process could report its error.
    """

    def __init__(
        self, message: str, exit_code: int = 1, *, is_explained: bool = False, key: str = "process-lost"
    ) -> None:
        super().__init__(message, key=key)
        self.exit_code = exit_code
        self.is_explained = is_explained


class RunStopped(SdloraError):
    """A signal stopped the run after a checkpoint was saved; the exit code is 128 plus its number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, key="stopped")
        self.exit_code = 128 + signal_number


def first_line(error: object) -> str:
    """The first line of another library's error, to quote it in a message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
