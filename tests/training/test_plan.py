"""The plan describes the run (R-16)."""

from __future__ import annotations

import re
from dataclasses import replace

from sdlora.errors import ConfigError
from sdlora.training.plan import make_plan
from sdlora.training.train import train
from tests.checks import raises


def test_images_seen_are_those_of_the_steps(make_images, tiny):
    """R-16: short steps are elsewhere in each epoch, so an epoch that is begun is counted step by step."""
    plan = make_plan(tiny(make_images(sizes=((64, 64),) * 5), train__batch_size=2))
    assert plan.order.steps_per_epoch == 3
    for steps in range(1, 30):
        run = replace(plan, config=plan.config.replace(train={"steps": steps}))
        assert run.images_seen == sum(len(plan.order.step(step)) for step in range(steps)), steps


def test_overrides_of_a_whole_configuration(make_images, tiny, tmp_path, capsys):
    """R-35: `sdlora.train(config=..., overrides=...)` drops neither; a wrong key is refused."""
    images = make_images()
    config = tiny(images, train__steps=4)
    train(images, config=config, overrides={"train.steps": 3}, out=tmp_path / "run", dry_run=True)
    assert re.search(r"^steps +3\b", capsys.readouterr().out, re.MULTILINE)
    with raises(ConfigError, "train.stepz"):
        train(images, config=config, overrides=["train.stepz=3"], dry_run=True, quiet=True)
