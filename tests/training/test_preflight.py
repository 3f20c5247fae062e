"""Training, the doctor and evaluation read the images in the same way (R-15)."""

from __future__ import annotations

import pytest

from sdlora.config import load_config
from sdlora.data.scan import read_dataset
from sdlora.models.info import inspect_base
from sdlora.training.planning import make_plan
from sdlora.training.preflight import check_folder, default_prompts


@pytest.mark.parametrize("trigger", ["ink style", None])
def test_prompts_of_a_folder_without_captions(make_images, trigger):
    """R-30: things that any base can draw, with the trigger if there is one."""
    images = make_images()
    for caption in images.glob("*.txt"):
        caption.unlink()
    changes = ["data.allow_missing_captions=true", *([f"data.trigger={trigger}"] if trigger else [])]
    config = load_config(None, changes, images=images)
    index, _ = read_dataset(config, resolution=128, min_step=8)
    prompts = default_prompts(index, config.data, 2)
    assert len(prompts) == 4
    assert all(prompt.startswith(trigger or "") and prompt.strip() for prompt in prompts)


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
