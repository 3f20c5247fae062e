"""What the plan says is what then happens (R-16)."""

from __future__ import annotations

from dataclasses import replace

from sdlora.training.plan import make_plan


def test_images_seen_are_those_of_the_steps(make_images, tiny):
    """R-16: a short step lies elsewhere in each epoch, so one that is begun is counted as itself."""
    plan = make_plan(tiny(make_images(sizes=((64, 64),) * 5), train__batch_size=2))
    assert plan.order.steps_per_epoch == 3
    for steps in range(1, 30):
        run = replace(plan, config=plan.config.replace(train={"steps": steps}))
        assert run.images_seen == sum(len(plan.order.step(step)) for step in range(steps)), steps
