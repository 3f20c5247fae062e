"""The plan describes the run (R-16)."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest

from sdlora.errors import ConfigError, RunError
from sdlora.training.finish import count_seen, describe_seen
from sdlora.training.plan import describe_plan
from sdlora.training.planning import make_plan
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


def test_small_buckets_are_stated(make_images, tiny):
    """R-15, R-16: images whose steps are short, and where they go when asked."""
    images = make_images(sizes=((64, 64),) * 4 + ((64, 56),))
    settings = {"data__heldout": 0, "data__resolution": 128, "train__batch_size": 4}
    plan = make_plan(tiny(images, **settings))
    [notice] = [one for one in plan.findings if one.key == "data.buckets-lonely"]
    assert "data.merge_buckets=4" in notice.message
    merged = make_plan(tiny(images, **settings, data__merge_buckets=4))
    assert not any(one.key == "data.buckets-lonely" for one in merged.findings)
    assert "04.png" in "".join(line for line in merged.data_lines if "moved 1 image" in line)
    assert len(merged.as_event()["buckets"]) == 1


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


def test_what_is_left_to_compute(make_images, tiny):
    """R-16: each stage's work shrinks to nothing with its steps; a grid draws the base once."""
    config = tiny(make_images(), train__steps=4, train__sample_every=2, train__evaluate_every=2)
    plan = make_plan(config)
    start, half = plan.work_left(), plan.work_left(2)
    assert start["encoding"].passes == len(plan.index.records) + len(plan.index.heldout)
    assert half["encoding"].flop == 0
    assert half["training"].flop == start["training"].flop / 2
    # Evaluations at 0, 2 and 4, of which the first is done; grids at 2 and 4, both to come.
    assert half["validation"].flop == pytest.approx(start["validation"].flop * 2 / 3)
    assert half["sampling"] == start["sampling"]
    assert plan.work_left(2, 3)["sampling"].flop == pytest.approx(start["sampling"].flop / 3)
    assert not any(work.flop for work in plan.work_left(4, 5).values())


def test_a_plan_for_a_card_that_is_not_here(make_images, sdlora):
    """R-11, R-18: precision, memory and time are that card's; nothing trains on it."""
    images = make_images()
    code, out, _ = sdlora("train", images, "--dry-run", "--device", "RTX 3060 12GB")
    assert code == 0
    assert out.startswith("device    RTX 3060 12GB, compute bf16, base stored in bf16")
    assert re.search(r"^memory +needs 6\d\d MB of 12\.0 GB: fits$", out, re.MULTILINE)
    assert re.search(r"^time .* estimate from the published speed of the RTX 3060$", out, re.MULTILINE)
    code, out, _ = sdlora("train", images, "--json", "--device", "cuda:1GB", "train.batch_size=256")
    plan = json.loads(out)
    assert (code, plan["memory"]["fits"], plan["seconds"]) == (0, False, {})
    assert plan["memory"]["changes"] == ["train.batch_size=1", "train.accumulate=256"]
    code, _, [line] = sdlora("train", images, "--device", "RTX 3060")
    assert code == 2
    assert "add --dry-run" in line


def test_epochs_instead_of_steps(make_images, quick):
    """train.epochs: whole passes over all buckets, resolved to steps, which a resumed run reads."""
    images = make_images(sizes=((64, 64),) * 5 + ((96, 64),) * 3)
    with raises(ConfigError, "train.epochs", shows="train.steps"):
        quick(images, train__epochs=3)
    config = quick(images, train__batch_size=2, train__epochs=3, train__steps=None, data__heldout=0)
    plan = make_plan(config)
    assert plan.steps == 3 * plan.order.steps_per_epoch == 15
    assert plan.config.train.epochs is None
    assert make_plan(config.replace(train={"epochs": 0.01})).steps == 1
    seen = count_seen(plan)
    assert set(seen.values()) == {3}
    assert describe_seen(seen) == "8 images 3 times"
    assert describe_seen(count_seen(make_plan(config.replace(train={"epochs": 0.2})))).startswith(
        "6 images 0 times"
    )


def test_grids_that_cannot_be_drawn_are_refused_before_the_training(make_images, tiny, sd15_folder):
    """R-16: not at the first grid, after hours."""
    images = make_images()
    for settings, key in (
        ({"sample__prompts": ["a {cat}"]}, "sample.prompts"),
        ({"sample__steps": 2000}, "sample.steps"),
        ({"sample__scheduler": "Nothing"}, "sample.scheduler"),
    ):
        with raises(ConfigError, key):
            make_plan(tiny(images, train__sample_every=1, **settings))
    # Nothing is drawn.
    make_plan(tiny(images, train__sample_every=0, sample__steps=2000))


def test_braces_in_captions_are_no_placeholders_of_prompts(make_images, tiny):
    """R-28: they may be meant, and are trained as they are, but no prompt can have them."""
    images = make_images()
    for file in images.rglob("*.txt"):
        file.write_text("a {red|blue} thing", encoding="utf-8")
    settings = {"train__sample_every": 1, "sample__prompts": []}
    plan = make_plan(tiny(images, **settings))
    assert plan.config.sample.prompts == ["a red|blue thing"]
    assert plan.index.records[0].caption == "a {red|blue} thing"


def test_the_image_folder_is_no_run_folder(make_images, tiny, tmp_path):
    """R-26: the run's own images would be trained on by the next run."""
    images = make_images()
    (tmp_path / "link").symlink_to(images)
    for out in (images, tmp_path / "link"):
        with raises(ConfigError, "option--out.images"):
            train(images, config=tiny(images), out=out, dry_run=True, quiet=True)
