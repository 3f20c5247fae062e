"""The silence of libraries that talk while they load: their advice is for other programs than this one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

LIBRARIES = {"diffusers": diffusers_logging, "transformers": transformers_logging}


@contextmanager
def without_bars() -> Iterator[None]:
    """Mutes diffusers' and transformers' progress bars; then all is put back."""
    bars = [module for module in LIBRARIES.values() if module.is_progress_bar_enabled()]
    try:
        for module in bars:
            module.disable_progress_bar()
        yield
    finally:
        for module in bars:
            module.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Mutes diffusers' and transformers' warnings and progress bars; errors pass, and all is put back.

    Only for calls whose result is checked: missing weights, for one, are only a warning to diffusers.
    """
    loggers = {name: logging.getLogger(name) for name in LIBRARIES}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.ERROR)
        with without_bars():
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
