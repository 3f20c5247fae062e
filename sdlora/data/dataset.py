"""The images of a run as its base takes them: scanned, and each with its bucket and crops."""

from __future__ import annotations

from sdlora.config import RunConfig
from sdlora.data.buckets import BucketPlan, plan_buckets
from sdlora.data.records import DatasetIndex
from sdlora.data.scan import scan_dataset


def read_dataset(config: RunConfig, *, resolution: int, min_step: int) -> tuple[DatasetIndex, BucketPlan]:
    """Scans the image folder and plans its buckets; the same settings give the same crops everywhere.

    Args:
        config: The run's settings.
        resolution: Training resolution of the base, in pixels.
        min_step: Smallest bucket step of the base, in pixels.

    Raises:
        DataError: If the folder is missing or holds no image to train on.
    """
    index = scan_dataset(config.images, config.data, config.train.seed)
    buckets = plan_buckets(
        index.records,
        config.data.resolution or resolution,
        config.data,
        heldout=index.heldout,
        min_step=min_step,
        seed=config.train.seed,
    )
    return index, buckets
