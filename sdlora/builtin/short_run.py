"""The short training that the measuring scripts repeat: nothing is saved or sampled before its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.runs import RunFolder
from sdlora.training.train import train


def train_shortly(
    images: Path, folder: Path, *, rate: float, seed: int, steps: int, settings: Mapping[str, Any]
) -> RunFolder:
    """Trains on the built-in base and measures the held-out loss at both ends.

    Args:
        images: The image folder.
        folder: Gets the run.
        rate: The largest learning rate.
        seed: Of the run.
        steps: Optimizer steps.
        settings: What differs from the defaults otherwise, by `section.key`.
    """
    overrides = {
        "objective.timestep_range": [0, 1000],  # all that the held-out loss covers
        **settings,
        "train.learning_rate": rate,
        "train.seed": seed,
        "train.steps": steps,
        "train.schedule": "cosine",
        "train.save_every": 0,
        "train.sample_every": 0,
        "train.evaluate_every": steps,
    }
    return train(images, out=folder, overrides=overrides, quiet=True)
