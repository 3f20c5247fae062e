"""The plan describes the run (R-16)."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

from sdlora.errors import ConfigError, RunError
from sdlora.training.plan import make_plan
from sdlora.training.plan_summary import describe_plan
from sdlora.training.train import resume, train
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


def test_cut_prompts_and_variants_of_captions_are_in_the_plan(make_images, tiny):
    """R-28, R-16: the end of a prompt that is not read, and what variants of captions take of the cache."""
    images = make_images()
    for file in images.rglob("*.txt"):
        file.write_text("a cat, red, blue, green, sky", encoding="utf-8")
    plan = make_plan(tiny(images, sample__prompts=["a red cat, " * 40]))
    assert any(f"of which {plan.info.text_length - 2} are read" in one.message for one in plan.findings)
    assert "captions" not in "".join(line for line in describe_plan(plan) if line.startswith("disk"))
    plan = make_plan(tiny(images, data__shuffle_tags=True, data__caption_variants=3))
    assert plan.index.num_captions <= 3 * len(plan.index.records)
    [disk] = [line for line in describe_plan(plan) if line.startswith("disk")]
    assert f"{plan.index.num_captions} captions" in disk


def test_a_run_of_an_earlier_version_is_resumed(make_images, tiny, tmp_path):
    """R-03: with the images and captions that it began with, although a folder is read otherwise now."""
    images = make_images()
    first = next(images.rglob("*.png"))
    shutil.copytree(first.parent, images / "0_off")
    config = tiny(images, train__steps=2, train__sample_every=0, data__rules=1)
    run = train(images, config=config, out=tmp_path / "run", quiet=True)
    settings = json.loads(run.config_file.read_text(encoding="utf-8"))
    assert settings["data"].pop("rules") == 1
    run.config_file.write_text(json.dumps(settings), encoding="utf-8")
    again = resume(run, ["train.steps=3"], quiet=True)
    assert again.is_finished(3)
    assert not any(again.events("changed"))
    with raises(RunError, "checkpoint-changed", shows="the images or captions"):
        resume(run, ["train.steps=4", "data.rules=2"], allow_changed=["data.rules"], quiet=True)
