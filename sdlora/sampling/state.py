"""Sampling leaves no trace: random states and train mode are put back (R-04, R-10)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Puts models in eval mode and gives them, and all random generators, back as they were."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        for model in models:
            model.eval()
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        for module, training in modes:
            module.training = training
