"""Training, the doctor and evaluation read the images in the same way (R-15)."""

from __future__ import annotations

from sdlora.config import load_config
from sdlora.data.scan import read_dataset
from sdlora.models.info import inspect_base
from sdlora.training.planning import make_plan
from sdlora.training.preflight import check_folder


def test_training_doctor_and_evaluation_see_the_same(make_images):
    """R-15: the same index, buckets and random crops, with the base's resolution or another."""
    images = make_images(sizes=((200, 100),) * 8 + ((90, 90),) * 4)
    for resolution in ([], ["data.resolution=64"]):
        config = load_config(None, ["data.crop=random", "train.seed=3", *resolution], images=images)
        info = inspect_base(config.base)
        sizes = {"resolution": info.resolution, "min_step": info.min_step}
        index, buckets = read_dataset(config, **sizes)
        plan = make_plan(config)
        assert (index, buckets) == (plan.index, plan.buckets)
        assert (index, buckets) == read_dataset(plan.config, **sizes)
        assert buckets.resolution == (64 if resolution else 128)
        assert check_folder(config).summary == plan.data_lines
