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


class SdloraError(Exception):
    """Base of all errors; the message is one line that names the remedy."""

    exit_code = 2


class ConfigError(SdloraError):
    """One or more settings are wrong.

    Args:
        problems: One line for each mistake, all of those found.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


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

    def __init__(self, message: str, exit_code: int = 1, *, is_told: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.is_told = is_told


class RunStopped(SdloraError):
    """A signal stopped the run after its state was saved.

    Args:
        message: How to go on.
        signal_number: The signal; the exit code is 128 plus it (130, 143).
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
