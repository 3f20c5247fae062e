"""Every error that a user can meet.

SdloraError
├── ConfigError        a setting is unknown, of the wrong type, out of range, or in conflict with another
├── DataError          the image folder or a caption is missing or unreadable
├── ModelError         the base is missing, incomplete or of another kind
├── AdapterError       a LoRA file is damaged, of another kind or for another family
├── RunError           a run folder is missing, taken or incomplete
├── TrainingDiverged   the run itself failed: non-finite numbers, dead modules
├── ProcessLost        another process of the run ended, or does not answer
└── RunStopped         a signal stopped the run; its state is saved
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
    """The characters of a text that would break a line, steer a terminal, or fit in no file.

    Control characters, halves of surrogate pairs, line and paragraph separators; not joiners and spaces,
    which scripts and emoji need.
    """
    if text.isprintable():
        return set()
    return {letter for letter in set(text) if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")}


def one_line(text: str) -> str:
    """A text with its unfit letters escaped."""
    unfit = unfit_letters(text)
    return "".join(repr(letter)[1:-1] if letter in unfit else letter for letter in text) if unfit else text


def shorten(text: str) -> str:
    """A value in a message: on one line however long it is and whatever it holds."""
    return one_line(_cut(text, MAX_SHOWN))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def join_names(names: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """The first names, then how many more there are."""
    listed = list(names)
    rest = len(listed) - limit
    shown = separator.join(listed[:limit])
    return f"{shown} and {rest} more" if rest > 0 else shown


class SdloraError(Exception):
    """Base of all errors; the message is one line that names the remedy.

    Args:
        message: What, the value seen, the setting as the user spells it, what to do.
        key: Stable name of the mistake, such as `data.no-images`. Wordings change, keys do not; those of
            wrong settings are the settings' names.
    """

    exit_code = 2

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.keys: tuple[str, ...] = (key,) if key else ()

    def __str__(self) -> str:
        return "\n".join(one_line(_cut(line, MAX_LINE)) for line in super().__str__().split("\n"))


class ConfigError(SdloraError):
    """One or more settings are wrong.

    Args:
        problems: One line for each mistake; of thousands, which nobody made by hand, the first.
        key: Where no setting is at fault; else `keys` are the settings that the lines begin with.
    """

    def __init__(self, *problems: str, key: str = "") -> None:
        if len(problems) > MAX_PROBLEMS:
            problems = (*problems[:MAX_PROBLEMS], f"and more mistakes, {len(problems):,} or more in all")
        super().__init__("\n".join(problems), key=key)
        self.problems = problems
        self.keys += tuple(found[0] for line in problems if (found := _SETTING.match(line)))


class DataError(SdloraError):
    """The image folder cannot be used as asked."""


class ModelError(SdloraError):
    """The base cannot be used as asked."""


class AdapterError(SdloraError):
    """A LoRA file, or an adapter in memory, cannot be used as asked."""


class RunError(SdloraError):
    """A run folder cannot be used as asked."""


class TrainingDiverged(SdloraError):
    """Training produced numbers that no later step can repair."""

    exit_code = 1


class ProcessLost(SdloraError):
    """Another process of the run ended, or does not answer; this one cannot go on alone.

    Args:
        message: Which one and why, as far as it could say.
        exit_code: That of the other process, where it could say.
        is_told: Whether the process that ended could say why.
    """

    def __init__(
        self, message: str, exit_code: int = 1, *, is_told: bool = False, key: str = "process-lost"
    ) -> None:
        super().__init__(message, key=key)
        self.exit_code = exit_code
        self.is_told = is_told


class RunStopped(SdloraError):
    """A signal stopped the run after its state was saved.

    Args:
        message: How to go on.
        signal_number: The signal; the exit code is 128 plus it (130, 143).
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, key="stopped")
        self.exit_code = 128 + signal_number


def first_line(error: object) -> str:
    """The first line of another library's error, to be quoted in one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
