"""Out of memory as one error, whatever ran out and however it says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from sdlora.errors import first_line


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Turns what the allocators of a CPU and of MPS, and cuDNN, raise into torch's OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise torch.OutOfMemoryError(first_line(error)) from error
        raise
